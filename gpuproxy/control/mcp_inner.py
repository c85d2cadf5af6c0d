"""Calls of a group to its servers: through the gateway's own listener, with the caller's own credential.

So keys, rules of tools, limits, prices, breakers and receipts hold for them by the one way there is.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import web
from msgspec import Raw, Struct
from multidict import CIMultiDict

from gpuproxy.codec.mcp import Fields, first_response, object_of, text_of
from gpuproxy.codec.sse import event_payloads

MCP = "/api/v1/gpu/proxy/mcp"
BOTH = "application/json, text/event-stream"
ANSWER_BYTES_MAX = 16 << 20  # of an answer that is merged with others
CONNECT_S = 5.0
PIECE_BYTES = 65_536
REFUSING = (401, 402, 429)

# What belongs to the client's own connection or session, or is said anew.
_OWN = {
    "host", "connection", "content-length", "transfer-encoding", "keep-alive", "te", "trailer", "upgrade", "expect",
    "accept-encoding", "mcp-session-id", "last-event-id", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host",
    "forwarded", "content-encoding",  # aiohttp has unpacked it
}  # fmt: skip
_PASSED = ("content-type", "www-authenticate", "retry-after", "cache-control", "x-accel-buffering", "vary", "allow")
_PASSED_BEGIN = ("access-control-", "x-ratelimit-")


class Seat(Struct, frozen=True, array_like=True):
    """A client's session at one server: its id there, may be empty, and the revision they have agreed on."""

    session: str = ""
    version: str = ""


class Told(Struct):
    """What a server answered: the fields of its JSON-RPC response if there is one, else the bytes."""

    server: str
    status: int
    headers: "CIMultiDict[str]"
    body: bytes = b""
    response: Fields = {}

    @property
    def result(self) -> Raw | None:
        """Return the result as JSON, None for an error or no response."""
        return self.response.get("result")

    @property
    def is_gateways(self) -> bool:
        """Tell whether the gateway refused, so that the server was not asked."""
        return bool(text_of(object_of(object_of(self.response, "error"), "data"), "code"))

    @property
    def is_callers(self) -> bool:
        """Tell whether the gateway refused for what the caller is or has, so that it would at other servers too."""
        return self.status in REFUSING and self.is_gateways


class Inner:
    """The way to the servers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.closing = asyncio.Event()  # streams that would go on for ever end then
        self.streams_count = 0  # of such streams
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def call(
        self, request: web.Request, server: str, body: bytes | None, seat: Seat | None, **headers: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a message, or what the request is if there is no body; the answer has its head when this is entered.

        Raises aiohttp.ClientError.
        """
        fields = inner_fields(request, seat) | {name.replace("_", "-"): value for name, value in headers.items()}
        method, url = request.method, f"{self._address}{MCP}/{server}"
        async with self._open().request(method, url, data=body, headers=fields, allow_redirects=False) as response:
            yield response

    async def ask(self, request: web.Request, server: str, body: bytes | None, seat: Seat, timeout_s: float) -> Told:
        """Send a message and return the whole answer; status 0 if none came in time."""
        failed = Told(server, 0, CIMultiDict())
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with (
                asyncio.timeout(timeout_s),
                self.call(request, server, body, seat, accept=BOTH) as response,
            ):
                return await told_by(server, response)
        return failed

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)  # the workers hold to limits
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)  # as the workers hold to times
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=True, read_bufsize=PIECE_BYTES
            )
        return self._session


def inner_fields(request: web.Request, seat: Seat | None) -> dict[str, str]:
    """Return the client's fields for a server; those of its session there."""
    found: dict[str, str] = {"accept-encoding": "identity"}
    for name, value in request.headers.items():
        lower = name.lower()
        if lower not in _OWN:
            found[lower] = f"{found[lower]}, {value}" if lower in found else value
    if seat is not None:
        if seat.session:
            found["mcp-session-id"] = seat.session
        if seat.version:
            found["mcp-protocol-version"] = seat.version
    return found


def passed_fields(response: aiohttp.ClientResponse) -> "CIMultiDict[str]":
    """Return the fields of a server's answer that are for the client."""
    fields = response.headers.items()
    kept = [
        (name, value) for name, value in fields if name.lower() in _PASSED or name.lower().startswith(_PASSED_BEGIN)
    ]
    return CIMultiDict(kept)


async def told_by(server: str, response: aiohttp.ClientResponse) -> Told:
    """Return the whole of a server's answer. Raises aiohttp.ClientError."""
    told = Told(server, response.status, passed_fields(response))
    told.body = await read_bounded(response.content, ANSWER_BYTES_MAX)
    payloads = event_payloads(told.body) if response.content_type == "text/event-stream" else (told.body,)
    told.response = first_response(payloads)
    if session := response.headers.get("Mcp-Session-Id"):
        told.headers["Mcp-Session-Id"] = session
    return told


async def read_bounded(stream: aiohttp.StreamReader, bytes_max: int) -> bytes:
    """Return all of a body. Raises aiohttp.ClientPayloadError for one that is longer."""
    parts: list[bytes] = []
    size = 0
    async for part in stream.iter_chunked(PIECE_BYTES):
        size += len(part)
        if size > bytes_max:
            raise aiohttp.ClientPayloadError(f"over {bytes_max} bytes")
        parts.append(part)
    return b"".join(parts)
