"""One proxied call from its head to its receipt: the phases in one straight line.

    start -> admitted -> (whole body, if the route needs it) -> resolve -> forward -> relay -> finish

A phase awaits nothing: what must wait (an unknown key, a new connection) goes on by a call-back. In the common
case, known key and pooled connection, a call is handled without creating a task, future or timer. Whatever
happens, `_finish` runs exactly once for each exchange that was started and writes exactly one receipt.

The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
"""

import time
from typing import TYPE_CHECKING

import msgspec

from gpuproxy.errors import CODES, GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import Call, Intent, ProtocolHandler, UpstreamRequest, UsageReader
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy import tunnel
from gpuproxy.proxy.admit import is_expired
from gpuproxy.proxy.guard import parse_target
from gpuproxy.proxy.headers import (
    Field,
    checked_fields,
    join_fields,
    replace_fields,
    without_nominated,
)
from gpuproxy.proxy.heads import AnswerHead, RequestHead, status_line
from gpuproxy.proxy.route import CONTROL, ENVELOPE, MOUNT, UNKNOWN, Destination, Endpoint, Route, joined_path
from gpuproxy.types import ALL_SCOPES, Grant, Outcome, Receipt, Usage

if TYPE_CHECKING:
    from gpuproxy.proxy.downstream import Downstream
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.upstream import UpstreamConnection
    from gpuproxy.proxy.worker import Plane

_log = get_logger("gpuproxy.exchange")

# States, in the order they are passed through.
NEW, ADMITTING, COLLECTING, CONNECTING, SENT, DONE = range(6)

# Reasons not to read from the client for now; reading goes on when none is left.
READ_UPLOAD, READ_QUEUE, READ_BUFFER = 1, 2, 4

