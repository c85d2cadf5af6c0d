"""The part of an exchange for what goes wrong: refused, cut, left by its client, lost by its upstream, too late."""

from typing import TYPE_CHECKING

from gpuproxy.errors import CODES, GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ToolReader
from gpuproxy.proxy import refusal
from gpuproxy.proxy.counts import Known
from gpuproxy.proxy.exchange_state import (
    ADMITTING,
    ATTEMPTS,
    COLLECTING,
    CONNECTING,
    DISCARDED_BODY_BYTES_MAX,
    DONE,
    JOINED_BYTES_MAX,
    NO_HEAD,
    READ_UPLOAD,
    SENT,
    WAITING,
)
from gpuproxy.proxy.route import ENVELOPE
from gpuproxy.proxy.visits import refusal_fields
from gpuproxy.types import CANCELLED, Outcome

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection
from gpuproxy.proxy.settled import Settled

_log = get_logger("gpuproxy.exchange")


class Refusing(Settled):
    """Ends an exchange that cannot end well."""

    __slots__ = ()

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error in the caller's dialect; mid-answer, cut the stream visibly instead."""
        if self.state == DONE:
            return
        if self.has_sent_head:
            self._cut(error.code)
            return
        self._error = error.code
        self._drop_upstream()
        handler = self._handler or self.route.speaker
        if handler is not None and self._collected is None and self.route.kind != ENVELOPE:
            body = handler.refuse(self.route.path, error, self.request_id)
        else:
            body = refusal.body_of(error, self.request_id)
        if not self.is_received and self._rest_is_long():
            self.keeps_alive = False
        fields = refusal_fields(self, error, self._attempts)
        fields += b"request-id: %b\r\n" % self.request_id.encode()  # where Anthropic's SDKs look for it
        self._write_json(error.status, body, fields)
        self._finish("upstream_failed" if CODES[error.code].source == "upstream" else "refused")

    def _fail(self) -> None:
        """Refuse because of what was raised just now and should not have been."""
        _log.exception("exchange failed", request_id=self.request_id)
        self.refuse(GatewayError("INTERNAL", "the gateway failed; the request id finds it in the log"))

    def answer_visitor(self, answer: bytes) -> None:
        """Answer a call without a caller; what it sends as a body is not wanted."""
        self.is_received = self.is_received or not self.has_body  # its end has not been parsed yet
        self.has_sent_head = True
        self._status = 204
        self._write(answer)
        self._finish("ok")

    def cut_off(self, error: GatewayError) -> None:
        """End the answer, saying why if it has a way to say it; the end must not look clean."""
        if not self.has_sent_head:
            self.refuse(error)
            return
        ends = self.plane.tunnels.get(self)  # type: ignore[call-overload]  # it is a whole exchange
        if ends is not None:
            self._error = error.code
            ends[1].cut(error)
            return
        head = self.upstream.head if self.upstream is not None else NO_HEAD
        handler = self._handler
        is_events = head.kind.startswith(b"text/event-stream") and not head.coding
        if is_events and handler is not None and (self._is_answer_chunked or self._is_answer_until_close):
            told = handler.refuse(self.route.path, error, self.request_id).replace(b"\n", b" ")
            event = b"\n\nevent: error\ndata: %b\n\n" % told
            self._response_bytes += len(event)
            self._write(b"%x\r\n%b\r\n" % (len(event), event) if self._is_answer_chunked else event)
            self.plane.outbox.flush()
        self._cut(error.code, "cut")

    def _cut(self, code: str, outcome: Outcome = "upstream_failed") -> None:
        # the end must not look clean: no last chunk, missing bytes, or a reset where only the end would show
        self._error = code
        self._drop_upstream()
        self.keeps_alive = False
        if self._is_answer_until_close:
            self.downstream.abort()
        self._finish(outcome)

    def upstream_lost(self, connection: "UpstreamConnection") -> None:
        """The upstream closed before its answer was whole."""
        self.upstream = None
        if self.has_sent_head:
            self._cut("UPSTREAM_INVALID")
        elif connection.is_reused and not connection.has_begun and self._can_replay():
            # it closed an idle connection while our request was on its way: ask on a new one, once
            self._ask_anew()
        elif connection.has_head or not self._goes_elsewhere("lost"):
            message = f"{connection.origin.label} closed the connection before its answer was whole"
            self.refuse(GatewayError("UPSTREAM_INVALID", message))

    def _ask_anew(self) -> None:
        assert self._origin is not None
        self._attempts += 1
        self._connect_to(self._origin)

    def upstream_faulted(self, connection: "UpstreamConnection", reason: str) -> None:
        """The upstream's bytes cannot be passed on."""
        if connection.has_head or not self._goes_elsewhere("lost"):
            self.refuse(GatewayError("UPSTREAM_INVALID", f"{connection.origin.label}: {reason}"))

    def _can_replay(self) -> bool:
        is_held = self._is_body_whole or self.request_bytes <= JOINED_BYTES_MAX
        return self.state == SENT and self.is_received and is_held

    def client_left(self) -> None:
        """The client is gone: stop the upstream at once and bill what was used."""
        if self.state == DONE:
            return
        if self.state == SENT and not self._first_byte_ns and self._has_tool_at_work():
            self._reader = Known(None, CANCELLED)
        self._drop_upstream()
        is_over = getattr(self._reader, "is_terminal", False)
        self._finish("ok" if is_over else "client_gone")

    def _has_tool_at_work(self) -> bool:
        """Tell whether what was sent last has a tool do its work, which leaving need not stop."""
        if self._intent is None or not self._intent.tools:
            return False
        _, _, _, body, request = self._sending
        if request.body is not None:
            body = request.body
        if body is None:
            return self.is_received
        return isinstance(self._handler, ToolReader) and bool(self._handler.tools_in(body))

    def expire(self) -> None:
        """The deadline of what this exchange waits for has passed."""
        state = self.state
        if state == DONE:  # the rest of a refused upload does not come
            self.downstream.abort()
        elif state == CONNECTING:  # bounded by the pool's own limits
            self.downstream.deadline_s = self.plane.now_s + self.plane.timeouts.connect_s
        elif state == SENT and self.downstream.is_write_blocked:
            self.downstream.abort()  # the client stopped reading: connection_lost settles the call
        elif state == COLLECTING or (state == SENT and self._waits_for_upload()):
            self.refuse(GatewayError("REQUEST_TIMEOUT", "the body did not arrive in time"))
        elif state == WAITING:
            self.refuse(self._destination.busy())  # type: ignore[union-attr]  # it waits there
        elif state == ADMITTING:
            self.refuse(GatewayError("UNAVAILABLE", "keys cannot be checked at the moment; try again", 1))
        elif self._has_answer_begun() or not self._waits_elsewhere():
            label = self._origin.label if self._origin is not None else "the upstream"
            self.refuse(GatewayError("UPSTREAM_TIMEOUT", f"{label} did not answer in time"))

    def _has_answer_begun(self) -> bool:
        """Tell whether the answer's head has come; it need not have gone out, see `Collected`."""
        return self.has_sent_head or (self.upstream is not None and self.upstream.has_head)

    def _waits_elsewhere(self) -> bool:
        endpoint = self._endpoint
        assert endpoint is not None  # it is asked
        return self._goes_elsewhere("first_byte", has_failed=not endpoint.is_hurried)

    def expire_total(self) -> None:
        """The time for the whole call has passed."""
        error = GatewayError("UPSTREAM_TIMEOUT", "the call took longer than this model's total_s allows")
        if self.state == WAITING:
            self.expire()
        elif self in self.plane.tunnels:
            self.cut_off(error)
        else:
            if self.has_sent_head and self._generation >= 0:
                self._end_attempt(has_failed=False)  # it was answering
            self.refuse(error)

    def _rest_is_long(self) -> bool:
        if self.head.expects_continue or self.head.is_chunked:
            return True
        return self.content_length - self.request_bytes > DISCARDED_BODY_BYTES_MAX

    def _waits_for_upload(self) -> bool:
        return not self.is_received and not self.has_sent_head and not self.downstream.is_reading_blocked(READ_UPLOAD)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abort()

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

    def _write(self, data: bytes) -> None:
        self.plane.outbox.write(self.downstream.transport, data)
