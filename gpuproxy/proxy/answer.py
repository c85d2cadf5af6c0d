"""The half of an exchange that faces the answer: relaying, wrapping, refusing, cutting, and the receipt.

Whatever happens, `_finish` runs exactly once for each exchange that was started and writes exactly one receipt.
"""

import time
from typing import TYPE_CHECKING

from gpuproxy.errors import CODES, GatewayError
from gpuproxy.link.wallet import Outcome as LeaseOutcome
from gpuproxy.plugin import AnswerEditor, Call, Intent, ProtocolHandler, UpstreamRequest, UsageReader
from gpuproxy.pricing import FREE, Price, cost_of
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy import refusal
from gpuproxy.proxy.credit import Bill, price_for, unknown_credit, used_by_now
from gpuproxy.proxy.headers import Field
from gpuproxy.proxy.heads import AnswerHead, RequestHead
from gpuproxy.proxy.limits import Purse, Slots
from gpuproxy.proxy.pins import edited
from gpuproxy.proxy.retry import wait_told
from gpuproxy.proxy.route import CONTROL, ENVELOPE, Route
from gpuproxy.proxy.visits import refusal_fields
from gpuproxy.types import Grant, Outcome, Receipt, Usage

if TYPE_CHECKING:
    from gpuproxy.proxy.breaker import Replica
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.downstream import Downstream
    from gpuproxy.proxy.endpoint import Endpoint
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane

# States, in the order they are passed through.
NEW, ADMITTING, COLLECTING, WAITING, CONNECTING, SENT, DONE = range(7)

# Reasons not to read from the client for now; reading goes on when none is left.
READ_UPLOAD, READ_QUEUE, READ_BUFFER = 1, 2, 4

DISCARDED_BODY_BYTES_MAX = 262_144  # of a refused upload that is read to keep the connection usable
PSEUDONYM = b"gpuproxy"
VIA_HOPS_MAX = 2  # how often a request may pass this gateway before it is a loop
JOINED_BYTES_MAX = 16_384  # a body up to this is copied behind its head for one write; above, two writes are cheaper

NEVER_BYTES = 1 << 62
CHECKPOINT_NS = 5_000_000_000  # a call that lasts notes so often what it has used
TIME_AHEAD_US = 2_000_000  # a few sweeps: time is reserved that early before it is used up

