"""``/ws``: subscriptions to event channels. None is published yet, so every subscription is told so."""

from typing import Annotated, Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web
from msgspec import Meta, Struct

from gpuproxy.control.parts import SOCKETS

HEARTBEAT_S = 30.0  # half of what common load balancers leave an idle connection
MESSAGE_BYTES_MAX = 65_536
CHANNELS_MAX = 32  # in one message: each is answered, and nobody needs a key here
SHOWN_CHARACTERS = 60


class Message(Struct):
    """What a client sends: ``subscribe`` with channels, or ``ping``."""

    type: str
    channels: Annotated[tuple[str, ...], Meta(max_length=CHANNELS_MAX)] = ()


_decode = msgspec.json.Decoder(Message).decode
_encode = msgspec.json.Encoder().encode


async def events(request: web.Request) -> web.StreamResponse:
    """Serve events over a WebSocket until the client leaves or the gateway stops."""
    socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MESSAGE_BYTES_MAX)
    await socket.prepare(request)
    request.app[SOCKETS].add(socket)
    async for message in socket:
        if message.type is not WSMsgType.TEXT:
            await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"send JSON as text")
            break
        for reply in replies(message.data):
            await socket.send_str(_encode(reply).decode())
    return socket


def replies(text: str) -> list[dict[str, Any]]:
    """Return what to answer to one message."""
    try:
        message = _decode(text)
    except msgspec.MsgspecError as error:
        return [_error("INVALID_JSON", str(error))]
    if message.type == "ping":
        return [{"type": "pong", "payload": {}}]
    if message.type == "subscribe":
        return [_error("UNKNOWN_CHANNEL", f"no channel {_shown(name)}; none is published") for name in message.channels]
    return [_error("UNPROCESSABLE", f"no message type {_shown(message.type)}; known: ping, subscribe")]


def _shown(text: str) -> str:
    return repr(text[:SHOWN_CHARACTERS])


def _error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "payload": {"code": code, "error": message}}


async def close_all(app: web.Application) -> None:
    """Tell every client that the gateway goes away."""
    sockets = app[SOCKETS]
    for socket in list(sockets):
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the gateway is stopping")
