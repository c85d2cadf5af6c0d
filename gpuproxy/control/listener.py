"""One client of ``/ws``: what it says, what it may hear, what is written to it and how much may wait.

A client sends ``auth`` with a token, ``subscribe`` and ``unsubscribe`` with channels, ``ping``. It gets events as
``{type, payload, id, timestamp}``; answers and errors have no id. Subscribing with ``last_event_id`` brings what
happened since; ``subscribed`` names one for who has heard nothing yet. Nothing but a full queue, a revoked credential
or noise closes it from this side.
"""

import time
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from gpuproxy.access.callers import Caller, invalid_credentials
from gpuproxy.access.tickets import PREFIX, Holder, redeem_ticket
from gpuproxy.codec.websocket import POLICY_VIOLATION, TRY_LATER
from gpuproxy.control.cookie import caller_by_cookie, is_trusted_page
from gpuproxy.control.identify import caller_of, identify
from gpuproxy.control.parts import CONFIG, HUB, LISTENERS, STORE, STREAM, USAGE_WANTED
from gpuproxy.control.wanting import USAGE_CHANNEL
from gpuproxy.control.web_socket import Owner, WebSocket, take_over
from gpuproxy.errors import GatewayError
from gpuproxy.events.catalogue import CHANNELS, EVENTS, PUBLIC_CHANNEL
from gpuproxy.events.hub import Consumer, text_of
from gpuproxy.events.stream import READ_MAX, Event, Mark, Place
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import fault_of

CHANNELS_MAX = 32  # in one message: each is answered
MESSAGES_PER_SECOND_MAX = 20
SHOWN_CHARACTERS = 60

logger = get_logger(__name__)


class Message(Struct):
    """What a client sends. `token` is an API key, an access token or a ticket."""

    type: str
    channels: Annotated[tuple[str, ...], Meta(max_length=CHANNELS_MAX)] = ()
    last_event_id: Annotated[str, Meta(max_length=64)] = ""
    token: Annotated[str, Meta(max_length=4_096)] = ""


_decode = msgspec.json.Decoder(Message).decode
_encode = msgspec.json.Encoder().encode


