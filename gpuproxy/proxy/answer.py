"""The part of an exchange that passes the answer on: relayed as it comes, or collected and wrapped for an envelope.

The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
"""

import time
from typing import TYPE_CHECKING

from gpuproxy.link.wallet import Outcome as LeaseOutcome
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy.counts import NO_USAGE, Known, used_by_now, used_in_all
from gpuproxy.proxy.credit import Bill, unknown_credit
from gpuproxy.proxy.encoded import EncodedReader, reader_of_encoded
from gpuproxy.proxy.exchange_state import ATTEMPTS, DONE, JOINED_BYTES_MAX, TIME_AHEAD_US
from gpuproxy.proxy.heads import AnswerHead
from gpuproxy.proxy.pins import edited
from gpuproxy.proxy.retry import wait_told

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection
from gpuproxy.proxy.refusing import Refusing


class Answer(Refusing):
    """The way back. `Exchange` adds the way there."""

    __slots__ = ()

    def relay(self, connection: "UpstreamConnection") -> None:
        """Pass on what one read of the upstream brought: head, body bytes, the end."""
        parts = connection.parts
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            if self.sent_method == b"HEAD":  # a body the upstream must not send; the connection is closed after it
                body = b""
        else:
            body = b""
        if body and self._is_answer_chunked and not connection.is_complete:
            self._relay_piece(body)
            return
        if self._collected is not None:
            self._collect(connection, body)
            return
        downstream = self.downstream
        is_complete = connection.is_complete
        if self.has_sent_head:
            out = b""
        else:
            status = connection.head.status
            if status >= 400 and self._is_kept_back(connection, body):
                return
            out = self._answer_head(connection)
        outbox = self.plane.outbox
        seen = body
        if self._editor is not None:
            body = self._editor.edit(body, is_complete)
        size = len(body)
        if size:
            self._response_bytes += size
            if self._is_answer_chunked:
                ending = b"0\r\n\r\n" if is_complete else b""
                out = b"%b%x\r\n%b\r\n%b" % (out, size, body, ending)
            elif not out:
                out = body
            elif size <= JOINED_BYTES_MAX:
                out += body
            else:
                outbox.writes.append((downstream.transport, out))
                out = body
        elif is_complete and self._is_answer_chunked:
            out += b"0\r\n\r\n"
        if out:
            outbox.writes.append((downstream.transport, out))
            if not outbox.is_scheduled:
                outbox.schedule()
            if size > JOINED_BYTES_MAX and not is_complete:  # the end must wait for its receipt
                outbox.flush()  # a peer that takes no more must stop the reading in this very turn
        if seen and self._reader is not None:
            self._reader.feed(seen)
        if is_complete:
            self._complete(connection)
        else:
            if downstream.is_write_blocked and not self._is_paused:
                self.pause_answer()
            downstream.deadline_s = self.plane.now_s + self._idle_s
            if self._response_bytes >= self._look_at_bytes:
                self._look()

    def _relay_piece(self, body: bytes) -> None:
        # the middle of a stream: the head is out, the end is not in sight
        downstream = self.downstream
        outbox = self.plane.outbox
        seen = body
        if self._editor is not None:
            body = self._editor.edit(body, False)
            if not body:  # a chunk of no bytes would be the end
                self._take_note(seen)
                return
        size = len(body)
        self._response_bytes += size
        outbox.writes.append((downstream.transport, b"%x\r\n%b\r\n" % (size, body)))
        if not outbox.is_scheduled:
            outbox.schedule()
        if size > JOINED_BYTES_MAX:
            outbox.flush()  # a peer that takes no more must stop the reading in this very turn
        if self._reader is not None:
            self._reader.feed(seen)
        if downstream.is_write_blocked and not self._is_paused:
            self.pause_answer()
        downstream.deadline_s = self.plane.now_s + self._idle_s
        if self._response_bytes >= self._look_at_bytes:
            self._look()

    def _take_note(self, seen: bytes) -> None:
        """Meter bytes that are not for the client."""
        if self._reader is not None:
            self._reader.feed(seen)
        self.downstream.deadline_s = self.plane.now_s + self._idle_s

    def _answer_head(self, connection: "UpstreamConnection") -> bytes:
        self.has_sent_head = True
        now_ns = self._first_byte_ns = time.monotonic_ns()
        head = connection.head
        status = self._status = head.status
        if self._generation >= 0 and (status >= 400 or not self._endpoint.replica.is_calm):  # type: ignore[union-attr]
            self._report(head, now_ns)
        self._head = b""
        self.held_body = []
        start = head.start
        if self._editor is not None:
            start, self._editor = edited(self._editor, head, self._grant, self._endpoint)
        if connection.content_length >= 0 and status != 204 and self._editor is None:
            framing = b"Content-Length: %d\r\n" % connection.content_length
        elif status == 204 or status == 304 or self.method == b"HEAD":
            framing = b""
        elif self.head.is_http_1_0:
            framing = b""
            self.keeps_alive = False
            self._is_answer_until_close = True
        else:
            framing = b"Transfer-Encoding: chunked\r\n"
            self._is_answer_chunked = True
        if self._call is not None:
            self._reader = self._handler.reader(self._call, status, head.kind)  # type: ignore[union-attr]
            if head.coding:
                self._reader = reader_of_encoded(self._reader, head.coding)
            bill = self._bill
            if bill is not None and bill.price.output_nanousd_per_million and hasattr(self._reader, "so_far"):
                self._look_at_bytes = 1 if head.coding else bill.output_max
        if not connection.is_complete:
            self._idle_s = self.stream_idle_s()
        if not self.keeps_alive or not self.is_received or self.plane.is_draining:
            self.keeps_alive = False  # `not is_received`: the rest of an upload that is answered early is not wanted
            framing += b"Connection: close\r\n"
        elif self.head.is_http_1_0:
            framing += b"Connection: keep-alive\r\n"
        if self._attempts > 1:
            framing += ATTEMPTS % self._attempts
            if status < 400:
                self.plane.usage_refusals.learn(self._sending[4])
        if self._purse is not None:
            framing += self._purse.fields()
        return b"%bX-Request-Id: %b\r\n%b\r\n" % (start, self.request_id.encode(), framing)

    def _report(self, head: AnswerHead, now_ns: int) -> None:
        replica = self._endpoint.replica  # type: ignore[union-attr]  # an attempt is under way there
        assert replica is not None
        status = head.status
        if status >= 429:
            self._heed(head)
        began_ns = self._attempt_ns or now_ns  # unknown if nobody wanted to know then
        replica.answered(status, (now_ns - began_ns) / 1000, self._generation)

    def _heed(self, head: AnswerHead) -> None:
        """Do as the answer's Retry-After says."""
        endpoint = self._endpoint
        assert endpoint is not None
        assert endpoint.replica is not None
        wait_s = wait_told(head)
        if wait_s and head.status == 429:
            endpoint.replica.rest(endpoint, wait_s)
        elif wait_s:
            endpoint.replica.told_to_wait(wait_s, self._generation)

    def _complete(self, connection: "UpstreamConnection") -> None:
        self.upstream = None
        if self._is_paused:
            connection.transport.resume_reading()
        if self.is_received:
            connection.release(self.plane.now_s)
        else:
            connection.abort()
        self._finish("ok")

    def relay_interim(self, head: AnswerHead) -> None:
        """Pass on a 1xx answer (RFC 9110 §15.2) to a client that can understand it."""
        if not self.head.is_http_1_0 and self._collected is None and not self.has_sent_head:
            self._write(head.start + b"\r\n")

    def pause_answer(self) -> None:
        """The client takes no more: stop reading the upstream."""
        if self.upstream is not None and not self._is_paused and not self.upstream.transport.is_closing():
            self._is_paused = True
            self.upstream.transport.pause_reading()

    def resume_answer(self) -> None:
        """The client takes bytes again."""
        if self._is_paused and not (self._bill is not None and self._bill.waiting_for):
            self._is_paused = False
            self.downstream.deadline_s = self.plane.now_s + self._idle_s
            if self.upstream is not None and not self.upstream.transport.is_closing():
                self.upstream.transport.resume_reading()

    def stream_idle_s(self) -> float:
        """Return how long the answer, or a tunnel, may be silent."""
        endpoint = self._endpoint
        return self.plane.timeouts.idle_s if endpoint is None else endpoint.idle_s

    # -- what it costs ---------------------------------------------------------------------------------

    def _look(self) -> None:
        # Each token has at least one byte: the answer is looked at again once it may have used up what is reserved.
        # Not so if it is compressed: then it is looked at whenever something has come.
        bill = self._bill
        assert bill is not None
        used = used_by_now(self._reader)
        assert used is not None  # or it would not have been asked to look
        rest = bill.output_max - used.output_tokens
        if rest <= 0 and not bill.waiting_for:
            self._extend(bill, is_time=False)
        is_encoded = type(self._reader) is EncodedReader
        self._look_at_bytes = self._response_bytes + (1 if is_encoded else max(1, rest))

    def prolong(self) -> None:
        """Reserve for more time, if what is reserved ends before the next look."""
        bill = self._bill
        assert bill is not None
        used_us = (time.monotonic_ns() - self._started_ns) // 1000
        if bill.reserved and not bill.waiting_for and used_us + TIME_AHEAD_US > bill.time_us:
            self._extend(bill, is_time=True)

    def _extend(self, bill: Bill, is_time: bool) -> None:
        credit = self.plane.credit
        credit.extend(bill, is_time)
        if not credit.reserve(bill, bill.lacking(), self._extended):
            self.pause_answer()

    def _extended(self, outcome: LeaseOutcome) -> None:
        bill = self.told(outcome)
        if bill is None:
            return
        if outcome != "taken":
            self.cut_off(self.plane.credit.refusal(bill) if outcome == "refused" else unknown_credit())
        elif not self.downstream.is_write_blocked:
            self.resume_answer()

    def told(self, outcome: LeaseOutcome) -> Bill | None:
        """Take note of control's word about more credit; None if the call is over meanwhile."""
        bill = self._bill
        assert bill is not None
        self.plane.credit.told(bill, outcome)
        if self.state != DONE:
            return bill
        self.plane.credit.settle(bill, 0)
        return None

    # -- the envelope's answer -------------------------------------------------------------------------

    def _collect(self, connection: "UpstreamConnection", body: bytes) -> None:
        collected = self._collected
        assert collected is not None
        if not self._first_byte_ns:
            if connection.head.status >= 400 and self._is_kept_back(connection, body):
                return
            self._first_byte_ns = time.monotonic_ns()
            if self._generation >= 0:
                self._report(connection.head, self._first_byte_ns)
        if not collected.add(body):
            limit_bytes = collected.limit_bytes
            self.upstream_faulted(connection, f'its answer is over {limit_bytes} bytes; use "stream": true')
        elif connection.is_complete:
            self._wrap(connection, collected.whole())
        else:
            self.downstream.deadline_s = self.plane.now_s + collected.rest_s(self.stream_idle_s())

    def _wrap(self, connection: "UpstreamConnection", body: bytes) -> None:
        handler = self._handler
        assert handler is not None
        call = self._call
        assert call is not None
        head = connection.head
        sequel = self._sending[4].sequel
        if sequel is not None and (following := sequel.next(head.status, head.fields, body)) is not None:
            self._goes_on(connection, following)
            return
        content_type = head.content_type
        reader = handler.reader(call, head.status, head.kind)
        if head.coding:
            reader = reader_of_encoded(reader, head.coding)
        usage = None
        if reader is not None:
            reader.feed(body)
            told = used_in_all(reader, handler.name)
            usage = None if told is NO_USAGE else told
        content_type, body = handler.collapse(call, content_type, body)
        fields = envelopes.combined(head.fields)
        if self.sent_method == b"HEAD" and connection.content_length >= 0:
            fields["content-length"] = str(connection.content_length)  # of the body there would be
        answer = envelopes.wrap(
            head.status,
            fields,
            content_type,
            body,
            (time.monotonic_ns() - self._started_ns) // 1000,
            self.request_id,
            usage,
        )
        self._reader = Known(usage, getattr(reader, "rpc_outcome", ""), getattr(reader, "response_model", ""))
        self._write_json(200, answer, b"")
        if sequel is not None and sequel.farewell and head.keeps_alive:
            self._take_leave(connection, sequel.farewell)
        else:
            self._complete(connection)

    def _take_leave(self, connection: "UpstreamConnection", farewell: bytes) -> None:
        """End the call as `_complete` does, but with a last word to the server, whose answer nobody waits for."""
        length = b"\r\nContent-Length: %d\r\n" % len(self._sending[4].body or b"")
        rest = self._head[len(self._sending[0]) :].replace(length, b"\r\nConnection: close\r\n")
        self.upstream = connection.exchange = None
        connection.transport.write(farewell + rest)
        connection.transport.close()
        self._finish("ok")
