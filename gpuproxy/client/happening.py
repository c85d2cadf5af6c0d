"""Events over ``/ws`` as an endless sequence that outlives connections: each break is followed by a resumption."""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from gpuproxy.client.calls import WAIT_S, WAIT_S_MAX
from gpuproxy.client.errors import failed

HEARTBEAT_S = 30.0
SEEN_MAX = 1_024  # an event that comes again after a resumption is passed over
STATUS_BY_CODE = {"UNAUTHORIZED": 401, "FORBIDDEN": 403, "UNKNOWN_CHANNEL": 404, "UNAVAILABLE": 503}
IGNORED = ("NOT_FOUND",)  # the last event is kept no more: go on with what happens now
LASTING = (400, 401, 403, 404)  # a refusal that another attempt would meet again

Sleep = Callable[[float], Awaitable[None]]


def socket_url(api_url: str) -> str:
    """Return where ``/ws`` is: beside the API, not below it."""
    parts = urlsplit(api_url)
    path = parts.path.rstrip("/").removesuffix("/api/v1") + "/ws"
    return parts._replace(scheme="wss" if parts.scheme == "https" else "ws", path=path).geturl()


async def happening(
    http: aiohttp.ClientSession, api_url: str, channels: tuple[str, ...], last_event_id: str, sleep: Sleep
) -> AsyncGenerator[dict[str, Any]]:
    """Yield events. Raises GpuproxyError for a credential or a channel that is refused."""
    seen: deque[str] = deque(maxlen=SEEN_MAX)
    breaks = 0
    while True:
        try:
            async with http.ws_connect(socket_url(api_url), heartbeat=HEARTBEAT_S) as socket:
                await socket.send_json({"type": "subscribe", "channels": channels, "last_event_id": last_event_id})
                async for event in _told(socket):
                    breaks = 0
                    if event["id"] not in seen:
                        seen.append(event["id"])
                        last_event_id = event["id"]
                        yield event
        except aiohttp.WSServerHandshakeError as error:
            if error.status in LASTING:
                raise failed(f"/ws answered {error.status}", "REFUSED", error.status) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            pass
        await sleep(min(WAIT_S_MAX, WAIT_S * 2**breaks))
        breaks = min(breaks + 1, 8)


async def _told(socket: aiohttp.ClientWebSocketResponse) -> AsyncIterator[dict[str, Any]]:
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            return
        told: dict[str, Any] = msgspec.json.decode(message.data)
        if told["type"] == "error":
            _raise_unless_passing(told["payload"])
        elif "id" in told:
            yield told


def _raise_unless_passing(payload: Mapping[str, str]) -> None:
    code = payload["code"]
    if code not in IGNORED and code != "UNAVAILABLE":
        raise failed(payload["error"], code, STATUS_BY_CODE.get(code, 0))
