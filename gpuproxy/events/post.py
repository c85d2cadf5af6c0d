"""One POST to a URL that a customer gave: its name resolved once, judged, and the judged address dialled.

Redirects are a failure and never followed, of the answer nothing is read but its head, nothing is kept between two
posts, and all together has a bound.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from gpuproxy import __version__
from gpuproxy.codec.retry_after import seconds_asked
from gpuproxy.errors import GatewayError
from gpuproxy.events.deliveries import Outcome
from gpuproxy.guard import Guard, Target, parse_target
from gpuproxy.resolver import Resolver

RESOLVER_THREADS = 64  # made when needed; more names than one account has webhooks by default
HEAD_BYTES_MAX = 8_190
READ_BYTES = 4_096  # what is taken from the socket before it is closed
ERROR_CHARACTERS_MAX = 200
RESTING = (429, 503)
REST_S_MAX = 86_400  # as the longest wait between two attempts


class Bounds(NamedTuple):
    """Limits and exceptions that hold for every post; times in seconds. `timeout_s` is for all of it."""

    timeout_s: float
    connect_s: float
    dns_s: float
    connect_to: Mapping[str, str]
    guard: Guard
    ca_file: str = ""


class Poster:
    """Sends posts until it is closed."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._resolver = Resolver("webhook-dns", RESOLVER_THREADS)
        self._tls: ssl.SSLContext | None = None  # made when first needed: 20 ms

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Send `body` and tell how that ended. Raises nothing that a receiver can cause."""
        started = time.monotonic()
        status, rest_s, error = 0, 0, ""
        try:
            async with asyncio.timeout(self._bounds.timeout_s):
                status, rest_s = await self._post(url, headers, body)
        except TimeoutError:
            error = f"no answer within {self._bounds.timeout_s:g} s"
        except GatewayError as refused:
            error = refused.message
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            error = _told(failure)
        if not error and not 200 <= status < 300:
            error = f"answered {status}" + (", and redirects are not followed" if 300 <= status < 400 else "")
        return Outcome(status, error[:ERROR_CHARACTERS_MAX], int((time.monotonic() - started) * 1_000), rest_s)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, int]:
        target = parse_target(url, "url")
        addresses = await self._addresses(target)
        connector = aiohttp.TCPConnector(
            resolver=_Pinned(addresses),
            socket_factory=_only(addresses),
            use_dns_cache=False,
            force_close=True,
            ssl=self._context() if target.scheme == "https" else True,
        )
        all_headers = {"Content-Type": "application/json", "User-Agent": f"gpuproxy/{__version__}", **headers}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._bounds.connect_s)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=READ_BYTES,
                max_line_size=HEAD_BYTES_MAX,
                max_field_size=HEAD_BYTES_MAX,
            ) as session,
            session.post(
                URL(f"{target.scheme}://{target.authority}{target.path or '/'}", encoded=True),
                data=body,
                headers=all_headers,
                allow_redirects=False,
            ) as response,
        ):
            return response.status, rest_asked(response.status, response.headers.get("Retry-After", ""), time.time())

    async def _addresses(self, target: Target) -> list[tuple[str, int]]:
        host, bounds = target.host, self._bounds
        try:
            return await self._resolver.places(host, target.port, bounds.dns_s, bounds.connect_to, bounds.guard, "url")
        except TimeoutError:
            raise GatewayError("UPSTREAM_TIMEOUT", f"{host} was not resolved in time") from None
        except OSError:
            raise GatewayError("UPSTREAM_UNREACHABLE", f"{host} does not resolve") from None

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=self._bounds.ca_file or None)
        return self._tls

    def close(self) -> None:
        """Leave the resolver's threads to themselves."""
        self._resolver.close()


def rest_asked(status: int, retry_after: str, now_s: float) -> int:
    """Return for how many seconds a receiver wants nothing, at most REST_S_MAX; 0: it does not say so.

    Retry-After is heeded where it means too much or too busy.
    """
    return min(seconds_asked(retry_after, now_s) or 0, REST_S_MAX) if status in RESTING else 0


class _Pinned(AbstractResolver):
    """Answers every question with the addresses that were judged."""

    def __init__(self, addresses: Iterable[tuple[str, int]]) -> None:
        self._addresses = list(addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=pinned_port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address, pinned_port in self._addresses
        ]

    async def close(self) -> None:
        """Hold nothing."""


def _only(addresses: Iterable[tuple[str, int]]) -> Any:
    """Return a maker of sockets for these addresses alone: aiohttp asks no resolver about a literal one."""
    judged = {address for address, _ in addresses}

    def make(info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, address = info
        if address[0] not in judged:
            raise OSError(f"{address[0]} was not judged")
        return socket.socket(family, kind, protocol)

    return make


def _told(failure: Exception) -> str:
    """Return what went wrong, without what the receiver said."""
    if isinstance(failure, aiohttp.ClientConnectorCertificateError):
        failure = failure.certificate_error
    elif isinstance(failure, aiohttp.ClientConnectorSSLError):
        failure = failure.os_error
    if isinstance(failure, ssl.SSLCertVerificationError):
        return f"its certificate is not believed: {failure.verify_message}"
    if isinstance(failure, ssl.SSLError):
        return f"TLS failed: {(failure.reason or 'for no known reason').lower().replace('_', ' ')}"
    if isinstance(failure, aiohttp.ClientConnectorError) and isinstance(failure.os_error, ConnectionResetError):
        return "TLS failed: it ended the handshake"
    if isinstance(failure, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "no connection could be made"
    if isinstance(failure, aiohttp.ServerDisconnectedError | ConnectionError):
        return "it closed the connection without an answer"
    return f"no valid answer: {type(failure).__name__}"
