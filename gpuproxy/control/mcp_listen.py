"""Streams of several servers as one: what changes there, and what they ask of their own accord.

In sessions that is the stream a client gets by GET, from revision 2026-07-28 on the answer to `subscriptions/listen`.
Whole events take turns in it. The id of one tells where each server's stream had come, so that who resumes misses
nothing of any. A server that has no such stream is left out. The first stream to end ends the client's: clients open
theirs again, and then all servers are asked anew.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from urllib.parse import parse_qsl, urlencode

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from gpuproxy.codec.events import EventCutter
from gpuproxy.codec.mcp import UNREADABLE, Fields, decode_fields, encode, object_of, raw, text_of
from gpuproxy.codec.sse import event_payloads
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX, Told, passed_fields, told_by
from gpuproxy.control.mcp_names import URI_MARK, shown_uri, split, texts_of
from gpuproxy.control.mcp_relay import EVENTS, LOOK_S, end_all, shown
from gpuproxy.control.streams import break_off

STREAMS_MAX = 1_000  # at once, of all groups: each holds a connection for each server, and wakes up to look around
LISTENING = "~"  # begins the ids of events in such a stream; no name of a server does
TAKEN = 409  # says a server that has one stream for a session, and that is open
TAKEN_TRIES_MAX = 3
PLACES_BYTES_MAX = 4_096  # of an id: aiohttp takes fields of 8,190 bytes from a client that brings it back
LISTEN = "subscriptions/listen"
ACKNOWLEDGED = "notifications/subscriptions/acknowledged"
URIS = "resourceSubscriptions"

Call = AbstractAsyncContextManager[aiohttp.ClientResponse]


class Source:
    """What a server answered, and its stream if it has one; `acknowledged` is what a subscription begins with."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.told = Told(server, 0, CIMultiDict())
        self.acknowledged: Fields = {}
        self.is_open = False
        self._response: aiohttp.ClientResponse | None = None
        self._cutter = EventCutter()
        self._events: deque[bytes] = deque()

    async def open(
        self, stack: AsyncExitStack, call: Callable[[], Call], timeout_s: float, is_subscription: bool
    ) -> "Source":
        """Send the call; the stream stays open as long as the stack. One that cannot be had in time stays closed."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError, *UNREADABLE):
            async with asyncio.timeout(timeout_s):
                response = self._response = await self._answered(stack, call)
                if response.status != 200 or response.content_type != EVENTS:
                    self.told = await told_by(self.server, response)
                else:
                    self.told = Told(self.server, response.status, passed_fields(response))
                    self.is_open = not is_subscription or await self._is_acknowledged()
        if not self.is_open and self._response is not None:
            self._response.close()
            if self.told.status == 200 and not self.told.response:  # it has said nothing
                self.told = Told(self.server, 0, CIMultiDict())
        return self

    async def _answered(self, stack: AsyncExitStack, call: Callable[[], Call]) -> aiohttp.ClientResponse:
        """Send the call, again while the server has the client's last stream still: that ends when we see it gone."""
        for _ in range(TAKEN_TRIES_MAX - 1):
            response = await stack.enter_async_context(call())
            if response.status != TAKEN:
                return response
            await asyncio.sleep(LOOK_S)
        return await stack.enter_async_context(call())

    async def _is_acknowledged(self) -> bool:
        while event := await self.next_event():
            for payload in event_payloads(event):
                message = decode_fields(payload)
                if text_of(message, "method") != ACKNOWLEDGED:
                    self.told = Told(
                        self.server, 200, CIMultiDict({"Content-Type": "application/json"}), payload, message
                    )
                    return False
                self.acknowledged = message
                return True
        return False

    async def next_event(self) -> bytes:
        """Return the next event, empty at the end. Raises aiohttp.ClientPayloadError for one that is too long."""
        assert self._response is not None
        while not self._events:
            data = await self._response.content.readany()
            if not data:
                return b""
            self._events += self._cutter.feed(data)
            if self._cutter.held_bytes > ANSWER_BYTES_MAX:
                raise aiohttp.ClientPayloadError(f"an event of over {ANSWER_BYTES_MAX} bytes")
        return self._events.popleft()


class Places:
    """How far the client has heard each server: the id of the last event, by server."""

    def __init__(self, servers: Container[str] = (), told: str = "") -> None:
        """Read what the client tells: the id of an event in such a stream; anything else tells no place."""
        found = parse_qsl(told[len(LISTENING) :]) if told.startswith(LISTENING) else ()
        self.by_server = {server: event_id for server, event_id in found if server in servers}

    def moved(self, event: bytes, server: str) -> bytes:
        """Return an event as the client may see it, with the place of all servers as its id if it has one."""

        def moved_to(event_id: bytes) -> bytes:
            self.by_server.pop(server, None)
            self.by_server[server] = event_id.decode(errors="replace")
            return self._shown()

        return shown(event, server, moved_to)

    def _shown(self) -> bytes:
        while len(text := urlencode(self.by_server)) > PLACES_BYTES_MAX:  # the oldest goes: it hears what comes
            del self.by_server[next(iter(self.by_server))]
        return f"{LISTENING}{text}".encode()


async def merged(
    request: web.Request, sources: Sequence[Source], places: Places, closing: asyncio.Event
) -> web.StreamResponse:
    """Pass on what all sources say until one of them ends, or is `closing`. What breaks off ends visibly broken."""
    out = web.StreamResponse(headers=sources[0].told.headers)
    await out.prepare(request)
    following: list[asyncio.Future[object]] = [
        asyncio.ensure_future(_follow(source, places, out)) for source in sources
    ]
    following.append(asyncio.ensure_future(closing.wait()))
    try:
        if sources[0].acknowledged:
            await out.write(b"event: message\ndata: %b\n\n" % encode(acknowledgement(sources)))
        ended, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
        for each in ended:
            each.result()
        await out.write_eof()
    except (aiohttp.ClientError, ConnectionError):
        break_off(request)
    finally:
        await end_all(following)
    return out


async def _follow(source: Source, places: Places, out: web.StreamResponse) -> None:
    while event := await source.next_event():
        await out.write(places.moved(event, source.server))  # in one piece, also while another one waits to write


# -- subscriptions ------------------------------------------------------------------------------------------------


def shared_out(params: Fields, servers: Iterable[str]) -> dict[str, Fields]:
    """Return the params for each server that a subscription concerns: all for lists, its own for resources."""
    wished = object_of(params, "notifications")
    lists = {name: value for name, value in wished.items() if name != URIS}
    parts: dict[str, Fields] = {}
    for server in servers:
        uris = [uri for each in texts_of(wished, URIS) if (uri := split(each, URI_MARK, (server,))[1])]
        if part := lists | ({URIS: raw(uris)} if uris else {}):
            parts[server] = params | {"notifications": raw(part)}
    return parts


def acknowledgement(sources: Sequence[Source]) -> Fields:
    """Return the one message that says what any of the servers will tell of."""
    granted: Fields = {}
    uris: list[str] = []
    for source in sources:
        part = object_of(object_of(source.acknowledged, "params"), "notifications")
        uris += [shown_uri(source.server, uri) for uri in texts_of(part, URIS)]
        granted |= {name: value for name, value in part.items() if name not in granted or bytes(value) == b"true"}
    if URIS in granted:
        granted[URIS] = raw(uris)
    first = sources[0].acknowledged
    return first | {"params": raw(object_of(first, "params") | {"notifications": raw(granted)})}
