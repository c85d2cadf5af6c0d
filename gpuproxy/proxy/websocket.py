"""A tunnel whose WebSocket messages are read on the side: usage is metered, credit holds, models are kept to.

The tunnel stays one of bytes: what the upstream sends reaches the client first and is looked at then. What the client
sends is looked at before, message by message, where it could name another model than the one that was asked for.
Handlers see whole messages; compression is not offered to the upstream on such routes, so all can be read.

Credit works as for a stream: what was used by now, what the last turn took and what the client has said since is set
aside; while that is asked for, nothing is read, and what the client said does not pass. When there is none, the client
gets a close frame that says so: 1008 if it was refused, 1013 if it cannot be known. A limit of tokens counts each
answer when it is over; the one that goes beyond it is the last: 1013.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpuproxy.codec.websocket import (
    BINARY,
    POLICY_VIOLATION,
    TEXT,
    TRY_LATER,
    MessageReader,
    close_frame,
)
from gpuproxy.errors import CODES, GatewayError
from gpuproxy.link.wallet import Outcome
from gpuproxy.plugin import UsageReader
from gpuproxy.proxy import tunnel
from gpuproxy.proxy.counts import used_by_now
from gpuproxy.proxy.credit import Bill, unknown_credit

if TYPE_CHECKING:
    from gpuproxy.proxy.tunnelled import Tunnelled

KIND = b"websocket"  # what a handler is asked for a reader of, in place of a content type
GOODBYE_S = 2.0  # how long a client may take to read why it was closed

Check = Callable[[bytes], str]


class Watch:
    """What is known of one metered tunnel."""

    def __init__(self, exchange: "Tunnelled", reader: UsageReader, bill: Bill | None) -> None:
        self.exchange = exchange
        self.reader = reader
        self.is_held = False  # nothing is read while credit is asked for
        is_counted = hasattr(reader, "so_far")
        self.bill = bill if is_counted else None
        self._has_limit = is_counted and exchange.has_limit
        self._is_counting = False  # control is asked for more tokens
        self.is_looking = self.bill is not None or self._has_limit
        self._ends: tuple[ClientEnd, UpstreamEnd]
        self._ahead = exchange.plane.config.credit.output_tokens_default
        self._turn = 0  # tokens of input the next answer takes at least: those of the last, and what it said
        self._heard = 0  # the most that what the client has said since adds to them
        self._input = self._output = 0

    def join(self, client: asyncio.Transport, upstream: asyncio.Transport, done: Callable[[], None]) -> tunnel.Ends:
        """Join two transports by ends that watch."""
        check: Check | None = getattr(self.reader, "check", None)
        limit_bytes = self.exchange.plane.limits.buffered_body_bytes_max
        self._ends = ClientEnd(client, done, self, check, limit_bytes), UpstreamEnd(upstream, done, self)
        return tunnel.joined(self._ends)

    def look(self) -> None:
        """Count what was used, and set more aside if what was is nearly used."""
        bill, used = self.bill, used_by_now(self.reader)
        assert used is not None
        if self._has_limit and not self._is_counting and not getattr(self.reader, "is_amid", False):
            self._is_counting = not self.exchange.count(used.input_tokens + used.output_tokens, self._counted)
        if bill is None or bill.waiting_for:
            return
        gone, said = max(0, used.input_tokens), used.output_tokens
        if gone > self._input:
            self._turn = gone - self._input + said - self._output
            self._input, self._output = gone, said
            self._heard = 0
        next_turn = self._turn + self._heard if self._turn else max(self._ahead, self._heard)
        if gone + next_turn <= bill.input_max and said + self._ahead // 2 <= bill.output_max:
            return
        bill.input_max = max(bill.input_max, gone + next_turn)
        bill.output_max = max(bill.output_max, said + self._ahead)
        if not self.exchange.plane.credit.reserve(bill, max(0, bill.lacking()), self._told):
            self._hold(True)

    def hear(self, message: bytes) -> None:
        """Take note of what the client says."""
        weigh: Callable[[bytes], int] | None = getattr(self.reader, "weigh", None)
        self._heard += len(message) if weigh is None else weigh(message)

    def _counted(self) -> None:
        self._is_counting = False

    def _told(self, outcome: Outcome) -> None:
        bill = self.exchange.told(outcome)
        if bill is None:
            return
        if outcome == "taken":
            self._hold(False)
        else:
            self.exchange.cut_off(
                self.exchange.plane.credit.refusal(bill) if outcome == "refused" else unknown_credit()
            )

    def _hold(self, is_held: bool) -> None:
        self.is_held = is_held
        for end in self._ends:
            end.obey()


class _End(tunnel.TunnelEnd):
    """An end that stops reading for two reasons: the other side takes no more, or credit is asked for."""

    __slots__ = ("_is_full", "watch")

    peer: "_End"

    def __init__(self, transport: asyncio.Transport, done: Callable[[], None], watch: Watch) -> None:
        super().__init__(transport, done)
        self.watch = watch
        self._is_full = False

    def pause_writing(self) -> None:
        """This side takes no more: stop reading the other."""
        self._is_full = True
        self.peer.obey()

    def resume_writing(self) -> None:
        """This side takes bytes again."""
        self._is_full = False
        self.peer.obey()

    def obey(self) -> None:
        """Read, or do not."""
        if self.transport.is_closing():
            return
        if self.watch.is_held or self.peer._is_full:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


class ClientEnd(_End):
    """The client's end; with a `check`, a message that must not pass ends the tunnel before it has passed."""

    __slots__ = ("_check", "_fault", "_kept", "_messages")

    peer: "UpstreamEnd"

    def __init__(
        self,
        transport: asyncio.Transport,
        done: Callable[[], None],
        watch: Watch,
        check: Check | None,
        limit_bytes: int,
    ) -> None:
        super().__init__(transport, done, watch)
        self._check = check
        self._fault = ""
        self._kept: list[bytes] = []  # what may pass once it is paid for
        is_read = check is not None or watch.bill is not None
        self._messages = MessageReader(self._look, (TEXT, BINARY), limit_bytes) if is_read else None

    def _look(self, message: bytes) -> None:
        if self._check is not None:
            self._fault = self._fault or self._check(message)
        if self.watch.bill is not None:
            self.watch.hear(message)

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on, unless they end a message that must not pass."""
        if self.peer.is_cut:
            return  # it may still be sending
        messages = self._messages
        if messages is not None:
            messages.feed(data)
            if messages.unread_count and self._check is not None:
                self._fault = self._fault or "a message is too long, or compressed, and cannot be checked"
            if self._fault:
                self.watch.exchange.cut_off(GatewayError("FORBIDDEN", self._fault))
                return
            if self.watch.bill is not None:
                self.watch.look()
                if self.watch.is_held:
                    self._kept.append(data)
                    return
        super().data_received(data)

    def obey(self) -> None:
        """Read, or do not; what was kept passes first."""
        if self._kept and not self.watch.is_held and not self.peer.is_cut:
            kept, self._kept = b"".join(self._kept), []
            super().data_received(kept)
        super().obey()


class UpstreamEnd(_End):
    """The upstream's end, whose messages are read as they pass."""

    __slots__ = ("_farewell", "_messages", "is_cut")

    peer: ClientEnd

    def __init__(self, transport: asyncio.Transport, done: Callable[[], None], watch: Watch) -> None:
        super().__init__(transport, done, watch)
        self.is_cut = False
        self._farewell = b""  # waits for the end of the frame that is passing
        self._messages = MessageReader(watch.reader.feed)

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on, then look at them."""
        if self.is_cut:
            return
        if self._farewell:
            self._end_frame(data)
            return
        super().data_received(data)
        self._messages.feed(data)
        if self.watch.is_looking:
            self.watch.look()

    def _end_frame(self, data: bytes) -> None:
        data = data[: self._messages.rest_of_frame(data)]
        super().data_received(data)
        self._messages.feed(data)
        if self._messages.is_between_frames:
            self._say_goodbye()

    def cut(self, error: GatewayError) -> None:
        """End the tunnel with a close frame to the client, behind the frame that is passing."""
        if self._farewell:
            return
        code = TRY_LATER if CODES[error.code].is_retryable else POLICY_VIOLATION
        self._farewell = close_frame(code, f"{error.code}: {error.message}")
        if self._messages.is_between_frames:
            self._say_goodbye()
        else:
            self.watch.is_held = False
            self.obey()
            asyncio.get_running_loop().call_later(GOODBYE_S, self.close)

    def _say_goodbye(self) -> None:
        """Close with a word; what the client still sends is read, or a reset would overtake the word."""
        client = self.peer
        client.transport.write(self._farewell)
        if client.transport.can_write_eof():
            client.transport.write_eof()
        self.is_cut = True
        self.finish()
        self.watch.is_held = False
        client.obey()
        tunnel.reset(self.transport)
        asyncio.get_running_loop().call_later(GOODBYE_S, tunnel.flush, client.transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Take the client's side down too, unless it is being told why."""
        if not self.is_cut:
            super().connection_lost(error)


def watch(exchange: "Tunnelled", reader: UsageReader | None, bill: Bill | None) -> Watch | None:
    """Return what watches a tunnel, None if nobody reads its messages."""
    return None if reader is None else Watch(exchange, reader, bill)