class Listener:
    """A connected client. `holder` says by which credential it hears what is private."""

    __slots__ = ("_app", "_consumer", "_count", "_is_held", "_second", "_socket", "holder")

    def __init__(self, app: web.Application) -> None:
        self.holder: Holder | None = None
        self._app = app
        self._socket: WebSocket | None = None
        self._consumer = Consumer(self)
        self._is_held = False  # while events of the past are sent
        self._second = 0
        self._count = 0

    def accept(self, request: web.Request, head: bytes) -> bool:
        """Take the connection of a request; False if it has gone. Nothing is heard before `begin`."""
        self._socket = take_over(request, head, self)
        if self._socket is not None:
            self._app[LISTENERS].add(self)
        return self._socket is not None

    def begin(self, ticket: str) -> None:
        """Listen to what the client says, after it has shown the ticket if there is one."""
        self.socket.begin(self._obey(Message("auth", token=ticket)) if ticket else None)

    @property
    def socket(self) -> WebSocket:
        """Return the connection; there is one once it was accepted."""
        assert self._socket is not None
        return self._socket

    async def identify_request(self, request: web.Request) -> None:
        """Take the credential of the request's header. Raises GatewayError, which refuses the connection."""
        self._accept(await identify(request))

    async def identify_cookie(self, request: web.Request) -> None:
        """Take the session cookie of a page that may use it, if there is one that is good."""
        if is_trusted_page(request) and (caller := await caller_by_cookie(request)) is not None:
            self._accept(caller)

    async def show_credential(self, token: str) -> None:
        """Take a key, an access token or a ticket, and say how that went."""
        try:
            if token.startswith(PREFIX):
                await self._accept_ticket(token)
            else:
                self._accept(await caller_of(self._app, token))
        except GatewayError as error:
            self._refuse(error.code, error.message)
        else:
            assert self.holder is not None
            self._say("authenticated", {"user_id": self.holder.user_id})

    def _accept(self, caller: Caller) -> None:
        if "read" not in caller.scopes and "account" not in caller.scopes:
            raise GatewayError("FORBIDDEN", "the key needs the scope 'read' to hear of its account")
        self._hold(Holder(caller.user_id, caller.key_id, caller.session_id, caller.token_until_s))

    async def _accept_ticket(self, ticket: str) -> None:
        holder = await redeem_ticket(self._app[STORE], ticket)
        if holder is None:
            raise GatewayError("UNAUTHORIZED", "the ticket is unknown, used or too old")
        keys, sessions = await invalid_credentials(
            self._app[STORE], [holder.key_id] * bool(holder.key_id), [holder.session_id] * bool(holder.session_id)
        )
        if keys or sessions:
            raise GatewayError("UNAUTHORIZED", "the credential behind the ticket is expired or revoked")
        self._hold(holder)

    def _hold(self, holder: Holder) -> None:
        self.holder = holder
        self._app[HUB].identify(self._consumer, holder.user_id)

    async def hear(self, text: str) -> None:
        """Do what a message says."""
        second = int(time.monotonic())
        self._count = self._count + 1 if second == self._second else 1
        self._second = second
        if self._count > MESSAGES_PER_SECOND_MAX:
            self.socket.close(POLICY_VIOLATION, "too many messages a second")
            return
        try:
            message = _decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            self._refuse("INVALID_JSON", str(error)[:200])
        else:
            await self._obey(message)

    async def _obey(self, message: Message) -> None:
        try:
            await self._do(message)
        except ConnectionError:
            raise
        except Exception as error:  # the store is away: the client may try again
            logger.error("message at /ws failed", type=message.type[:SHOWN_CHARACTERS], error=fault_of(error))
            self._refuse("UNAVAILABLE", "the store is away; try again")

    async def _do(self, message: Message) -> None:
        if message.type == "ping":
            self._say("pong", {})
        elif message.type == "auth":
            await self.show_credential(message.token)
        elif message.type == "subscribe":
            await self._subscribe(message)
        elif message.type == "unsubscribe":
            for channel in message.channels:
                self._app[HUB].unsubscribe(self._consumer, channel)
            self._say("unsubscribed", {"channels": message.channels})
        else:
            known = "auth, ping, subscribe, unsubscribe"
            self._refuse("UNPROCESSABLE", f"no message type {_shown(message.type)}; known: {known}")

    async def _subscribe(self, message: Message) -> None:
        accepted = []
        for channel in dict.fromkeys(message.channels):
            if channel not in CHANNELS:
                known = ", ".join(CHANNELS)
                self._refuse("UNKNOWN_CHANNEL", f"no channel {_shown(channel)}; known: {known}")
            elif not self._may_hear(channel):
                remedy = 'send {"type": "auth", "token": …}, X-API-Key or ?ticket='
                self._refuse("UNAUTHORIZED", f"{channel} is private; {remedy}")
            else:
                accepted.append(channel)
        if not message.channels:
            self._refuse("UNPROCESSABLE", f"channels: name at least one; known: {', '.join(CHANNELS)}")
        if not accepted:
            return
        place = await self._place_of(message.last_event_id)
        self._is_held, mark = True, self._app[STREAM].mark()
        for channel in accepted:
            self._app[HUB].subscribe(self._consumer, channel)
        try:
            if USAGE_CHANNEL in accepted:
                await self._app[USAGE_WANTED].note(self.wants_usage_of)
            await self._begin(accepted, message.last_event_id, place, mark)
        finally:
            self._is_held = False
            self.go_on()

    @property
    def wants_usage_of(self) -> list[str]:
        """Return whose use of models this client wants to hear of: one account, or none."""
        return [self.holder.user_id] if self.holder and USAGE_CHANNEL in self._consumer.channels else []

    def _may_hear(self, channel: str) -> bool:
        is_public = channel == PUBLIC_CHANNEL and self._app[CONFIG].events.gpu_updates_public
        return is_public or self.holder is not None

    async def _place_of(self, event_id: str) -> Place | None:
        """Return where the client's last event stands, None for none, and be no less far than it."""
        place = await self._app[STREAM].place_of(event_id, self._consumer.user_id) if event_id else None
        if place is not None:
            await self._app[STREAM].catch_up(place.seq)
        return place

    async def _begin(self, channels: list[str], event_id: str, place: Place | None, mark: Mark) -> None:
        """Say from where the client hears, and send what happened between its last event and `mark`."""
        stream, user_id = self._app[STREAM], self._consumer.user_id
        begins = event_id if place is not None else await stream.newest(mark, user_id)
        self._say("subscribed", {"channels": channels, "last_event_id": begins})
        if place is not None:
            await self._replay(place, mark, [name for name, kind in EVENTS.items() if kind.channel in channels])
        elif event_id:
            message = f"no event {_shown(event_id)} is kept; you hear of what happens from now on"
            self._refuse("NOT_FOUND", message)

    async def _replay(self, place: Place, mark: Mark, names: list[str]) -> None:
        """Send what was published after an event; what is published after `mark` waits meanwhile."""
        stream, user_id = self._app[STREAM], self._consumer.user_id
        await self._send(await stream.missed(place, mark, user_id, names))
        seq = place.seq
        while page := await stream.after(seq, mark, user_id, names):
            await self._send(page)
            seq = page[-1].seq
            if len(page) < READ_MAX:
                break

    async def _send(self, found: list[Event]) -> None:
        for event in found:
            self.socket.send(text_of(event))
            await self.socket.drain()

    def go_on(self) -> None:
        """Write what waits as far as the client reads, or cut off who reads too slowly."""
        consumer, socket = self._consumer, self.socket
        if consumer.is_over:
            socket.close(TRY_LATER, "read faster")
            return
        while not self._is_held and socket.is_writable and not socket.is_closing and consumer.queue:
            socket.send(consumer.pop())

    def revoke(self) -> None:
        """End the stream: its credential is good no more."""
        self._app[HUB].remove(self._consumer)
        self._consumer.clear()
        self.holder = None
        self._refuse("UNAUTHORIZED", "the credential has expired or was revoked")
        self.socket.close(POLICY_VIOLATION, "the credential was revoked")

    def leave(self) -> None:
        """Forget the client."""
        self._app[HUB].remove(self._consumer)
        self._app[LISTENERS].discard(self)

    def _refuse(self, code: str, message: str) -> None:
        self._say("error", {"code": code, "error": message})

    def _say(self, kind: str, payload: dict[str, Any]) -> None:
        self.socket.send(_encode({"type": kind, "payload": payload}).decode())


def _shown(text: str) -> str:
    return repr(text[:SHOWN_CHARACTERS])


_: type[Owner] = Listener
