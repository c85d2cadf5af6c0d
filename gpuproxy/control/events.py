"""``/ws``: what happens, as it happens, to who subscribes to channels; and the ticket that opens it for browsers."""

import asyncio
import time
from contextlib import suppress
from datetime import datetime
from functools import partial

from aiohttp import web
from msgspec import Struct
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.callers import invalid_credentials
from gpuproxy.access.tickets import issue_ticket
from gpuproxy.codec.websocket import GOING_AWAY
from gpuproxy.control.listener import Listener
from gpuproxy.control.parts import CALLER, CONFIG, LISTENERS, STORE, USAGE_WANTED
from gpuproxy.control.respond import success
from gpuproxy.control.web_socket import CLOSE_S, check_handshake
from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.rounds import pause, rounds

HEARTBEAT_S = 30.0  # half of what common load balancers leave an idle connection
QUERY = {"ticket": "of POST /api/v1/ws/ticket, for who can send no header"}
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
    head, listener = check_handshake(request), Listener(app)
    if "X-API-Key" in request.headers or "Authorization" in request.headers:
        await listener.identify_request(request)
    else:
        await listener.identify_cookie(request)
    if listener.accept(request, head):
        listener.begin(request.query.get("ticket", ""))
    else:
        listener.leave()
    return web.Response(status=101)  # goes nowhere: the connection is aiohttp's no more


async def watch(app: web.Application, stopping: asyncio.Event) -> None:
    """Take from listeners what their credential no longer opens, and ask who lives, until `stopping` is set."""
    complain = partial(logger.error, "credentials of listeners cannot be checked, they go on")
    async with asyncio.TaskGroup() as group:
        group.create_task(rounds(partial(watch_once, app), WATCH_S, stopping, complain))
        group.create_task(_beat_on(app, stopping))


async def _beat_on(app: web.Application, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        await pause(HEARTBEAT_S, stopping)
        beat(app)


async def watch_once(app: web.Application) -> None:
    """Look once whether all credentials are still good, and whose use of models is to be told."""
    now_s = time.time()
    for listener in (*app[LISTENERS],):
        if listener.holder is not None and 0 < listener.holder.until_s <= now_s:
            listener.revoke()
    await app[USAGE_WANTED].note(user_id for listener in app[LISTENERS] for user_id in listener.wants_usage_of)
    holders = [(listener, listener.holder) for listener in app[LISTENERS] if listener.holder is not None]
    if not holders:
        return
    key_ids = {holder.key_id for _, holder in holders if holder.key_id}
    session_ids = {holder.session_id for _, holder in holders if holder.session_id}
    keys, sessions = await invalid_credentials(app[STORE], key_ids, session_ids)
    for listener, holder in holders:
        is_shown = listener.holder is holder  # or it has shown another meanwhile
        if is_shown and (holder.key_id in keys or holder.session_id in sessions):
            listener.revoke()


def beat(app: web.Application) -> None:
    """Ask all clients whether they live, and end those that did not answer the last time."""
    for listener in (*app[LISTENERS],):
        listener.socket.beat()


async def close_all(app: web.Application) -> None:
    """Tell every client that the gateway goes away, and wait until they have left."""
    for listener in (*app[LISTENERS],):
        listener.socket.close(GOING_AWAY, "the gateway is stopping")
    with suppress(TimeoutError):
        async with asyncio.timeout(2 * CLOSE_S):  # each has its bound
            await asyncio.gather(*(listener.socket.closed() for listener in (*app[LISTENERS],)))
