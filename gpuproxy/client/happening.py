"""Events over ``/ws`` as an endless sequence that outlives connections: each break is followed by a resumption.

It goes on from the last event that came, or from what the gateway said when it began, if none has come yet.
"""

import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from gpuproxy.client.calls import RETRIES, WAIT_S, WAIT_S_MAX
from gpuproxy.client.errors import failed, no_answer

HEARTBEAT_S = 30.0
SEEN_MAX = 1_024  # an event that comes again after a resumption is passed over
STATUS_BY_CODE = {
    "INVALID_JSON": 400, "UNAUTHORIZED": 401, "FORBIDDEN": 403, "UNKNOWN_CHANNEL": 404, "UNPROCESSABLE": 422
}  # fmt: skip
PASSING = (408, 425, 429)  # what else is below 500 another attempt would meet again

logger = logging.getLogger(__name__)
Sleep = Callable[[float], Awaitable[None]]


def socket_url(api_url: str) -> str:
    """Return where ``/ws`` is: beside the API, not below it."""
    parts = urlsplit(api_url)
    path = parts.path.rstrip("/").removesuffix("/api/v1") + "/ws"
    return parts._replace(scheme="wss" if parts.scheme == "https" else "ws", path=path).geturl()


async def happening(
    session: Callable[[], aiohttp.ClientSession],
    api_url: str,
    channels: tuple[str, ...],
    last_event_id: str,
    sleep: Sleep,
) -> AsyncGenerator[dict[str, Any]]:
    """Yield events. `session` is called in the running loop, which there need not be before.

    Raises GpuproxyError for a credential or a channel that is refused, and for a gateway that was never reached.
    """
    seen: deque[str] = deque(maxlen=SEEN_MAX)
    breaks, was_reached = 0, False
    while True:
        try:
            async with session().ws_connect(socket_url(api_url), heartbeat=HEARTBEAT_S) as socket:
                was_reached = True
                await socket.send_json({"type": "subscribe", "channels": channels, "last_event_id": last_event_id})
                async for told in _told(socket):
                    if told["type"] == "subscribed":
                        last_event_id = told["payload"].get("last_event_id", last_event_id)
                    elif told["id"] not in seen:
                        breaks = 0
                        seen.append(told["id"])
                        last_event_id = told["id"]
                        yield told
        except aiohttp.WSServerHandshakeError as error:
            is_passing = error.status >= 500 or error.status in PASSING
            if not is_passing or (breaks >= RETRIES and not was_reached):
                raise failed(f"{socket_url(api_url)} answered {error.status}", "REFUSED", error.status) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            if breaks >= RETRIES and not was_reached:
                raise no_answer(error, isinstance(error, TimeoutError)) from error
        await sleep(min(WAIT_S_MAX, WAIT_S * 2**breaks) * random.uniform(0.5, 1))  # noqa: S311 (jitter, no secret)
        breaks = min(breaks + 1, 8)


async def _told(socket: aiohttp.ClientWebSocketResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield events and what was said when they began; end where only another connection helps."""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            return
        told: dict[str, Any] = msgspec.json.decode(message.data)
        if told["type"] == "error":
            if _is_broken(told["payload"]):
                return
        elif "id" in told or told["type"] == "subscribed":
            yield told


def _is_broken(payload: Mapping[str, str]) -> bool:
    """Tell whether an error is over with another connection. Raises GpuproxyError for one that is not."""
    code, error = payload["code"], payload["error"]
    if code == "NOT_FOUND":
        logger.warning("events may have been missed: %s", error)
    elif code != "UNAVAILABLE":  # of the store: what was missed is not sent, so nothing else may come before it
        raise failed(error, code, STATUS_BY_CODE.get(code, 0))
    return code == "UNAVAILABLE"
