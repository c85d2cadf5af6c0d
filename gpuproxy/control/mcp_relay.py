"""One server's answer on its way to the client of a group, event by event as it comes.

Ids of events carry their server, so that a stream can be resumed at it. A client that leaves stops the call: nothing
tells a handler of aiohttp so while it waits, so it looks for itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import aiohttp
from aiohttp import web

from gpuproxy.codec.events import EventCutter, with_data, with_lines
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX, passed_fields, read_bounded
from gpuproxy.control.mcp_names import MARK, outward
from gpuproxy.control.streams import break_off

LOOK_S = 0.25  # between two looks whether the client is still there
EVENTS = "text/event-stream"


class EventRelabeller:
    """Gives events and the requests in them ids that name their server; an event over the bound passes as it is."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._cutter = EventCutter()
        self._is_passing = False

    def edit(self, data: bytes, is_last: bool = False) -> bytes:
        """Return what may be sent: whole events."""
        cutter = self._cutter
        out = b"".join(map(self._edited, cutter.feed(data)))
        if is_last:
            return out + self._edited(cutter.spill())
        if self._is_passing or cutter.held_bytes > ANSWER_BYTES_MAX:
            self._is_passing = True
            return out + cutter.spill()
        return out

    def _edited(self, event: bytes) -> bytes:
        was_passing, self._is_passing = self._is_passing, False
        return event if was_passing else named(event, self._server)


def named(event: bytes, server: str) -> bytes:
    """Return an event whose id and whose message name their server."""
    return shown(event, server, lambda event_id: f"{server}{MARK}".encode() + event_id)


def shown(event: bytes, server: str, id_of: Callable[[bytes], bytes]) -> bytes:
    """Return an event whose message names its server; `id_of` makes its id, if it has one, from the server's."""

    def identified(line: bytes) -> bytes:
        if not line.startswith(b"id:") or not (event_id := line[3:].removeprefix(b" ")):
            return line
        return b"id: " + id_of(event_id)

    return with_lines(with_data(event, lambda payload: outward(payload, server)), identified)


async def relay(request: web.Request, response: aiohttp.ClientResponse, server: str) -> web.StreamResponse:
    """Pass an answer on. What breaks off ends visibly broken."""
    if response.content_type != EVENTS:
        body = await read_bounded(response.content, ANSWER_BYTES_MAX)
        if response.content_type == "application/json":
            body = outward(body, server)
        return web.Response(status=response.status, headers=passed_fields(response), body=body)
    out = web.StreamResponse(status=response.status, headers=passed_fields(response))
    await out.prepare(request)
    relabeller = EventRelabeller(server)
    try:
        async for data in response.content.iter_any():
            if edited := relabeller.edit(data):
                await out.write(edited)
        await out.write(relabeller.edit(b"", is_last=True))
        await out.write_eof()
    except (aiohttp.ClientError, ConnectionError):
        break_off(request)
    return out


async def end_all(working: Collection[asyncio.Future[Any]]) -> None:
    """Cancel what works for a client, and wait until it has ended."""
    for each in working:
        each.cancel()
    await asyncio.gather(*working, return_exceptions=True)


async def while_there(request: web.Request, work: Awaitable[web.StreamResponse]) -> web.StreamResponse:
    """Return what the work gives; end it when the client leaves."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else web.Response(status=499)
    finally:
        await end_all((working, leaving))


async def _left(request: web.Request) -> None:
    while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 - see above
        await asyncio.sleep(LOOK_S)
