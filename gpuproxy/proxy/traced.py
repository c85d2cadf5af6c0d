"""Exchanges that belong to a trace; workers make them instead of plain ones while ``[traces]`` is on.

A call takes part in the trace its caller names in ``traceparent``, or begins one. Each attempt tells the upstream an id
of its own, so that what the upstream does hangs below the attempt it did it for. What is noted goes into the receipt;
control makes spans of it. A call that is not sampled passes on what its caller said, or says that it is not sampled.
"""

import time
from random import getrandbits
from typing import TYPE_CHECKING

import msgspec

from gpuproxy.codec import traceparent
from gpuproxy.proxy.exchange import Exchange
from gpuproxy.proxy.headers import Field, join_fields
from gpuproxy.proxy.heads import RequestHead
from gpuproxy.proxy.route import CONTROL
from gpuproxy.types import Attempt, Outcome, Receipt, Trace, Usage

if TYPE_CHECKING:
    from gpuproxy.proxy.downstream import Downstream
    from gpuproxy.proxy.endpoint import Endpoint
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane

_OPERATIONS = (  # by how the path ends; "GenAI" of OpenTelemetry's semantic conventions names them
    (b"/chat/completions", "chat"),
    (b"/completions", "text_completion"),
    (b"/messages", "chat"),
    (b"/responses", "chat"),
    (b"/embeddings", "embeddings"),
    (b"/chat", "chat"),
    (b"/generate", "text_completion"),
    (b"/generate_stream", "text_completion"),
    (b"/embed", "embeddings"),
)


class Inherited:
    """What the fields of a call say of its trace; `state` is what other systems keep there, as lines."""

    __slots__ = ("context", "state")

    def __init__(self, fields: list[Field]) -> None:
        parents = [value for name, value in fields if name.lower() == b"traceparent"]
        self.context = traceparent.parse(parents[0]) if len(parents) == 1 else None
        states = [field for field in fields if field[0].lower() == b"tracestate"]
        self.state = join_fields(states) if self.context is not None else b""  # belongs to the trace that was named


def take_over(fields: list[Field]) -> Inherited:
    """Return what the fields say of a trace, and take it out of them."""
    inherited = Inherited(fields)
    fields[:] = [field for field in fields if field[0].lower() not in (b"traceparent", b"tracestate")]
    return inherited


class Note:
    """What is noted of one call while it lasts; `status` is what the upstream answered inside an envelope."""

    __slots__ = ("_address", "_began_us", "attempts", "inherited", "is_sampled", "operation", "reason", "span_id",
                 "status", "trace_id")  # fmt: skip

    def __init__(self, inherited: Inherited, ratio: float) -> None:
        context = inherited.context
        self.inherited = inherited
        self.trace_id = context.trace_id if context is not None else f"{getrandbits(128) or 1:032x}"
        self.is_sampled = context.is_sampled if context is not None else is_chosen(self.trace_id, ratio)
        self.span_id = getrandbits(63) | 1  # those of the attempts are the next numbers
        self.attempts: list[Attempt] = []
        self.operation = ""
        self.reason = (0, "")  # why the attempt under way is given up
        self.status = 0
        self._began_us = -1
        self._address = "", 0

    def begin(self, host: str, port: int, now_us: int) -> bytes:
        """Note that the call is sent; return the lines that tell the upstream of its trace."""
        if self._began_us >= 0:
            self.attempts.append(self.attempt(now_us, *self.reason))
            self.reason = (0, "")
        self._began_us = now_us
        self._address = host, port
        inherited = self.inherited
        context = inherited.context
        if context is not None and not self.is_sampled:
            parent = int(context.span_id, 16)
        else:
            parent = self.span_id + len(self.attempts) + 1
        value = traceparent.render(self.trace_id, parent, self.is_sampled)
        return b"traceparent: %b\r\n%b" % (value, inherited.state)

    def attempt(self, now_us: int, status: int, error: str = "") -> Attempt:
        """Return the attempt under way as it would be if it ended now."""
        return Attempt(self._began_us, now_us - self._began_us, *self._address, status, error)

    def trace(self, now_us: int, status: int, response_model: str) -> Trace | None:
        """Return what becomes spans if the call ends now, None if none are wanted."""
        if not self.is_sampled:
            return None
        attempts = [*self.attempts, self.attempt(now_us, status)] if self._began_us >= 0 else []
        context = self.inherited.context
        parent_id = context.span_id if context is not None else ""
        return Trace(self.span_id, parent_id, self.operation, attempts, response_model)


