"""A WebSocket of a client, as cheap as one can be that only listens: no task, no timer, no parser of HTTP.

aiohttp accepts the request and is then told that its connection is lost; the transport gets this protocol instead. With
aiohttp's own WebSocket each client costs 21 kB, with this 3 (`python benchmarks/listeners.py`), and there may be
thousands. Heartbeats are one sweep over all of them, see `beat`.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol

from aiohttp import web

from gpuproxy.codec.websocket import BINARY, POLICY_VIOLATION, TEXT, close_frame
from gpuproxy.control.frames import (
    CLOSE,
    INVALID_TEXT,
    NORMAL,
    PING,
    PONG,
    UNSUPPORTED,
    FrameError,
    FrameReader,
    Message,
    answering_code,
    frame,
    upgrade,
)
from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger

CLOSE_S = 5.0  # for a client to answer that it closes, and to take what was sent before
PINGS_MAX = 600  # between two heartbeats: each is answered

logger = get_logger(__name__)


class Owner(Protocol):
    """Who has a socket."""

    def hear(self, text: str) -> Coroutine[Any, Any, None]:
        """Do what a message says; the next one comes when this is done."""

    def go_on(self) -> None:
        """Write on: the client has read."""

    def leave(self) -> None:
        """Forget the client, which has left. Again does nothing."""


class WebSocket(asyncio.Protocol):
    """One connection. Texts are written at once; see `is_writable` before writing much."""

    __slots__ = (
        "_drained", "_inbox", "_is_busy", "_is_lost", "_lost", "_ping_count", "_reader", "_transport", "is_closing",
        "is_quiet", "is_writable", "owner",
    )  # fmt: skip

    def __init__(self, owner: Owner, transport: asyncio.Transport) -> None:
        self.owner = owner
        self.is_writable = True
        self.is_closing = False
        self.is_quiet = False  # since the last heartbeat
        self._transport = transport
        self._reader = FrameReader()
        self._inbox: deque[str] | None = None
        self._is_busy = True
        self._ping_count = 0
        self._drained: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._is_lost = False

    def begin(self, first: Coroutine[Any, Any, None] | None) -> None:
        """Do what is first, then let messages be heard."""
        if first is not None:
            self._do(first)
        else:
            self._is_busy = False
            self._next()

    def send(self, text: str) -> None:
        """Write a text; nothing to one that is being closed."""
        if not self.is_closing:
            self._transport.write(frame(TEXT, text.encode()))

    async def drain(self) -> None:
        """Wait until the client has read enough. Raises ConnectionResetError if it has left."""
        if not self.is_writable and not self.is_closing:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        if self.is_closing:
            raise ConnectionResetError("the client is gone")

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Say goodbye; the connection ends when the client answers, or after CLOSE_S. Again does nothing."""
        if not self.is_closing:
            self._say_goodbye(close_frame(code, reason))
            self._read_on()  # for its answer

    def _say_goodbye(self, frame: bytes) -> None:
        self.is_closing = True
        self._inbox = None
        self._wake()
        self._transport.write(frame)
        asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)

    async def closed(self) -> None:
        """Wait until the connection has ended."""
        if not self._is_lost:
            self._lost = self._lost or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._lost)

    def beat(self) -> None:
        """Ask a client that said nothing since the last time whether it lives; end one that did not answer."""
        if self.is_quiet and not self.is_closing:
            logger.debug("a client of /ws does not answer")
            self._transport.abort()
        elif not self.is_closing:
            self.is_quiet = True
            self._ping_count = 0
            self._transport.write(frame(PING, b""))

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        self.is_quiet = False
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except FrameError as error:
            self.close(error.code, str(error))
        self._next()

    def _take(self, message: Message) -> None:
        if message.opcode == CLOSE:
            self._answer_close(message.data)
        elif self.is_closing or message.opcode == PONG:
            return
        elif message.opcode == PING:
            self._ping_count += 1
            if self._ping_count > PINGS_MAX:
                raise FrameError(POLICY_VIOLATION, "too many pings")
            self._transport.write(frame(PONG, message.data))
        elif message.opcode == BINARY:
            raise FrameError(UNSUPPORTED, "send JSON as text")
        else:
            try:
                text = message.data.decode()
            except UnicodeDecodeError:
                raise FrameError(INVALID_TEXT, "the text is not UTF-8") from None
            self._inbox = self._inbox or deque()
            self._inbox.append(text)

    def _answer_close(self, data: bytes) -> None:
        if not self.is_closing:
            self._say_goodbye(close_frame(answering_code(data)))
        self._transport.close()

    def _next(self) -> None:
        """Hand over the message that waits longest; read no more until it is done, nor before its answers are read."""
        if self._is_busy or not self._inbox or self.is_closing or not self.is_writable:
            return
        text = self._inbox.popleft()
        if not self._inbox:
            self._inbox = None
        self._do(self.owner.hear(text))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        self._is_busy = True
        if not self._transport.is_closing():
            self._transport.pause_reading()
        asyncio.get_running_loop().create_task(work).add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ConnectionError):
            logger.error("a message at /ws failed", error=f"{type(error).__name__}")
        self._is_busy = False
        if self._is_lost:
            self.owner.leave()  # again: the message was at work when the client left
        self._next()
        if not self._is_busy:
            self._read_on()

    def _read_on(self) -> None:
        if (self.is_writable or self.is_closing) and not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Hear no more from a client that does not read: what it says would be answered into memory."""
        self.is_writable = False
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Write on: the client has read, so it lives, though its answer to a heartbeat may stand behind much else."""
        self.is_writable = True
        self.is_quiet = False
        self._wake()
        self.owner.go_on()
        self._next()
        if not self._is_busy:
            self._read_on()

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the owner forget it."""
        self.is_closing = self._is_lost = True
        self._inbox = None
        self._wake()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        self.owner.leave()


def check_handshake(request: web.Request) -> bytes:
    """Return the head that accepts a request for a WebSocket. Raises GatewayError BAD_REQUEST, UPGRADE_REQUIRED."""
    headers = request.headers
    tokens = {token.strip().lower() for token in headers.get("Connection", "").split(",")}
    if headers.get("Upgrade", "").strip().lower() != "websocket" or "upgrade" not in tokens:
        raise GatewayError("BAD_REQUEST", "/ws speaks WebSocket only; send Upgrade: websocket, Connection: Upgrade")
    return upgrade(headers.get("Sec-WebSocket-Version", ""), headers.get("Sec-WebSocket-Key", ""))


def take_over(request: web.Request, head: bytes, owner: Owner) -> WebSocket | None:
    """Accept: take the connection of a request from aiohttp; None if it has gone. It waits for `WebSocket.begin`."""
    transport, served = request.transport, request.protocol
    if transport is None or transport.is_closing():
        return None
    socket = WebSocket(owner, transport)
    transport.write(head)
    early = served._message_tail  # what came with the request; clients should wait for the answer, RFC 6455 §4.1
    transport.set_protocol(socket)
    served.transport = None  # or it would close it
    served.connection_lost(None)  # for aiohttp this is its end
    if early:
        socket.data_received(early)
    return socket
