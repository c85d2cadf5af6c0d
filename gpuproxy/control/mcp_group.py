"""Several MCP servers as one: ``/api/v1/gpu/proxy/mcp/{group}``, for both eras.

Lists are merged under names that tell the server, calls go to the server their name tells, everything else to all. All
of it are calls through the gateway itself, see `mcp_inner`; nothing is remembered here. In revisions with sessions the
client's session id is a sealed text of those at the servers, so any node can read it. A server that does not answer is
left out, and the log says so. Streams that tell of changes at all servers are the work of `mcp_listen`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from time import monotonic

import aiohttp
import msgspec
from aiohttp import web

from gpuproxy.codec.mcp import (
    HEADER_MISMATCH,
    STATELESS_SINCE,
    UNREADABLE,
    Fields,
    decode_fields,
    encode,
    mirrored_name,
    object_of,
    raw,
    text_of,
    unmirrored_name,
)
from gpuproxy.codec.seal import Seal
from gpuproxy.config.mcp import McpGroup
from gpuproxy.control.mcp_answers import UNREACHABLE, RpcError, accepted, in_company, responded, unreached, verbatim
from gpuproxy.control.mcp_batch import BATCHES_UNTIL, Say, answered_together, messages_in, spoken
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX, REFUSING, Inner, Seat, Told
from gpuproxy.control.mcp_listen import LISTEN, LISTENING, STREAMS_MAX, Places, Source, merged, shared_out
from gpuproxy.control.mcp_merge import (
    LISTS,
    is_unknown_method,
    merged_discovery,
    merged_list,
    merged_session,
    next_cursor,
)
from gpuproxy.control.mcp_names import MARK, URI_MARK, inward, split
from gpuproxy.control.mcp_relay import EVENTS, relay, while_there
from gpuproxy.observe.logs import get_logger

PAGES_MAX = 50  # of one server's list
NAMED = {
    "tools/call": ("name", MARK),
    "prompts/get": ("name", MARK),
    "resources/read": ("uri", URI_MARK),
    "resources/subscribe": ("uri", URI_MARK),
    "resources/unsubscribe": ("uri", URI_MARK),
}
UNAVAILABLE = -32067  # as calls to a single server have it
SESSION_BYTES_MAX = 8_000  # a longer field aiohttp does not take from a client that brings it back
SILENT_S = 1.0  # for a server that has let callers wait in vain
REMEMBERED_S = 30.0  # that it has
COMPLAINT_S = 60.0  # between two log lines about one server

Seats = dict[str, Seat]  # by server
_encode_seats = msgspec.json.Encoder().encode
_decode_seats = msgspec.json.Decoder(Seats).decode

logger = get_logger(__name__)


class Group:
    """One group, as a handler of its path."""

    def __init__(self, settings: McpGroup, inner: Inner, seal: Seal, body_bytes_max: int) -> None:
        self.name = settings.name
        self._settings = settings
        self._inner = inner
        self._seal = seal
        self._body_bytes_max = body_bytes_max
        self._complained: dict[str, float] = {}
        self._silent_until_s: dict[str, float] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a client."""
        try:
            return self._named(await self._answered(request))
        except RpcError as failure:
            return self._named(failure.answer(request))
        except aiohttp.ClientError as error:
            return unreached(error).answer(request)

    def _named(self, response: web.StreamResponse) -> web.StreamResponse:
        """Let a server's word about credentials lead to the group: clients compare it with the URL they call."""
        challenge = response.headers.get("WWW-Authenticate", "")
        if challenge and not response.prepared:
            for server in self._settings.servers:
                challenge = challenge.replace(f'/mcp/{server}"', f'/mcp/{self.name}"')
            response.headers["WWW-Authenticate"] = challenge
        return response

    async def _answered(self, request: web.Request) -> web.StreamResponse:
        has_key = "X-API-Key" in request.headers or "Authorization" in request.headers
        if request.method == "POST" and has_key:
            return await self._posted(request, await self._body(request))
        if request.method == "GET" and has_key:
            return await self._listened(request)
        if request.method == "DELETE" and has_key:
            return await self._ended(request)
        return await self._passed(request, self._settings.servers[0], None, None)  # one says it for all

    # -- messages ---------------------------------------------------------------------------------------------

    async def _posted(self, request: web.Request, body: bytes) -> web.StreamResponse:
        if body.lstrip()[:1] == b"[":
            return await self._batched(request, body)
        message = _message(body)
        method = text_of(message, "method")
        if _is_stateless(request):
            seats = dict.fromkeys(self._settings.servers, Seat())
        elif method == "initialize":
            return await self._initialized(request, message, body)
        else:
            seats = self._seats(request)
        return await self._sent(Turn(request, message, body, seats), method)

    async def _batched(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Answer several messages as if each had come alone."""
        seats = {} if _is_stateless(request) else self._seats(request)
        if min((seat.version for seat in seats.values()), default=STATELESS_SINCE) > BATCHES_UNTIL:
            fault = f"batches are of revision {BATCHES_UNTIL}, which has not been agreed on; send one message at a time"
            raise RpcError(400, -32600, fault)

        async def answer(message: Fields, say: Say) -> web.StreamResponse:
            try:
                method = text_of(message, "method")
                if method == "initialize":
                    raise RpcError(400, -32600, "initialize stands in no batch", message.get("id"))
                return await self._sent(Turn(request, message, encode(message), seats, say), method)
            except RpcError as failure:
                return failure.answer(request)
            except aiohttp.ClientError as error:
                return unreached(error, message.get("id")).answer(request)

        return await while_there(request, answered_together(request, messages_in(body), answer))

    async def _sent(self, turn: "Turn", method: str) -> web.StreamResponse:
        if not method:
            if "result" not in turn.message and "error" not in turn.message:
                raise RpcError(400, -32600, "the message has no method, no result and no error", turn.message.get("id"))
            server, answer = inward(turn.message, turn.seats)
            return await self._passed(turn.request, server, encode(answer), turn.seats) if server else accepted()
        if method in LISTS:
            return await self._listed(turn, method)
        if method in NAMED or method == "completion/complete":
            return await self._routed(turn, method)
        if method.startswith("notifications/"):
            self._check_all(turn, await self._asked(turn, turn.body))
            return accepted()
        if method == "server/discover" and _is_stateless(turn.request):
            return await self._discovered(turn)
        if method == LISTEN and _is_stateless(turn.request):
            parts = shared_out(object_of(turn.message, "params"), turn.seats)
            if not parts:
                fault = (
                    f"nothing here to tell of; resources begin with server{URI_MARK}, servers: {', '.join(turn.seats)}"
                )
                raise RpcError(400, -32602, fault, turn.message.get("id"))
            bodies = {server: encode(turn.message | {"params": raw(params)}) for server, params in parts.items()}
            return await self._heard(turn, bodies, Places())
        if method == "logging/setLevel":
            self._good(turn, method, await self._asked(turn, turn.body))
        if method in ("ping", "logging/setLevel"):
            return responded(turn.message, {})
        status = 404 if _is_stateless(turn.request) else 200
        raise RpcError(status, -32601, f"Method not found: {method[:100]}", turn.message.get("id"))

    async def _initialized(self, request: web.Request, message: Fields, body: bytes) -> web.StreamResponse:
        turn = Turn(request, message, body, dict.fromkeys(self._settings.servers, Seat()))
        agreed = self._good(turn, "initialize", await self._asked(turn, body))
        seats = {each.server: _seat_of(each) for each in agreed}
        response = in_company(responded(message, merged_session(self.name, agreed)), agreed[0])
        session = self._seal.seal(_encode_seats(seats), self._context()).decode()
        if len(session) > SESSION_BYTES_MAX:
            fault = "the session ids of this group's servers are too long together; make a group of fewer servers"
            raise RpcError(502, -32603, fault, message.get("id"))
        response.headers["Mcp-Session-Id"] = session
        return response

    async def _discovered(self, turn: "Turn") -> web.StreamResponse:
        told = await self._asked(turn, turn.body)
        for each in told:
            has_said = each.status in range(200, 500) and each.status not in (*REFUSING, 403)
            if has_said and each.result is None and not each.is_gateways:
                return verbatim(each)  # a server of sessions only: the client shall begin one, which most others can
        good = self._good(turn, "server/discover", told)
        return in_company(responded(turn.message, merged_discovery(self.name, good)), good[0])

    async def _listed(self, turn: "Turn", method: str) -> web.StreamResponse:
        params = object_of(turn.message, "params")
        params.pop("cursor", None)  # all is in one page
        pages = await asyncio.gather(*(self._pages(turn, server, params) for server in turn.seats))
        lasts = self._good(turn, method, [each[-1] for each in pages])
        named = {each.server for each in lasts}
        whole = [page for each in pages if each[-1].server in named for page in each]
        return in_company(responded(turn.message, merged_list(LISTS[method], whole)), lasts[0])

    async def _pages(self, turn: "Turn", server: str, params: Fields) -> list[Told]:
        pages: list[Told] = []
        cursor = ""
        size = 0
        while len(pages) < PAGES_MAX and size <= ANSWER_BYTES_MAX:
            asked = params | ({"cursor": raw(cursor)} if cursor else {})
            body = encode(turn.message | ({"params": raw(asked)} if asked else {}))
            pages.append(await self._ask(turn, server, body))
            size += len(pages[-1].body)
            if not (cursor := next_cursor(pages[-1])):
                break
        return pages

    async def _routed(self, turn: "Turn", method: str) -> web.StreamResponse:
        params = object_of(turn.message, "params")
        place = object_of(params, "ref") if method == "completion/complete" else params
        field, mark = NAMED.get(method) or (("uri", URI_MARK) if "uri" in place else ("name", MARK))
        server, name = split(text_of(place, field), mark, turn.seats)
        if not server:
            shown = text_of(place, field)[:100]
            message = f"no {shown!r} here; names begin with server{mark}, servers: {', '.join(turn.seats)}"
            raise RpcError(200, -32602, message, turn.message.get("id"))
        there = place | {field: raw(name)}
        params = params | {"ref": raw(there)} if method == "completion/complete" else there
        body = encode(turn.message | {"params": raw(params)})
        headers = {}
        if (told := turn.request.headers.get("Mcp-Name")) is not None:
            named = unmirrored_name(told)
            if _is_stateless(turn.request) and (told if named is None else named) != text_of(place, field):
                raise RpcError(400, HEADER_MISMATCH, "Mcp-Name is not what the message says", turn.message.get("id"))
            headers["mcp_name"] = mirrored_name(name)
        return await self._passed(turn.request, server, body, turn.seats, turn.say, **headers)

    # -- sessions ---------------------------------------------------------------------------------------------

    async def _listened(self, request: web.Request) -> web.StreamResponse:
        if _is_stateless(request):
            raise RpcError(405, -32600, f"there is no stream to get; post {LISTEN}", headers={"Allow": "POST"})
        seats = self._seats(request)
        told = request.headers.get("Last-Event-ID", "")
        places = Places(seats, told)
        server, event_id = split(told, MARK, seats)
        if told not in ("", LISTENING) and not (server or places.by_server):
            raise RpcError(400, -32600, "Last-Event-ID names no server of this group")
        if server:
            return await self._passed(request, server, None, seats, last_event_id=event_id)
        return await self._heard(Turn(request, {}, None, seats), dict.fromkeys(seats), places)

    async def _heard(self, turn: "Turn", bodies: Mapping[str, bytes | None], places: Places) -> web.StreamResponse:
        """Pass on the streams of all servers that have one, each from where the client has heard it."""

        async def work() -> web.StreamResponse:
            async with AsyncExitStack() as stack:
                opening = []
                for server, body in bodies.items():
                    place = places.by_server.get(server)
                    headers = {"last_event_id": place} if place else {}
                    call = partial(self._inner.call, turn.request, server, body, turn.seats[server], **headers)
                    opening.append(Source(server).open(stack, call, self._settings.timeout_s, body is not None))
                sources = await asyncio.gather(*opening)
                self._check_all(turn, [each.told for each in sources])
                for each in sources:
                    if not each.is_open and each.told.status != 405 and not is_unknown_method(each.told):
                        self._complain(each.told, LISTEN)
                if found := [each for each in sources if each.is_open]:
                    return await merged(turn.request, found, places, self._inner.closing)
                raise RpcError.of(next(each.told for each in sources if each.told.status))

        inner = self._inner
        if inner.streams_count >= STREAMS_MAX:
            fault = f"{STREAMS_MAX} streams are open to groups of MCP servers; try again later"
            raise RpcError(503, UNAVAILABLE, fault, turn.message.get("id"), {"Retry-After": "60"})
        inner.streams_count += 1
        try:
            return await while_there(turn.request, work())
        finally:
            inner.streams_count -= 1

    async def _ended(self, request: web.Request) -> web.StreamResponse:
        seats = {server: seat for server, seat in self._seats(request).items() if seat.session}
        turn = Turn(request, {}, None, seats)
        self._check_all(turn, [each for each in await self._asked(turn, None) if each.status != 405])
        return web.Response(status=200)

    def _seats(self, request: web.Request) -> Seats:
        """Return the client's sessions at the servers. Raises RpcError for none, and for one that is not ours."""
        text = request.headers.get("Mcp-Session-Id", "")
        if not text:
            raise RpcError(400, -32600, "no Mcp-Session-Id; begin a session with initialize")
        plain = self._seal.unseal(text.encode(errors="replace"), self._context())
        if plain is None:
            raise RpcError(404, -32600, "this session is unknown here; begin a new one")
        seats = _decode_seats(plain)
        return {server: seats[server] for server in self._settings.servers if server in seats}

    def _context(self) -> bytes:
        return b"mcp group " + self.name.encode()

    # -- calls ------------------------------------------------------------------------------------------------

    async def _asked(self, turn: "Turn", body: bytes | None) -> list[Told]:
        return await asyncio.gather(*(self._ask(turn, server, body) for server in turn.seats))

    async def _ask(self, turn: "Turn", server: str, body: bytes | None) -> Told:
        began_s = monotonic()
        timeout_s = self._settings.timeout_s
        if began_s < self._silent_until_s.get(server, began_s):
            timeout_s = min(timeout_s, SILENT_S)
        told = await self._inner.ask(turn.request, server, body, turn.seats[server], timeout_s)
        if told.status in (0, 502, 504) and timeout_s > SILENT_S <= monotonic() - began_s:
            self._silent_until_s[server] = monotonic() + REMEMBERED_S
        elif told.status:
            self._silent_until_s.pop(server, None)
        return told

    async def _passed(
        self,
        request: web.Request,
        server: str,
        body: bytes | None,
        seats: Seats | None,
        say: Say | None = None,
        **headers: str,
    ) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            seat = seats[server] if seats is not None else None
            async with self._inner.call(request, server, body, seat, **headers) as response:
                if say is not None and response.content_type == EVENTS:
                    return await spoken(response, server, say)
                return await relay(request, response, server)

        return await while_there(request, work())

    def _good(self, turn: "Turn", method: str, told: Sequence[Told]) -> list[Told]:
        """Return those who answered. Raises RpcError if none did, or for what holds for the caller at all of them."""
        self._check_all(turn, told)
        good = [each for each in told if each.result is not None]
        for each in told:
            if each.result is None and not is_unknown_method(each):
                self._complain(each, method)
        if not good:  # a server's own word says more than ours for one that is down
            raise RpcError.of(min((each for each in told if each.status), key=lambda each: each.is_gateways))
        return good

    def _check_all(self, turn: "Turn", told: Sequence[Told]) -> None:
        for each in told:
            has_session = bool(turn.seats[each.server].session)
            if each.is_callers or (has_session and each.status == 404 and not is_unknown_method(each)):
                raise RpcError.of(each)  # without a key nothing goes; a session that is gone must begin anew
        if told and not any(each.status for each in told):
            raise RpcError(502, UNREACHABLE, f"no server of the group {self.name!r} answers")

    def _complain(self, told: Told, method: str) -> None:
        now_s = monotonic()
        if now_s - self._complained.get(told.server, -COMPLAINT_S) >= COMPLAINT_S:
            self._complained[told.server] = now_s
            where = {"group": self.name, "server": told.server, "status": told.status, "method": method}
            logger.warning("a server of an MCP group is left out", **where)

    async def _body(self, request: web.Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.content.iter_any():
            size += len(part)
            if size > self._body_bytes_max:
                raise RpcError(413, -32600, f"the message is over {self._body_bytes_max} bytes")
            parts.append(part)
        return b"".join(parts)


class Turn(msgspec.Struct, frozen=True):
    """A message and where it may go. With `say`, what a stream tells in answer goes there, for others answer too."""

    request: web.Request
    message: Fields
    body: bytes | None
    seats: Seats
    say: Say | None = None


def _message(body: bytes) -> Fields:
    try:
        return decode_fields(body)
    except UNREADABLE:
        raise RpcError(400, -32700, "the body is no JSON object") from None


def _is_stateless(request: web.Request) -> bool:
    return request.headers.get("MCP-Protocol-Version", "") >= STATELESS_SINCE


def _seat_of(told: Told) -> Seat:
    result = object_of(told.response, "result")
    return Seat(told.headers.get("Mcp-Session-Id", ""), text_of(result, "protocolVersion"))