DISCARDED_BODY_BYTES_MAX = 262_144  # of a refused upload that is read to keep the connection usable
PSEUDONYM = b"gpuproxy"
VIA_HOPS_MAX = 2  # how often a request may pass this gateway before it is a loop
JOINED_BYTES_MAX = 16_384  # a body up to this is copied behind its head for one write; above, two writes are cheaper

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Exchange:
    """One request and its answer on a client connection. The connection fills in what the head says."""

    __slots__ = (
        "_answer_parts",
        "_answer_size",
        "_attempts",
        "_call",
        "_destination",
        "_error",
        "_first_byte_ns",
        "_give_up_ns",
        "_grant",
        "_handler",
        "_head",
        "_idle_s",
        "_intent",
        "_is_answer_chunked",
        "_is_answer_until_close",
        "_is_body_whole",
        "_is_paused",
        "_needs_body",
        "_origin",
        "_patience_s",
        "_reader",
        "_response_bytes",
        "_sending",
        "_started_ns",
        "_status",
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
    _sending: tuple[bytes, bytes, list[Field], bytes | None, UpstreamRequest]

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
        self._handler: ProtocolHandler | None = None
        self._call: Call | None = None
        self._intent: Intent | None = None
        self._destination: Destination | None = None
        self._origin: Origin | None = None
        self._head = b""
        self._attempts = 0
        self._patience_s = plane.timeouts.first_byte_s  # for the answer's first byte
        self._give_up_ns = 0
        # the answer
        self.has_sent_head = self._is_answer_chunked = self._is_answer_until_close = self._is_paused = False
        self._reader: UsageReader | None = None
        self._answer_parts: list[bytes] | None = None
        self._answer_size = self._status = self._response_bytes = self._first_byte_ns = 0
        self._idle_s = 0.0
        self._error = ""

    # -- admit ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: classify the path, find out who is calling."""
        plane = self.plane
        self._started_ns = time.monotonic_ns()
        if not self.request_id:
            self.request_id = plane.new_id()
        self.state = ADMITTING
        head = self.head
        router = plane.router
        route = self.route = router.routes.get(head.target) or router.route(head.target)
        self._handler = route.handler
        downstream = self.downstream
        held = downstream.held
        if route.kind == CONTROL:
            self._forward_to_control()
        elif held is not None and head.credential == downstream.credential and held.fresh_until_s > plane.now_s:
            self.admitted(held.grant)  # the same caller as before on this connection: the common case
        else:
            self._authenticate()

    def _authenticate(self) -> None:
        downstream = self.downstream
        try:
            if not self.head.credential:
                raise GatewayError("UNAUTHORIZED", "no API key; send it as X-API-Key or Authorization: Bearer")
            held = downstream.held = self.plane.admission.find(self.head.credential, self.answered)
        except GatewayError as error:
            self.refuse(error)
            return
        if held is not None:
            downstream.credential = self.head.credential
            self.admitted(held.grant)
        else:
            downstream.deadline_s = self.plane.now_s + self.plane.config.auth.authorize_timeout_s + 1

    def answered(self, result: Grant | GatewayError) -> None:
        """Control has told about an unknown key, or could not."""
        if self.state != ADMITTING:
            return
        if isinstance(result, GatewayError):
            self.refuse(result)
        else:
            self.admitted(result)

    def admitted(self, grant: Grant) -> None:
        """The caller is known: check what can be checked before the body, then resolve or wait for the body."""
        self._grant = grant
        plane = self.plane
        downstream = self.downstream
        handler = self._handler
        try:
            if grant.revoked or grant.expires_ns or grant.scopes != ALL_SCOPES:
                self._check_grant(grant)
            if plane.journal.is_full:
                raise GatewayError("JOURNAL_FULL", "usage cannot be recorded at the moment; try again", 5)
            if self.head.via and self.head.via.count(PSEUDONYM) >= VIA_HOPS_MAX:
                raise GatewayError("LOOP_DETECTED", "the request has passed this gateway before; check the target")
            if handler is None:
                self._check_route()
            if self.has_body:
                needs_body = self.head.needs_body
                if needs_body is None:
                    needs_body = handler is None or handler.needs_body(self.method, self.route.path)
                    self.head.needs_body = needs_body
                self._needs_body = needs_body or grant.models is not None
                limits = plane.limits
                limit_bytes = limits.buffered_body_bytes_max if self._needs_body else limits.body_bytes_max
                if self.content_length > limit_bytes or self.request_bytes > limit_bytes:
                    raise _body_too_large(limit_bytes)
        except GatewayError as error:
            self.refuse(error)
            return
        if not self.is_received:
            if downstream.read_blocks:
                downstream.unblock_reading(READ_BUFFER)
            if self.head.expects_continue and not self.held_body:
                self._write(_CONTINUE)
            if self._needs_body:
                self.state = COLLECTING
                downstream.deadline_s = plane.now_s + plane.timeouts.body_idle_s
                return
        self._resolve()

    def _check_grant(self, grant: Grant) -> None:
        if grant.revoked or (grant.expires_ns and is_expired(grant)):
            raise GatewayError("UNAUTHORIZED", "this API key is expired or revoked")
        if "inference" not in grant.scopes:
            raise GatewayError("FORBIDDEN", "this API key lacks the scope 'inference'")

    def _check_route(self) -> None:
        route = self.route
        if route.kind == UNKNOWN:
            raise GatewayError(route.code, route.fault)
        if route.kind == ENVELOPE and self.method != b"POST":
            raise GatewayError("METHOD_NOT_ALLOWED", f"{route.shown} takes POST with a JSON envelope")

    # -- the body ---------------------------------------------------------------------------------------

    def take_body(self, data: bytes) -> None:
        """Take the next piece of the body: hold it, send it on, or drop it when the call is over."""
        self.request_bytes = size = self.request_bytes + len(data)
        if self.state == SENT and not self._is_body_whole:
            if size > self.plane.limits.body_bytes_max:
                self.refuse(_body_too_large(self.plane.limits.body_bytes_max))
            else:
                self._send_body(data)
        elif self.state == DONE:
            if size > DISCARDED_BODY_BYTES_MAX:
                self.downstream.close_gently()
        else:
            self.held_body.append(data)
            if size != self.content_length:
                self._bound_held_body(size)

    def _bound_held_body(self, size: int) -> None:
        limits = self.plane.limits
        limit_bytes = limits.buffered_body_bytes_max if self._needs_body else limits.body_bytes_max
        if size > limit_bytes:
            self.refuse(_body_too_large(limit_bytes))
        elif self._needs_body:
            self.downstream.deadline_s = self.plane.now_s + self.plane.timeouts.body_idle_s
        elif size > limits.write_buffer_bytes:
            self.downstream.block_reading(READ_BUFFER)

    def end_body(self) -> None:
        """The request is whole."""
        state = self.state
        if state == COLLECTING:
            self._resolve()
        elif state == SENT:
            if not self._is_body_whole:
                self._end_upload()
        elif state == DONE and self.downstream.current is self:
            self.downstream.next()

    def block_upload(self) -> None:
        """The upstream takes no more bytes for now."""
        self.downstream.block_reading(READ_UPLOAD)

    def unblock_upload(self) -> None:
        """The upstream takes bytes again."""
        self.downstream.unblock_reading(READ_UPLOAD)

    def _send_body(self, data: bytes) -> None:
        upstream = self.upstream
        assert upstream is not None
        piece = b"%x\r\n%b\r\n" % (len(data), data) if self.head.is_chunked else data
        self.plane.outbox.write(upstream.transport, piece)
        if self.request_bytes <= JOINED_BYTES_MAX:
            self.held_body.append(data)  # in case the connection turns out to be stale
        if len(piece) > JOINED_BYTES_MAX:
            self.plane.outbox.flush()  # as in `relay`
        self.downstream.deadline_s = self.plane.now_s + self.plane.timeouts.body_idle_s

    def _end_upload(self) -> None:
        if self.head.is_chunked and self.upstream is not None:
            self.plane.outbox.write(self.upstream.transport, b"0\r\n\r\n")
        if not self.has_sent_head:
            self.downstream.deadline_s = self.plane.now_s + self._patience_s

    # -- route ------------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        route = self.route
        handler = route.handler
        parts = self.held_body
        body = (parts[0] if len(parts) == 1 else b"".join(parts)) if self.is_received else None
        try:
            if handler is None:
                self._resolve_envelope(body or b"")
                return
            head = self.head
            call = self._call = Call(self.method, route.path, head.fields, body)
            if route.kind == MOUNT:
                intent = self._intent = handler.inspect(call)
                destination = self._destination = self.plane.router.destination(intent, handler)
            else:
                intent = self._intent = handler.describe(call)
                assert route.upstream is not None
                destination = self._destination = route.upstream
            if self._grant.models is not None:  # type: ignore[union-attr]  # admitted
                self._check_model(intent.model)
            request = handler.prepare(call, intent)
            call.body = None
            path = request.path
            if path is None:
                path = route.path if intent.path is None else intent.path
            fields = head.fields
            if destination.fixed_names:
                fields = [field for field in fields if field[0].lower() not in destination.fixed_names]
            self._patience_s = destination.first_byte_s
            self._forward(destination.endpoint(), self.method, path, fields, body, request)
        except GatewayError as error:
            self.refuse(error)
        except Exception:
            _log.exception("exchange failed", request_id=self.request_id)
            self.refuse(GatewayError("INTERNAL", "the gateway failed; the request id finds it in the log"))

    def _check_model(self, model: str) -> None:
        grant = self._grant
        assert grant is not None
        models = grant.models
        if models is not None and model not in models and (model or self.has_body):
            allowed = ", ".join(models[:20]) or "none"
            raise GatewayError(
                "FORBIDDEN",
                f"this API key may not use model {model[:100]!r}; allowed: {allowed}",
                param="model",
            )

    def _resolve_envelope(self, body: bytes) -> None:
        envelope = envelopes.decode(body)
        router = self.plane.router
        handler = router.handler(envelope.protocol)
        target = parse_target(envelope.target_url)
        fields = checked_fields(envelope.headers or {})
        content = envelope.content()
        method = (envelope.method or "GET").encode()
        call = self._call = Call(method, target.path.encode(), fields, content, is_envelope=True)
        intent = self._intent = handler.describe(call)
        self._check_model(intent.model)
        request = handler.prepare(call, intent)
        if (
            content is not None
            and call.header(b"content-type") is None
            and not _names(request.headers, b"content-type")
        ):
            kind = b"text/plain; charset=utf-8" if bytes(envelope.body)[:1] == b'"' else b"application/json"
            fields = [*fields, (b"Content-Type", kind)]
        endpoint = router.endpoint_at(target.scheme, target.host, target.port)
        if endpoint is None:
            origin = self.plane.pools.user_given(target.scheme, target.host, target.port)
            endpoint = Endpoint(origin, b"", b"", target.authority.encode())
        if not envelopes.wants_stream(envelope):
            self._answer_parts = []
            if call.header(b"accept-encoding") is None:
                fields = [*fields, (b"Accept-Encoding", b"identity")]
        self._handler = handler
        self.held_body = []
        self.content_length = -1 if content is None else len(content)
        self.has_body = content is not None
        if envelope.timeout_s is not None:
            self._patience_s = envelope.timeout_s
            self._give_up_ns = self._started_ns + int(envelope.timeout_s * 1e9)
        path = request.path if request.path is not None else call.path or b"/"
        endpoint = msgspec.structs.replace(endpoint, base_path=b"")  # a target's path is whole
        self._forward(endpoint, call.method, path, fields, content, request)

    # -- forward ----------------------------------------------------------------------------------------

    def _forward(
        self,
        endpoint: Endpoint,
        method: bytes,
        path: bytes,
        fields: list[Field],
        body: bytes | None,
        request: UpstreamRequest,
    ) -> None:
        self._sending = method, path, fields, body, request
        head = self.head
        is_plain = fields is head.fields and not request.headers
        block = head.blocks.get(request.identity) if is_plain else None
        if block is None:
            block = self._block(fields, request)
            if is_plain:
                head.blocks[request.identity] = block
        if request.body is not None:
            body = request.body
        if head.is_upgrade:
            framing = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        elif body is not None:
            self._is_body_whole = True
            self.held_body = [body]
            has_length = self.has_body or self.content_length >= 0 or body
            framing = b"Content-Length: %d\r\n" % len(body) if has_length else b""
        elif self.has_body and head.is_chunked:
            framing = b"Transfer-Encoding: chunked\r\n"
        elif self.content_length >= 0:
            framing = b"Content-Length: %d\r\n" % self.content_length
        else:
            framing = b""
        base_path = endpoint.base_path
        if base_path or path[:1] != b"/":
            path = joined_path(base_path, path)
        self._head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%bX-Request-Id: %b\r\n%b\r\n" % (
            method,
            path,
            head.host if endpoint.preserves_host and head.host else endpoint.host,
            endpoint.fixed_fields,
            block,
            self.request_id.encode(),
            framing,
        )
        self._attempts += 1
        origin = self._origin = endpoint.origin
        connection = origin.take(self.plane.now_s)
        if connection is not None:
            self._send(connection)
        else:
            self._connect_to(origin)

    def _block(self, fields: list[Field], request: UpstreamRequest) -> bytes:
        # the lines of the upstream's head that do not change from one call with this head to the next
        head = self.head
        if self._call is not None and self._call.is_envelope:
            return b"%bVia: 1.1 gpuproxy\r\n" % join_fields(replace_fields(fields, request.headers))
        if head.connection:
            fields = without_nominated(fields, head.connection)
        if request.headers:
            fields = replace_fields(fields, request.headers)
        encoding = b"identity" if request.identity else head.accept_encoding
        return b"%b%bVia: %b1.1 gpuproxy\r\n%b" % (
            join_fields(fields),
            b"Accept-Encoding: %b\r\n" % encoding if encoding else b"",
            head.via + b", " if head.via else b"",
            self.downstream.forwarded_fields(head),
        )

    def _forward_to_control(self) -> None:
        head = self.head
        fields = [*head.fields, *head.own_fields] if head.own_fields else head.fields
        if head.expects_continue and not self.is_received:
            self._write(_CONTINUE)
        self._forward(self.plane.control_endpoint, self.method, head.target, fields, None, _UNCHANGED)

    def _connect_to(self, origin: "Origin") -> None:
        self.state = CONNECTING
        self.plane.spawn(self._connect(origin))

    async def _connect(self, origin: "Origin") -> None:
        try:
            connection = await origin.connect()
        except GatewayError as error:
            if self.state == CONNECTING:
                self._unreachable(error)
            return
        if self.state == CONNECTING:
            self._send(connection)
        else:  # the client left meanwhile; somebody else will want the connection
            origin.give(connection, self.plane.now_s)

    def _unreachable(self, error: GatewayError) -> None:
        destination = self._destination
        retries = error.code in ("UPSTREAM_UNREACHABLE", "UPSTREAM_TIMEOUT", "UPSTREAM_BUSY")
        if retries and destination is not None and self._attempts < len(destination.endpoints):
            self._forward(destination.endpoint(), *self._sending)  # nothing was sent: another replica may take it
        else:
            self.refuse(error)

    def _send(self, connection: "UpstreamConnection") -> None:
        plane = self.plane
        outbox = plane.outbox
        self.state = SENT
        self.upstream = connection
        connection.exchange = self
        connection.chosen_turn = outbox.turn
        if self._is_body_whole:
            body = self.held_body[0]
            if len(body) <= JOINED_BYTES_MAX:
                outbox.writes.append((connection.transport, self._head + body))
            else:
                outbox.writes.append((connection.transport, self._head))
                outbox.writes.append((connection.transport, body))
            if not outbox.is_scheduled:
                outbox.schedule()
            self.downstream.deadline_s = plane.now_s + self._patience_s
            return
        outbox.write(connection.transport, self._head)
        held, self.held_body = self.held_body, []
        self.downstream.unblock_reading(READ_BUFFER)
        for part in held:
            self._send_body(part)
        if self.is_received:
            self._end_upload()
        else:
            self.downstream.deadline_s = plane.now_s + plane.timeouts.body_idle_s

    def _stream_idle_s(self) -> float:
        destination = self._destination
        return self.plane.timeouts.idle_s if destination is None else destination.idle_s

    # -- relay ------------------------------------------------------------------------------------------

    def relay(self, connection: "UpstreamConnection") -> None:
        """Pass on what one read of the upstream brought: head, body bytes, the end."""
        parts = connection.parts
        if parts:
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            connection.parts = []
        else:
            body = b""
        if body and self._is_answer_chunked and not connection.is_complete:
            self._relay_piece(body)
            return
        if self._answer_parts is not None:
            self._collect(connection, body)
            return
        downstream = self.downstream
        is_complete = connection.is_complete
        out = b"" if self.has_sent_head else self._answer_head(connection)
        outbox = self.plane.outbox
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
            if size > JOINED_BYTES_MAX:
                outbox.flush()  # a peer that takes no more must stop the reading in this very turn
        if size and self._reader is not None:
            self._reader.feed(body)
        if is_complete:
            self._complete(connection)
        else:
            if downstream.is_write_blocked and not self._is_paused:
                self.pause_answer()
            downstream.deadline_s = self.plane.now_s + self._idle_s

    def _relay_piece(self, body: bytes) -> None:
        # the middle of a stream: the head is out, the end is not in sight
        downstream = self.downstream
        outbox = self.plane.outbox
        size = len(body)
        self._response_bytes += size
        outbox.writes.append((downstream.transport, b"%x\r\n%b\r\n" % (size, body)))
        if not outbox.is_scheduled:
            outbox.schedule()
        if size > JOINED_BYTES_MAX:
            outbox.flush()  # a peer that takes no more must stop the reading in this very turn
        if self._reader is not None:
            self._reader.feed(body)
        if downstream.is_write_blocked and not self._is_paused:
            self.pause_answer()
        downstream.deadline_s = self.plane.now_s + self._idle_s

    def _answer_head(self, connection: "UpstreamConnection") -> bytes:
        self.has_sent_head = True
        self._first_byte_ns = time.monotonic_ns()
        head = connection.head
        status = self._status = head.status
        self._head = b""
        self.held_body = []
        if connection.content_length >= 0 and status != 204:
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
        if not connection.is_complete:
            self._idle_s = self._stream_idle_s()
        if not self.keeps_alive or not self.is_received or self.plane.is_draining:
            self.keeps_alive = False  # `not is_received`: the rest of an upload that is answered early is not wanted
            framing += b"Connection: close\r\n"
        elif self.head.is_http_1_0:
            framing += b"Connection: keep-alive\r\n"
        return b"%bX-Request-Id: %b\r\n%b\r\n" % (head.start, self.request_id.encode(), framing)

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
        if not self.head.is_http_1_0 and self._answer_parts is None and not self.has_sent_head:
            self._write(head.start + b"\r\n")

    def pause_answer(self) -> None:
        """The client takes no more: stop reading the upstream."""
        if self.upstream is not None and not self._is_paused and not self.upstream.transport.is_closing():
            self._is_paused = True
            self.upstream.transport.pause_reading()

    def resume_answer(self) -> None:
        """The client takes bytes again."""
        if self._is_paused:
            self._is_paused = False
            self.downstream.deadline_s = self.plane.now_s + self._idle_s
            if self.upstream is not None and not self.upstream.transport.is_closing():
                self.upstream.transport.resume_reading()

    # -- the envelope's answer ----------------------------------------------------------------------------

    def _collect(self, connection: "UpstreamConnection", body: bytes) -> None:
        parts = self._answer_parts
        assert parts is not None
        if not self._first_byte_ns:
            self._first_byte_ns = time.monotonic_ns()
        if body:
            parts.append(body)
            self._answer_size += len(body)
            limit = self.plane.limits.envelope_answer_bytes_max
            if self._answer_size > limit:
                self.upstream_faulted(connection, f'its answer is over {limit} bytes; use "stream": true')
                return
        if connection.is_complete:
            self._wrap(connection, b"".join(parts))
        else:
            self.downstream.deadline_s = self.plane.now_s + self._rest_s()

    def _rest_s(self) -> float:
        # a collected answer must be whole within the envelope's own time
        if not self._give_up_ns:
            return self._stream_idle_s()
        return max(0.0, (self._give_up_ns - time.monotonic_ns()) / 1e9)

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
        self._reader = _Known(usage)
        self._write_json(200, answer, b"")
        self._complete(connection)

    def _write_json(self, status: int, body: bytes, extra_fields: bytes) -> None:
        self.has_sent_head = True
        self._status = status
        self._response_bytes += len(body)
        if not self.keeps_alive or self.plane.is_draining:
            extra_fields += b"Connection: close\r\n"
        elif self.head.is_http_1_0:
            extra_fields += b"Connection: keep-alive\r\n"
        self._write(
            b"%bContent-Type: application/json\r\nContent-Length: %d\r\nX-Request-Id: %b\r\n%b\r\n%b"
            % (
                status_line(status),
                len(body),
                self.request_id.encode(),
                extra_fields,
                b"" if self.method == b"HEAD" else body,
            )
        )

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
        if handler is not None and self._answer_parts is None and self.route.kind != ENVELOPE:
            body = handler.refuse(self.route.path, error, self.request_id)
        else:
            body = default_refusal(error, self.request_id)
        if not self.is_received and self._rest_is_long():
            self.keeps_alive = False
        self._write_json(error.status, body, _error_fields(error))
        self._finish("upstream_failed" if CODES[error.code].source == "upstream" else "refused")

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
        else:
            message = f"{connection.origin.label} closed the connection before its answer was whole"
            self.refuse(GatewayError("UPSTREAM_INVALID", message))

    def _can_replay(self) -> bool:
        is_held = self._is_body_whole or self.request_bytes <= JOINED_BYTES_MAX
        return self.state == SENT and self.is_received and is_held

    def upstream_faulted(self, connection: "UpstreamConnection", reason: str) -> None:
        """The upstream's bytes cannot be passed on."""
        self.refuse(GatewayError("UPSTREAM_INVALID", f"{connection.origin.label}: {reason}"))

    def _cut(self, code: str) -> None:
        # the end must not look clean: no last chunk, missing bytes, or a reset where only the end would show
        self._error = code
        self._drop_upstream()
        self.keeps_alive = False
        if self._is_answer_until_close:
            self.downstream.abort()
        self._finish("upstream_failed")

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
        elif state == ADMITTING:
            self.refuse(GatewayError("UNAVAILABLE", "keys cannot be checked at the moment; try again", 1))
        else:
            label = self._origin.label if self._origin is not None else "the upstream"
            self.refuse(GatewayError("UPSTREAM_TIMEOUT", f"{label} did not answer in time"))

    def _waits_for_upload(self) -> bool:
        return not self.is_received and not self.has_sent_head and not self.downstream.is_reading_blocked(READ_UPLOAD)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abort()

    # -- tunnels --------------------------------------------------------------------------------------------

    def switch_protocols(self, connection: "UpstreamConnection") -> None:
        """The upstream agreed to switch: pass its 101 on and join both sides byte by byte."""
        self.has_sent_head = True
        self._status = 101
        self._first_byte_ns = time.monotonic_ns()
        downstream = self.downstream
        head = connection.head
        self._write(
            b"%bConnection: Upgrade\r\nUpgrade: %b\r\nX-Request-Id: %b\r\n\r\n"
            % (head.start, head.upgrade, self.request_id.encode())
        )
        held, downstream.after_upgrade = downstream.after_upgrade or b"", b""
        connection.exchange = None
        self.upstream = None
        downstream.current = None
        self.plane.downstreams.discard(downstream)
        downstream.unblock_reading(READ_BUFFER)
        self.plane.outbox.flush()
        ends = tunnel.join(downstream.transport, connection.transport, self._end_tunnel)
        self._answer_parts = None
        self.plane.tunnels[self] = ends
        connection.origin.forget(connection)
        if held:
            ends[0].data_received(held)
        if connection.tunnel_bytes:
            ends[1].data_received(connection.tunnel_bytes)

    def _end_tunnel(self) -> None:
        ends = self.plane.tunnels.pop(self, None)
        if ends is not None:
            self.request_bytes, self._response_bytes = ends[0].byte_count, ends[1].byte_count
        self._finish("ok")

    # -- finish ---------------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        """Write the receipt and let the connection go on. Runs once."""
        self.state = DONE
        self.held_body = []
        route = self.route
        if route.kind != CONTROL:
            plane = self.plane
            started_ns = self._started_ns
            first_byte_ns = self._first_byte_ns
            request_id = self.request_id
            grant = self._grant or NO_GRANT
            intent = self._intent or NO_INTENT
            handler = self._handler
            destination = self._destination
            reader = self._reader
            usage = (reader.finish() if reader is not None else None) or NO_USAGE
            receipt = Receipt(
                plane.new_id() if self.head.request_id else request_id,
                request_id,
                plane.wall_offset_ns + started_ns,
                (time.monotonic_ns() - started_ns) // 1000,
                (first_byte_ns - started_ns) // 1000 if first_byte_ns else -1,
                grant.user_id,
                grant.key_id,
                handler.name if handler is not None else "",
                destination.name if destination is not None else "",
                intent.model,
                self.method.decode(),
                route.shown,
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
            )
            plane.journal.append(receipt)
            if not plane.outbox.is_scheduled:
                plane.outbox.schedule()
        if self._status != 101:
            self.downstream.ended(self, not self.keeps_alive or (outcome == "ok" and not self.is_received))


