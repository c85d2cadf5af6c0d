"""``/ws``: what happens, as it happens, to who subscribes to channels; and the ticket that opens it for browsers."""

import asyncio
from contextlib import suppress
from datetime import datetime
from functools import partial

from aiohttp import WSCloseCode, WSMsgType, web
from msgspec import Struct
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.callers import invalid_credentials
from gpuproxy.access.tickets import issue_ticket
from gpuproxy.control.listener import Listener
from gpuproxy.control.parts import CALLER, CONFIG, LISTENERS, SOCKETS, STORE, USAGE_WANTED
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.rounds import rounds

HEARTBEAT_S = 30.0  # half of what common load balancers leave an idle connection
MESSAGE_BYTES_MAX = 65_536
WATCH_S = 2.0  # between two looks whether credentials are still good; 5 s is the promise

logger = get_logger(__name__)


class Ticket(Struct):
    """Opens ``/ws?ticket=…`` once, until it expires."""

    ticket: str
    expires_at: datetime


async def make_ticket(request: web.Request) -> web.Response:
    """Make a ticket that opens the WebSocket once within 30 seconds, for who can send no header."""
    async with request.app[STORE].writing() as connection:
        return success(await _ticket(connection, request), 201)


async def _ticket(connection: AsyncConnection, request: web.Request) -> Ticket:
    return Ticket(*await issue_ticket(connection, request[CALLER]))


async def events(request: web.Request) -> web.StreamResponse:
    """Serve events over a WebSocket until the client leaves or the gateway stops."""
    app = request.app
    if len(app[LISTENERS]) >= app[CONFIG].events.sockets_max:
        raise GatewayError("UNAVAILABLE", f"all {len(app[LISTENERS])} places at /ws are taken", retry_after_s=5)
    # No deflate: it costs 90 kB for each client.
    socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MESSAGE_BYTES_MAX, compress=False)
    listener = Listener(app, socket)
    if "X-API-Key" in request.headers or "Authorization" in request.headers:
        await listener.identify_request(request)
    else:
        await listener.identify_cookie(request)
    await socket.prepare(request)
    app[SOCKETS].add(socket)
    app[LISTENERS].add(listener)
    try:
        if ticket := request.query.get("ticket"):
            await listener.show_credential(ticket)
        await _listen(socket, listener)
    finally:
        app[LISTENERS].discard(listener)
        await listener.leave()
    return socket


async def _listen(socket: web.WebSocketResponse, listener: Listener) -> None:
    async for message in socket:
        if message.type is not WSMsgType.TEXT:
            await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"send JSON as text")
            return
        with suppress(ConnectionError):  # it has left; the loop will hear of it
            await listener.hear(message.data)


async def watch(app: web.Application, stopping: asyncio.Event) -> None:
    """Take from listeners what their credential no longer opens, until `stopping` is set."""
    complain = partial(logger.error, "credentials of listeners cannot be checked, they go on")
    await rounds(partial(watch_once, app), WATCH_S, stopping, complain)


async def watch_once(app: web.Application) -> None:
    """Look once whether all credentials are still good, and whose use of models is to be told."""
    await app[USAGE_WANTED].note(user_id for listener in app[LISTENERS] for user_id in listener.wants_usage_of)
    holders = [(listener, listener.holder) for listener in app[LISTENERS] if listener.holder is not None]
    if not holders:
        return
    key_ids = {holder.key_id for _, holder in holders if holder.key_id}
    session_ids = {holder.session_id for _, holder in holders if holder.session_id}
    keys, sessions = await invalid_credentials(app[STORE], key_ids, session_ids)
    for listener, holder in holders:
        if holder.key_id in keys or holder.session_id in sessions:
            listener.revoke()


async def close_all(app: web.Application) -> None:
    """Tell every client that the gateway goes away."""
    closing = [socket.close(code=WSCloseCode.GOING_AWAY, message=b"the gateway is stopping") for socket in app[SOCKETS]]
    await asyncio.gather(*closing, return_exceptions=True)