class TracedExchange(Exchange):
    """An exchange with a note."""

    __slots__ = ("_note", "trace_lines")

    def __init__(self, plane: "Plane", downstream: "Downstream", head: RequestHead, content_length: int) -> None:
        super().__init__(plane, downstream, head, content_length)
        self._note: Note | None = None
        self.trace_lines = b""

    def _forward(self, endpoint: "Endpoint") -> None:
        if self.route.kind != CONTROL:
            _, path, fields, _, _ = self._sending
            note = self._note or self._begin(fields)
            if not note.operation and self._intent is not None and self._intent.model:
                note.operation = operation_of(path)
            self.trace_lines = self._next_attempt(note, endpoint)
        super()._forward(endpoint)

    def _ask_anew(self) -> None:
        if self._note is not None and self._endpoint is not None:
            self._note.reason = 0, "lost"
            before, self.trace_lines = self.trace_lines, self._next_attempt(self._note, self._endpoint)
            self._head = self._head.replace(before, self.trace_lines, 1)
        super()._ask_anew()

    def _goes_elsewhere(
        self, reason: str, connection: "UpstreamConnection | None" = None, has_failed: bool = True
    ) -> bool:
        if self._note is not None:
            self._note.reason = connection.head.status if connection is not None else 0, reason or "unreachable"
        return super()._goes_elsewhere(reason, connection, has_failed)

    def _goes_unasked(self, connection: "UpstreamConnection") -> None:
        if self._note is not None:
            self._note.reason = connection.head.status, "usage_refused"
        super()._goes_unasked(connection)

    def _wrap(self, connection: "UpstreamConnection", body: bytes) -> None:
        if self._note is not None:
            self._note.status = connection.head.status
        super()._wrap(connection, body)

    def _receipt(self, outcome: Outcome, usage: Usage, now_ns: int) -> Receipt:
        receipt = super()._receipt(outcome, usage, now_ns)
        note = self._note or self._begin(self.head.fields)
        status = self._status if self._first_byte_ns and self._collected is None else note.status
        trace = note.trace(self._since_start_us(now_ns), status, getattr(self._reader, "response_model", ""))
        return msgspec.structs.replace(receipt, trace_id=note.trace_id, trace=trace)

    def _begin(self, fields: list[Field]) -> Note:
        head = self.head
        if fields is not head.fields:  # an envelope's own
            inherited = take_over(fields)
        elif (known := head.inherited) is not None:
            inherited = known
        else:
            inherited = head.inherited = take_over(fields)
        note = self._note = Note(inherited, self.plane.config.traces.sample_ratio)
        return note

    def _next_attempt(self, note: Note, endpoint: "Endpoint") -> bytes:
        key = endpoint.origin.key
        return note.begin(key.host, key.port, self._since_start_us(time.monotonic_ns()))

    def _since_start_us(self, now_ns: int) -> int:
        return (now_ns - self._started_ns) // 1000


def is_chosen(trace_id: str, ratio: float) -> bool:
    """Tell whether a trace that begins here is sampled; whoever asks with this ratio says the same of it."""
    return int(trace_id[16:], 16) < ratio * (1 << 64)


def operation_of(path: bytes) -> str:
    """Return what a call with this path asks of a model, empty if that is not known."""
    plain = path.partition(b"?")[0]
    return next((operation for end, operation in _OPERATIONS if plain.endswith(end)), "")
