"""One client connection: queues pipelined calls, answers them in order, closes so that answers arrive."""

import asyncio
import select
from collections import deque
from typing import TYPE_CHECKING, cast

from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.proxy import refusal
from gpuproxy.proxy.admit import Held
from gpuproxy.proxy.exchange import Exchange
from gpuproxy.proxy.exchange_state import DONE, READ_ANSWERS, READ_QUEUE, ExchangeState
from gpuproxy.proxy.headers import (
    join_fields,
)
from gpuproxy.proxy.heads import RequestHead
from gpuproxy.proxy.request_reader import RequestReader
from gpuproxy.proxy.tunnel import reset

if TYPE_CHECKING:
    from gpuproxy.proxy.worker import Plane

_log = get_logger("gpuproxy.downstream")

PIPELINED_MAX = 64  # calls of one connection that wait for their turn before it is read no more
PIPELINED_HARD_MAX = 1_024  # one read can bring more than that at once: refused


class Downstream(RequestReader):
    """A client connection. `current` is the exchange being answered, `receiving` the one whose body arrives."""

    __slots__ = (
        "_is_turning",
        "_turns_again",
        "_waiting",
        "_was_malformed",
        "credential",
        "held",
        "is_closing",
        "is_lingering",
        "is_write_blocked",
        "peer",
        "read_blocks",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, plane: "Plane") -> None:
        super().__init__(plane)
        self._waiting: deque[Exchange] = deque()
        self._is_turning = self._turns_again = False
        self._was_malformed = False
        self.read_blocks = 0
        self.is_closing = False
        self.is_lingering = False
        self.is_write_blocked = False
        self.held: Held | None = None  # what the last credential on this connection was worth
        self.credential = b""

    # -- the connection ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the client in, or turn it away when there are too many."""
        self.transport = cast(asyncio.Transport, transport)
        plane = self.plane
        if len(plane.downstreams) + len(plane.tunnels) >= plane.limits.connections_max:
            self.transport.abort()
            return
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else "unix"
        self.is_trusted = plane.is_trusted_proxy(self.peer)
        self.transport.set_write_buffer_limits(high=plane.limits.write_buffer_bytes)
        self.deadline_s = plane.now_s + plane.timeouts.head_s
        plane.downstreams.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone: stop what it asked for, at once."""
        self.is_closing = True
        self.plane.downstreams.discard(self)
        self.plane.unread.discard(self)
        current, self.current = self.current, None
        self._waiting.clear()
        if current is not None:
            current.client_left()

    def eof_received(self) -> bool:
        """A client that ends its side is gone (half-closing clients are not served; nginx does the same)."""
        if self.is_lingering or self.current is None:
            return False
        current, self.current = self.current, None
        current.client_left()
        self.transport.abort()
        return True

    def pause_writing(self) -> None:
        """The client takes no more: stop reading the upstream."""
        self.is_write_blocked = True
        if self.current is not None:
            self.current.pause_answer()
        else:
            self.block_reading(READ_ANSWERS)

    def resume_writing(self) -> None:
        """The client takes bytes again."""
        self.is_write_blocked = False
        self.unblock_reading(READ_ANSWERS)
        if self.current is None:
            return
        if self.current.state != DONE:
            self.current.resume_answer()
        elif self.current.is_received:
            self.next()

    def block_reading(self, reason: int) -> None:
        """Stop reading from the client for one more reason."""
        if not self.read_blocks and not self.is_closing:
            self.transport.pause_reading()
            self.plane.watch_unread(self)
        self.read_blocks |= reason

    def unblock_reading(self, reason: int) -> None:
        """Drop one reason; read on when it was the last."""
        if not self.read_blocks & reason:
            return
        self.read_blocks &= ~reason
        if not self.read_blocks and not self.is_closing:
            self.plane.unread.discard(self)
            self.transport.resume_reading()

    @property
    def is_fresh(self) -> bool:
        """Tell whether no request has come yet: a client may not know that it must ask elsewhere."""
        return self._head_count == 0 and self.current is None

    def is_reading_blocked(self, reason: int) -> bool:
        """Tell whether reading is stopped for this reason."""
        return bool(self.read_blocks & reason)

    def has_hung_up(self) -> bool:
        """Tell whether the client closed while we do not read from it (asked for paused connections only)."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def new_exchange(self, head: RequestHead, content_length: int) -> Exchange:
        """Make the exchange for a head."""
        return self.plane.exchange(self.plane, self, head, content_length)

    def admit(self, exchange: Exchange) -> None:
        """Start the exchange, or queue it behind the one being answered."""
        if self.current is None:
            self.current = exchange
            exchange.start()
        else:
            self._waiting.append(exchange)
            if len(self._waiting) >= PIPELINED_MAX:
                self.block_reading(READ_QUEUE)
                if len(self._waiting) > PIPELINED_HARD_MAX:
                    self._waiting.pop()
                    self._refuse_head("BAD_REQUEST", f"over {PIPELINED_HARD_MAX} calls wait on one connection")

    def refuse_malformed(self, error: GatewayError) -> None:
        """Refuse what cannot be parsed; calls before it are still answered, nothing behind it is read."""
        self._was_malformed = True
        self._is_deaf = True
        self._fault = error
        self._head_bytes = 0
        exchange, self.receiving = self.receiving, None
        if exchange is not None:  # the body of a call went wrong
            exchange.keeps_alive = False
            if exchange is self.current:
                exchange.refuse(error)
                if self.current is exchange:  # it was answered already
                    self.current = None
                    self.close_gently()
                return
            if exchange in self._waiting:
                self._waiting.remove(exchange)
        if self.current is None and not self.is_closing and not self.is_lingering:
            self._answer_malformed()

    def _answer_malformed(self) -> None:
        error = self._fault
        assert error is not None
        self.plane.outbox.write(self.transport, refusal.head_refusal(error, self.plane.new_id()))
        self.close_gently()

    # -- what exchanges ask for --------------------------------------------------------------------------

    def ended(self, exchange: ExchangeState, closes: bool) -> None:
        """The answer of the current exchange is written: go on with the next one, or close."""
        if self.current is not exchange:
            return
        if closes:
            self.current = None
            self._waiting.clear()
            self.close_gently()
            return
        if not exchange.is_received:  # the rest of a refused or early answered upload is read and dropped
            self.deadline_s = self.plane.now_s + self.plane.timeouts.body_idle_s
        elif self._waiting or self._was_malformed or self.plane.is_draining or self.is_write_blocked:
            self.next()
        else:
            self.current = None
            self.deadline_s = self.plane.now_s + self.plane.timeouts.keepalive_s

    def next(self) -> None:
        """Go on with the queued exchanges until one has to wait for something."""
        if self._is_turning:  # one that was refused at once calls from below: the loop there goes on
            self._turns_again = True
            return
        self._is_turning = self._turns_again = True
        while self._turns_again:
            self._turns_again = False
            self._start_next()
        self._is_turning = False

    def _start_next(self) -> None:
        if self.is_write_blocked:  # who does not read its answers gets no more of them; `current` is over and stays
            self.block_reading(READ_ANSWERS)
            self.deadline_s = self.plane.now_s + self.plane.timeouts.idle_s
            return
        if self._waiting:
            self.current = following = self._waiting.popleft()
            self.unblock_reading(READ_QUEUE)
            following.start()
            if following.is_received and self.current is following:
                following.end_body()
            return
        self.current = None
        if self._was_malformed:
            self._answer_malformed()
        else:
            self.deadline_s = self.plane.now_s + self.plane.timeouts.keepalive_s
            if self.plane.is_draining:  # since the head of this answer went out: the client does not know
                self.part()

    def part(self) -> None:
        """Close an idle connection of a worker that drains, unless its next call is half here or may be on its way."""
        if self._head_bytes:
            return
        if self.plane.parting_s:
            self.deadline_s -= max(0.0, self.plane.timeouts.keepalive_s - self.plane.parting_s)
        else:
            self.close_gently()

    def close_gently(self) -> None:
        """Close so that the client can read the answer even if it is still sending (RFC 9112 §9.6)."""
        if self.is_closing:
            return
        if self.receiving is None and not self._was_malformed and not self.read_blocks:
            self._close()
            return
        self.is_lingering = True
        self._is_deaf = True
        self.read_blocks = 0
        self.plane.unread.discard(self)
        self.transport.resume_reading()
        self.deadline_s = self.plane.now_s + self.plane.timeouts.linger_s
        self.plane.outbox.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _close(self) -> None:
        # what is buffered is still flushed, but not for longer than a client may stall elsewhere
        self.is_closing = True
        self.deadline_s = self.plane.now_s + self.plane.timeouts.body_idle_s
        self.plane.outbox.flush()
        self.transport.close()

    def abort(self) -> None:
        """Drop the connection at once; the client sees a reset."""
        reset(self.transport)

    def expire(self) -> None:
        """A deadline has passed: refuse, cut or close, whatever fits what this connection waits for."""
        if self.is_lingering or self.is_closing:
            self.abort()
        elif self.current is not None:
            self.current.expire()
        elif self._head_bytes:
            self.refuse_malformed(GatewayError("REQUEST_TIMEOUT", "the head did not arrive in time"))
        else:
            self._close()

    def forwarded_fields(self, head: RequestHead) -> bytes:
        """Return the X-Forwarded-* lines, on top of what a trusted proxy in front has said."""
        kept: dict[bytes, bytes] = {}
        for name, value in head.proxied_fields or ():
            lower = name.lower()
            kept[lower] = b"%b, %b" % (kept[lower], value) if lower in kept else value
        before = kept.pop(b"x-forwarded-for", b"")
        peer = self.peer.encode()
        kept.setdefault(b"x-forwarded-proto", b"http")
        kept.setdefault(b"x-forwarded-host", head.host)
        kept[b"x-forwarded-for"] = before + b", " + peer if before else peer
        return join_fields([(name.title(), value) for name, value in kept.items()])