ATTEMPTS = b"X-Gpuproxy-Attempts: %d\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Answer:
    """The half of an exchange that faces the answer; `Exchange` adds the way there.

    The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
    """

    __slots__ = (
        "_asked",
        "_attempt_ns",
        "_attempts",
        "_bill",
        "_call",
        "_checkpoint_ns",
        "_collected",
        "_destination",
        "_editor",
        "_endpoint",
        "_error",
        "_first_byte_ns",
        "_generation",
        "_grant",
        "_handler",
        "_head",
        "_idle_s",
        "_intent",
        "_is_answer_chunked",
        "_is_answer_until_close",
        "_is_body_whole",
        "_is_paused",
        "_look_at_bytes",
        "_needs_body",
        "_origin",
        "_patience_s",
        "_purse",
        "_reader",
        "_receipt_id",
        "_response_bytes",
        "_sending",
        "_slots",
        "_started_ns",
        "_status",
        "_tokens",
        "_tried",
        "_unpaid",
        "_wall_offset_ns",
        "content_length",
        "downstream",
        "has_body",
        "has_sent_head",
        "head",
        "held_body",
        "is_received",
        "keeps_alive",
        "method",
        "plane",
        "request_bytes",
        "request_id",
        "route",
        "state",
        "upstream",
    )

    route: Route
    _started_ns: int
    _unpaid: "tuple[Intent, bytes | None, Endpoint | None, int]"
    _sending: tuple[bytes, bytes, list[Field], bytes | None, UpstreamRequest]
    _tried: list["Replica"]  # valid after the first attempt has failed
    _asked: str  # the model's name as the caller wrote it

    def __init__(self, plane: "Plane", downstream: "Downstream", head: RequestHead, content_length: int) -> None:
        self.plane = plane
        self.downstream = downstream
        self.head = head
        self.method = head.method
        self.keeps_alive = head.keeps_alive
        self.request_id = head.request_id
        self.content_length = content_length  # of the request's body, -1 if not told
        self.has_body = content_length > 0 or head.is_chunked
        self.state = NEW
        # the upload
        self.is_received = self._needs_body = self._is_body_whole = False
        self.request_bytes = 0
        self.held_body: list[bytes] = []
        # the way
        self.upstream: UpstreamConnection | None = None
        self._grant: Grant | None = None
        self._purse: Purse | None = None
        self._handler: ProtocolHandler | None = None
        self._call: Call | None = None
        self._intent: Intent | None = None
        self._destination: Destination | None = None
        self._endpoint: Endpoint | None = None
        self._attempt_ns = 0  # when an attempt began whose time is wanted
        self._generation = -1  # of the endpoint's breaker; -1: no attempt is under way there
        self._origin: Origin | None = None
        self._head = b""
        self._attempts = 0
        self._patience_s = 0.0  # for the answer's first byte
        # the answer
        self.has_sent_head = self._is_answer_chunked = self._is_answer_until_close = self._is_paused = False
        self._reader: UsageReader | None = None
        self._editor: AnswerEditor | None = None  # until the head has come it may be a HeadEditor
        self._collected: envelopes.Collected | None = None
        self._status = self._response_bytes = self._first_byte_ns = 0
        self._idle_s = 0.0
        self._error = ""
        # what it costs
        self._tokens: tuple[Purse, int, int] | None = None  # counted: by whom, how many, of which lease
        self._slots: Slots | None = None  # where it has one
        self._bill: Bill | None = None
        self._receipt_id = ""  # made early for checkpoints
        self._wall_offset_ns = 0  # kept for them: a receipt is known by its id and start
        self._checkpoint_ns = 0
        self._look_at_bytes = NEVER_BYTES

    def _connect_to(self, origin: "Origin") -> None:
        raise NotImplementedError  # the way there: `Exchange`

    def _goes_elsewhere(
        self, reason: str, connection: "UpstreamConnection | None" = None, has_failed: bool = True
    ) -> bool:
        raise NotImplementedError

    def _is_kept_back(self, connection: "UpstreamConnection", body: bytes) -> bool:
        raise NotImplementedError

    # -- relay ------------------------------------------------------------------------------------------

    def relay(self, connection: "UpstreamConnection") -> None:
        """Pass on what one read of the upstream brought: head, body bytes, the end."""
        parts = connection.parts
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            if self.method == b"HEAD":  # a body the upstream must not send; the connection is closed after it
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
        if head.kind and self._call is not None and not head.is_encoded:
            self._reader = self._handler.reader(self._call, status, head.kind)  # type: ignore[union-attr]
            bill = self._bill
            if bill is not None and bill.price.output_nanousd_per_million and hasattr(self._reader, "so_far"):
                self._look_at_bytes = bill.output_max
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
        if status >= 429 and (wait_s := wait_told(head)):
            replica.told_to_wait(wait_s, self._generation)
        began_ns = self._attempt_ns or now_ns  # unknown if nobody wanted to know then
        replica.answered(status, (now_ns - began_ns) / 1000, self._generation)

    def _complete(self, connection: "UpstreamConnection") -> None:
        self.upstream = None
        if self._is_paused:
            connection.transport.resume_reading()
        if self.is_received:
            connection.release(self.plane.now_s)
        else:
            connection.abort()
        self._finish("ok")

    def _write(self, data: bytes) -> None:
        self.plane.outbox.write(self.downstream.transport, data)

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

    # -- what it costs --------------------------------------------------------------------------------------

    def _look(self) -> None:
        # Each token has at least one byte: the answer is looked at again once it may have used up what is reserved.
        bill = self._bill
        assert bill is not None
        used = used_by_now(self._reader)
        assert used is not None  # or it would not have been asked to look
        rest = bill.output_max - used.output_tokens
        if rest <= 0 and not bill.waiting_for:
            self._extend(bill, is_time=False)
        self._look_at_bytes = self._response_bytes + max(1, rest)

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

    def _uncount(self, used: int) -> None:
        # the call is over: what it did not use of the tokens counted may be used by others
        if self._tokens is not None:
            purse, most, lease_id = self._tokens
            self._tokens = None
            purse.uncount(most - used, lease_id)

    def cut_off(self, error: GatewayError) -> None:
        """End the answer, saying why if it has a way to say it; the end must not look clean."""
        if not self.has_sent_head:
            self.refuse(error)
            return
        ends = self.plane.tunnels.get(self)
        if ends is not None:
            self._error = error.code
            ends[1].cut(error)
            return
        head = self.upstream.head if self.upstream is not None else NO_HEAD
        handler = self._handler
        is_events = head.kind.startswith(b"text/event-stream") and not head.is_encoded
        if is_events and handler is not None and (self._is_answer_chunked or self._is_answer_until_close):
            told = handler.refuse(self.route.path, error, self.request_id).replace(b"\n", b" ")
            event = b"\n\nevent: error\ndata: %b\n\n" % told
            self._response_bytes += len(event)
            self._write(b"%x\r\n%b\r\n" % (len(event), event) if self._is_answer_chunked else event)
            self.plane.outbox.flush()
        self._cut(error.code, "cut")

    # -- the envelope's answer ----------------------------------------------------------------------------

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
        content_type = head.content_type
        reader = None if head.is_encoded else handler.reader(call, head.status, head.kind)
        usage = None
        if reader is not None:
            reader.feed(body)
            usage = reader.finish()
        content_type, body = handler.collapse(call, content_type, body)
        answer = envelopes.wrap(
            head.status,
            {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.fields},
            content_type,
            body,
            (time.monotonic_ns() - self._started_ns) // 1000,
            self.request_id,
            usage,
        )
        self._reader = _Known(usage, getattr(reader, "rpc_outcome", ""))
        self._write_json(200, answer, b"")
        self._complete(connection)

    def _write_json(self, status: int, body: bytes, extra_fields: bytes) -> None:
        self.has_sent_head = True
        self._status = status
        self._response_bytes += len(body)
        if self._attempts > 1:
            extra_fields += ATTEMPTS % self._attempts
        if self._purse is not None:
            extra_fields += self._purse.fields()
        if not self.keeps_alive or self.plane.is_draining:
            extra_fields += b"Connection: close\r\n"
        elif self.head.is_http_1_0:
            extra_fields += b"Connection: keep-alive\r\n"
        has_body = self.method != b"HEAD"
        self._write(refusal.json_answer(status, body, self.request_id, extra_fields, has_body))

    # -- when things go wrong ------------------------------------------------------------------------------

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error in the caller's dialect; mid-answer, cut the stream visibly instead."""
        if self.state == DONE:
            return
        if self.has_sent_head:
            self._cut(error.code)
            return
        self._error = error.code
        self._drop_upstream()
        handler = self._handler
        if handler is not None and self._collected is None and self.route.kind != ENVELOPE:
            body = handler.refuse(self.route.path, error, self.request_id)
        else:
            body = refusal.body_of(error, self.request_id)
        if not self.is_received and self._rest_is_long():
            self.keeps_alive = False
        self._write_json(error.status, body, refusal_fields(self, error, self._attempts))
        self._finish("upstream_failed" if CODES[error.code].source == "upstream" else "refused")

    def answer_visitor(self, answer: bytes) -> None:
        """Answer a call without a caller; what it sends as a body is not wanted."""
        self.is_received = self.is_received or not self.has_body  # its end has not been parsed yet
        self.has_sent_head = True
        self._status = 204
        self._write(answer)
        self._finish("ok")

    def _rest_is_long(self) -> bool:
        if self.head.expects_continue or self.head.is_chunked:
            return True
        return self.content_length - self.request_bytes > DISCARDED_BODY_BYTES_MAX

    def upstream_lost(self, connection: "UpstreamConnection") -> None:
        """The upstream closed before its answer was whole."""
        self.upstream = None
        if self.has_sent_head:
            self._cut("UPSTREAM_INVALID")
        elif connection.is_reused and connection.head_bytes == 0 and self._can_replay():
            # it closed an idle connection while our request was on its way: ask on a new one, once
            assert self._origin is not None
            self._attempts += 1
            self._connect_to(self._origin)
        elif not self._goes_elsewhere("lost"):
            message = f"{connection.origin.label} closed the connection before its answer was whole"
            self.refuse(GatewayError("UPSTREAM_INVALID", message))

    def _can_replay(self) -> bool:
        is_held = self._is_body_whole or self.request_bytes <= JOINED_BYTES_MAX
        return self.state == SENT and self.is_received and is_held

    def upstream_faulted(self, connection: "UpstreamConnection", reason: str) -> None:
        """The upstream's bytes cannot be passed on."""
        self.refuse(GatewayError("UPSTREAM_INVALID", f"{connection.origin.label}: {reason}"))

    def _cut(self, code: str, outcome: Outcome = "upstream_failed") -> None:
        # the end must not look clean: no last chunk, missing bytes, or a reset where only the end would show
        self._error = code
        self._drop_upstream()
        self.keeps_alive = False
        if self._is_answer_until_close:
            self.downstream.abort()
        self._finish(outcome)

    def client_left(self) -> None:
        """The client is gone: stop the upstream at once and bill what was used."""
        if self.state == DONE:
            return
        self._drop_upstream()
        is_over = getattr(self._reader, "is_terminal", False)
        self._finish("ok" if is_over else "client_gone")

    def expire(self) -> None:
        """The deadline of what this exchange waits for has passed."""
        state = self.state
        if state == DONE:  # the rest of a refused upload does not come
            self.downstream.abort()
        elif state == CONNECTING:  # bounded by the pool's own limits
            self.downstream.deadline_s = self.plane.now_s + self.plane.timeouts.connect_s
        elif state == SENT and self.has_sent_head and self._is_paused:
            self.downstream.abort()  # the client stopped reading: connection_lost settles the call
        elif state == COLLECTING or (state == SENT and self._waits_for_upload()):
            self.refuse(GatewayError("REQUEST_TIMEOUT", "the body did not arrive in time"))
        elif state == WAITING:
            self.refuse(self._destination.busy())  # type: ignore[union-attr]  # it waits there
        elif state == ADMITTING:
            self.refuse(GatewayError("UNAVAILABLE", "keys cannot be checked at the moment; try again", 1))
        elif self.has_sent_head or not self._goes_elsewhere("first_byte"):
            label = self._origin.label if self._origin is not None else "the upstream"
            self.refuse(GatewayError("UPSTREAM_TIMEOUT", f"{label} did not answer in time"))

    def expire_total(self) -> None:
        """The time for the whole call has passed."""
        error = GatewayError("UPSTREAM_TIMEOUT", "the call took longer than this model's total_s allows")
        if self.state == WAITING:
            self.expire()
        elif self in self.plane.tunnels:
            self.cut_off(error)
        else:
            self.refuse(error)

    def _waits_for_upload(self) -> bool:
        return not self.is_received and not self.has_sent_head and not self.downstream.is_reading_blocked(READ_UPLOAD)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abort()

    # -- finish ---------------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        """Write the receipt and let the connection go on. Runs once."""
        if self._generation >= 0:
            replica = self._endpoint.replica  # type: ignore[union-attr]  # an attempt is under way there
            if replica.is_calm and outcome != "upstream_failed":  # type: ignore[union-attr]
                replica.ended_count += 1  # type: ignore[union-attr]
            else:
                self._end_attempt(outcome == "upstream_failed")
        elif self.state == WAITING:
            self._destination.leave(self)  # type: ignore[union-attr]  # it waits there
        if self.plane.bounded:
            self.plane.bounded.pop(self, None)
        self.state = DONE
        self.held_body = []
        route = self.route
        if route.kind != CONTROL:
            plane = self.plane
            reader = self._reader
            usage = (reader.finish() if reader is not None else None) or NO_USAGE
            receipt = self._receipt(outcome, usage, time.monotonic_ns())
            bill = self._bill
            if bill is not None:
                plane.timed.pop(self, None)
                plane.credit.settle(bill, cost_of(receipt, self._price_of(receipt, bill.price)))
            if self._tokens is not None:
                self._uncount(max(0, usage.input_tokens) + max(0, usage.output_tokens))
            if self._slots is not None:
                self._slots.give()
            plane.journal.append(receipt)
            if not plane.outbox.is_scheduled:
                plane.outbox.schedule()
        if self._status != 101:
            self.downstream.ended(self, not self.keeps_alive or (outcome == "ok" and not self.is_received))

    def is_due(self, now_ns: int) -> bool:
        """Tell whether it is time for a checkpoint of this call."""
        is_open = self.state == SENT and self.route.kind != CONTROL
        return is_open and now_ns - (self._checkpoint_ns or self._started_ns) >= CHECKPOINT_NS

    def checkpoint(self, now_ns: int) -> None:
        """Note in the journal what was used by now: it counts if this worker is killed."""
        plane = self.plane
        self._checkpoint_ns = now_ns
        if (ends := plane.tunnels.get(self)) is not None:
            self.request_bytes, self._response_bytes = ends[0].byte_count, ends[1].byte_count
        if not self._receipt_id:
            self._receipt_id = plane.new_id() if self.head.request_id else self.request_id
            self._wall_offset_ns = plane.wall_offset_ns
        plane.journal.append(self._receipt("open", used_by_now(self._reader) or NO_USAGE, now_ns))
        plane.outbox.schedule()

    def _receipt(self, outcome: Outcome, usage: Usage, now_ns: int) -> Receipt:
        plane = self.plane
        started_ns = self._started_ns
        first_byte_ns = self._first_byte_ns
        request_id = self.request_id
        grant = self._grant or NO_GRANT
        intent = self._intent or NO_INTENT
        handler = self._handler
        place = self._endpoint or self._destination or NO_PLACE
        return Receipt(
            self._receipt_id or (plane.new_id() if self.head.request_id else request_id),
            request_id,
            (self._wall_offset_ns or plane.wall_offset_ns) + started_ns,
            (now_ns - started_ns) // 1000,
            (first_byte_ns - started_ns) // 1000 if first_byte_ns else -1,
            grant.user_id,
            grant.key_id,
            handler.name if handler is not None else "",
            place.upstream,
            intent.model,
            self.method.decode(),
            self.route.shown,
            self._status,
            outcome,
            self._error,
            self.request_bytes,
            self._response_bytes,
            usage.input_tokens,
            usage.cached_tokens,
            usage.output_tokens,
            usage.source,
            self._attempts,
            intent.is_stream,
            grant.markup_bps,
            intent.rpc_method,
            intent.rpc_name,
            getattr(self._reader, "rpc_outcome", "") if intent.rpc_method else "",
        )

    def _price_of(self, receipt: Receipt, reserved: Price) -> Price:
        # the price of the place that served the call, which need not be the highest, by which it has reserved
        destination = self._destination
        if destination is None or len(destination.places) == 1:
            return reserved
        price = self.plane.prices.find(receipt.model, receipt.upstream, receipt.started_ns)
        return (price and price_for(self._grant or NO_GRANT, price)) or FREE

    def _end_attempt(self, has_failed: bool) -> None:
        replica = self._endpoint.replica  # type: ignore[union-attr]  # an attempt is under way there
        assert replica is not None
        generation, self._generation = self._generation, -1
        if has_failed:
            replica.failed(generation)
        replica.end(generation)


class _NoPlace:
    upstream = ""


NO_PLACE = _NoPlace()
NO_GRANT = Grant("", "")
NO_HEAD = AnswerHead()
NO_INTENT = Intent()
NO_USAGE = Usage(-1, -1, -1, "none")


class _Known:
    """Stands in for a reader whose result is known already."""

    def __init__(self, usage: Usage | None, rpc_outcome: str) -> None:
        self._usage = usage
        self.rpc_outcome = rpc_outcome

    def feed(self, data: bytes) -> None:
        """Nothing more comes."""

    def finish(self) -> Usage | None:
        """Return the usage."""
        return self._usage
