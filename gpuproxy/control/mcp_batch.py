"""Several messages to a group in one call (revision 2025-03-26): each is answered as if it had come alone.

All answers go into one stream, so that progress and questions of servers pass while other messages are at work. Its
events have no ids: no server could resume a stream that holds what others said.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from aiohttp import web

from gpuproxy.codec.events import EventCutter
from gpuproxy.codec.mcp import UNREADABLE, Fields, decode_fields, encode, raw, response_in
from gpuproxy.codec.sse import event_payloads
from gpuproxy.control.mcp_answers import RpcError, accepted
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX
from gpuproxy.control.mcp_names import decode_list, outward
from gpuproxy.control.mcp_relay import EVENTS, end_all
from gpuproxy.control.streams import break_off
from gpuproxy.observe.logs import get_logger

BATCHES_UNTIL = "2025-03-26"  # the revision that has them; the next one forbids them
MESSAGES_MAX = 32  # of one batch: each is a call, or one to every server
FINAL = (401, 404)  # no key, or no session any more: holds for all messages, and clients act on the status

Say = Callable[[bytes], Awaitable[None]]
Answer = Callable[[Fields, Say], Awaitable[web.StreamResponse]]

logger = get_logger(__name__)


def messages_in(body: bytes) -> list[Fields]:
    """Return the messages of a batch. Raises RpcError for what is none, holds none, or too many."""
    try:
        messages = [decode_fields(each) for each in decode_list(body)]
    except UNREADABLE:
        raise RpcError(400, -32700, "the body is no JSON array of objects") from None
    if not 0 < len(messages) <= MESSAGES_MAX:
        raise RpcError(400, -32600, f"a batch holds 1 to {MESSAGES_MAX} messages, not {len(messages)}")
    return messages


async def answered_together(request: web.Request, messages: Sequence[Fields], answer: Answer) -> web.StreamResponse:
    """Return the answers to all messages as a stream; a refusal that holds for all, if it comes first, stands alone."""
    told: asyncio.Queue[tuple[Fields, bytes | web.StreamResponse]] = asyncio.Queue(maxsize=1)

    async def work(message: Fields) -> None:
        said: web.StreamResponse = web.Response(status=500)
        try:
            said = await answer(message, lambda payload: told.put((message, payload)))
        except Exception:
            logger.exception("a message of a batch failed")
        await told.put((message, said))

    working = [asyncio.ensure_future(work(message)) for message in messages]
    out = web.StreamResponse(headers={"Content-Type": EVENTS, "Cache-Control": "no-cache, no-transform"})
    open_count = len(messages)
    try:
        while open_count:
            message, said = await told.get()
            if isinstance(said, web.StreamResponse):
                open_count -= 1
                if said.status in FINAL and not out.prepared:
                    return said
                said = _response_to(message, said)
            if said:
                if not out.prepared:
                    await out.prepare(request)
                await out.write(b"event: message\ndata: %b\n\n" % said.replace(b"\r", b" ").replace(b"\n", b" "))
    except ConnectionError:  # the client has left
        break_off(request)
    finally:
        await end_all(working)
    return out if out.prepared else accepted()


def _response_to(message: Fields, answer: web.StreamResponse) -> bytes:
    """Return the JSON-RPC response to a message, empty if it wants none."""
    if "method" not in message or "id" not in message:
        return b""
    body = answer.body if isinstance(answer, web.Response) else None
    response = response_in(body) if isinstance(body, bytes) else None
    if response is None:
        fault = f"the server answered {answer.status}, without a JSON-RPC response"
        response = {"jsonrpc": raw("2.0"), "error": raw({"code": -32603, "message": fault})}
    return encode(response | {"id": message["id"]})


async def spoken(response: aiohttp.ClientResponse, server: str, say: Say) -> web.Response:
    """Say what comes on a server's stream before the response, and return that. Raises aiohttp.ClientError."""
    cutter = EventCutter()
    async for data in response.content.iter_any():
        for event in cutter.feed(data):
            for payload in event_payloads(event):
                shown = outward(payload, server)
                if response_in(payload) is not None:
                    return web.Response(body=shown, content_type="application/json")
                await say(shown)
        if cutter.held_bytes > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError(f"an event of over {ANSWER_BYTES_MAX} bytes")
    return web.Response(status=response.status)