def _body_too_large(limit_bytes: int) -> GatewayError:
    return GatewayError("BODY_TOO_LARGE", f"the body is over {limit_bytes} bytes")


NO_GRANT = Grant("", "")
NO_INTENT = Intent()
NO_USAGE = Usage(-1, -1, -1, "none")
_UNCHANGED = UpstreamRequest()


class _Known:
    """Stands in for a reader whose result is known already."""

    def __init__(self, usage: Usage | None) -> None:
        self._usage = usage

    def feed(self, data: bytes) -> None:
        """Nothing more comes."""

    def finish(self) -> Usage | None:
        """Return the usage."""
        return self._usage


def _names(fields: list[Field], name: bytes) -> bool:
    return any(field[0].lower() == name for field in fields)


_encode_json = msgspec.json.Encoder().encode


def default_refusal(error: GatewayError, request_id: str) -> bytes:
    """Return the gateway's own error body."""
    return _encode_json({"error": error.message, "code": error.code, "request_id": request_id})


def _error_fields(error: GatewayError) -> bytes:
    lines = b""
    if error.retry_after_s is not None:
        lines += b"Retry-After: %d\r\n" % error.retry_after_s
    if error.code == "UNAUTHORIZED":
        lines += b"WWW-Authenticate: Bearer\r\n"
    if not CODES[error.code].is_retryable:
        lines += b"x-should-retry: false\r\n"
    return lines
