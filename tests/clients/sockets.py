"""The WebSockets of a model server, on aiohttp: ``/v1/realtime`` and the WebSocket mode of ``/v1/responses``.

A session echoes what it is told, a word an event, and counts words as tokens.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import WSMsgType, web

Json = dict[str, Any]
Answer = Callable[[web.WebSocketResponse, Json], Awaitable[None]]


async def realtime(request: web.Request) -> web.WebSocketResponse:
    """Serve a Realtime session."""
    heard: list[str] = []

    async def answer(socket: web.WebSocketResponse, event: Json) -> None:
        if event["type"] == "conversation.item.create":
            heard.append(event["item"]["content"][0]["text"])
        elif event["type"] == "response.create":
            words = f"echo: {heard[-1]}".split()
            usage = usage_of(sum(len(text.split()) for text in heard), len(words))
            await tell(socket, "response.created", response={"id": "resp_1", "object": "realtime.response"})
            for word in words:
                await tell(socket, "response.output_text.delta", delta=word, response_id="resp_1")
            done = {"id": "resp_1", "object": "realtime.response", "status": "completed", "usage": usage}
            await tell(socket, "response.done", response=done)

    return await serve(request, answer, {"id": "sess_1", "model": request.query["model"], "type": "realtime"})


async def responses(request: web.Request) -> web.WebSocketResponse:
    """Serve the Responses API."""

    async def answer(socket: web.WebSocketResponse, event: Json) -> None:
        words = f"echo: {event['input']}".split()
        usage = {**usage_of(len(event["input"].split()), len(words)), "input_tokens_details": {"cached_tokens": 1}}
        for word in words:
            await tell(socket, "response.output_text.delta", delta=word)
        done = {"id": "resp_1", "object": "response", "model": event["model"], "output": [], "usage": usage}
        await tell(socket, "response.completed", response=done)

    return await serve(request, answer)


async def serve(request: web.Request, answer: Answer, session: Json | None = None) -> web.WebSocketResponse:
    """Speak WebSocket until the client leaves."""
    socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=0)
    await socket.prepare(request)
    if session is not None:
        await tell(socket, "session.created", session=session)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await answer(socket, json.loads(message.data))
    return socket


async def tell(socket: web.WebSocketResponse, kind: str, **fields: Any) -> None:
    """Send one event."""
    await socket.send_str(json.dumps({"type": kind, "event_id": "event_1", **fields}))


def usage_of(asked: int, said: int) -> Json:
    """Return a usage object, one input token of it cached."""
    counts = {"input_tokens": asked, "output_tokens": said, "total_tokens": asked + said}
    return {**counts, "input_token_details": {"cached_tokens": 1}}
