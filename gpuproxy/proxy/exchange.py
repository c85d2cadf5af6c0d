"""One proxied call from its head to its receipt: the phases in one straight line.

    start -> admitted -> (whole body, if the route needs it) -> resolve -> (pay) -> forward -> relay -> finish

A phase awaits nothing: what must wait (an unknown key, a new connection) goes on by a call-back. In the common
case, known key and pooled connection, a call is handled without creating a task, future or timer. Whatever
happens, `_finish` runs exactly once for each exchange that was started and writes exactly one receipt.

The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
"""

import time
from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.guard import Target, parse_target
from gpuproxy.link.wallet import Outcome as LeaseOutcome
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import Call, Intent, ProtocolHandler, UpstreamRequest
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy.admit import is_expired
from gpuproxy.proxy.answer import (
    ADMITTING,
    COLLECTING,
    CONNECTING,
    CONTINUE,
    DISCARDED_BODY_BYTES_MAX,
    DONE,
    JOINED_BYTES_MAX,
    PSEUDONYM,
    READ_BUFFER,
    READ_UPLOAD,
    SENT,
    VIA_HOPS_MAX,
)
from gpuproxy.proxy.attempts import Attempts
from gpuproxy.proxy.calls import bind_tools, check_protocol, needs_whole, price_of_call
from gpuproxy.proxy.credit import price_for, unknown_credit
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.headers import (
    Field,
    checked_fields,
    join_fields,
    replace_fields,
    without_nominated,
)
from gpuproxy.proxy.instances import Rented
from gpuproxy.proxy.limits import Slots
from gpuproxy.proxy.pins import pinned
from gpuproxy.proxy.route import CONTROL, ENVELOPE, INSTANCE, MOUNT, UNKNOWN, joined_path
from gpuproxy.proxy.visits import greeting
from gpuproxy.types import ALL_SCOPES, Grant

if TYPE_CHECKING:
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.upstream import UpstreamConnection

_log = get_logger("gpuproxy.exchange")


class Exchange(Attempts):
    """One request and its answer on a client connection: the way there. `Answer` is the way back."""

    __slots__ = ()

    trace_lines: bytes = b""  # more than none in a `TracedExchange`

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
                if (answer := greeting(self)) is not None:
                    self.answer_visitor(answer)
                    return
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
        purse = None
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
                    needs_body = handler is None or needs_whole(handler, self.head, self.route.path, plane.prices)
                    self.head.needs_body = needs_body
                self._needs_body = needs_body or grant.models is not None or grant.tools is not None
                limits = plane.limits
                limit_bytes = limits.buffered_body_bytes_max if self._needs_body else limits.body_bytes_max
                if self.content_length > limit_bytes or self.request_bytes > limit_bytes:
                    raise _body_too_large(limit_bytes)
            if grant.rpm:
                limiter = plane.limits_by_key
                purse = limiter.raised(grant, self.head.own_fields) if grant.rpm_ceiling else limiter.requests(grant)
                self._purse = purse
        except GatewayError as error:
            self.refuse(error)
            return
        if purse is not None and not purse.take(1, self.counted):
            downstream.deadline_s = plane.now_s + plane.config.auth.authorize_timeout_s + 1
            return
        self._go_on()

    def counted(self, outcome: LeaseOutcome) -> None:
        """Control has told whether one more request of this key may pass, or could not."""
        purse = self._purse
        assert purse is not None
        if outcome == "taken":
            purse.taken(1)
        if self.state != ADMITTING:
            return
        if outcome == "taken":
            self._go_on()
        elif outcome == "refused":
            self.refuse(purse.refusal())
        else:
            self.refuse(GatewayError("UNAVAILABLE", "limits cannot be checked at the moment; try again", 1))

    def _go_on(self) -> None:
        plane = self.plane
        downstream = self.downstream
        if not self.is_received:
            if downstream.read_blocks:
                downstream.unblock_reading(READ_BUFFER)
            if self.head.expects_continue and not self.held_body:
                self._write(CONTINUE)
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
        if self._call is not None:
            self._call.body_bytes = self.request_bytes
        if not self.has_sent_head:
            self.downstream.deadline_s = self.plane.now_s + self._patience_s

    # -- route ------------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        plane = self.plane
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
            if route.kind == INSTANCE:
                self._resolve_instance(call, handler)
                return
            if route.kind == MOUNT:
                intent = self._intent = handler.inspect(call)
                destination = self._destination = plane.router.destination(intent, handler)
            else:
                intent = self._intent = handler.describe(call)
                assert route.upstream is not None
                destination = self._destination = route.upstream
            grant = self._grant
            if intent.pin is not None:
                destination = self._destination = pinned(plane.router, destination, intent.pin, grant)
            if grant.tools is not None:  # type: ignore[union-attr]  # admitted
                bind_tools(call, self.head, grant.tools, handler, destination.handler, destination.upstream)  # type: ignore[union-attr]
            if grant.models is not None and call.tools is None:  # type: ignore[union-attr]  # admitted
                self._check_model(intent.model, destination.model)
            if not intent.model and route.kind == MOUNT and self._lists_models(call, handler, intent):
                return
            self._asked = intent.model
            if destination.model:
                intent.model = destination.model  # the caller may have used another name of it
            call.may_ask_usage = destination.may_ask_usage
            request = handler.prepare(call, intent)
            self._editor = request.editor  # type: ignore[assignment]  # see `edited`
            call.body = None
            call.body_bytes = self.request_bytes
            path = request.path
            if path is None:
                path = route.path if intent.path is None else intent.path
            self._sending = self.method, path, head.fields, body, request
            may_wait = plane.prices.is_any or grant.tpm or grant.streams  # type: ignore[union-attr]  # admitted
            if not may_wait or self._afford(intent, body, None):
                self._go(destination)
        except GatewayError as error:
            self.refuse(error)
        except Exception:
            self._fail()

    def _check_model(self, model: str, name: str = "") -> None:
        # `name` is the model's own, if `model` may be an alias
        grant = self._grant
        assert grant is not None
        models = grant.models
        if models is not None and model not in models and name not in models and (model or self.has_body):
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
        fields = envelopes.with_context(checked_fields(envelope.headers or {}), self.head.fields)
        content = envelope.content()
        method = (envelope.method or "GET").encode()
        call = self._call = Call(
            method, target.path.encode(), fields, content, is_envelope=True, body_bytes=len(content or b"")
        )
        intent = self._intent = handler.describe(call)
        endpoint = router.endpoint_at(target.scheme, target.host, target.port)
        tools = self._grant.tools  # type: ignore[union-attr]  # admitted
        if tools is not None:
            place = endpoint.destination if endpoint is not None else None
            names = (handler, place.handler, place.upstream) if place is not None else (handler, handler, target.host)
            bind_tools(call, self.head, tools, *names)
        if call.tools is None:
            self._check_model(intent.model)
        request = handler.prepare(call, intent)
        if endpoint is None:
            rented = self._rented()
            if rented is None:
                return
            endpoint = self._user_given(rented.outside(target))
        elif endpoint.destination is not None:
            place = endpoint.destination
            check_protocol(handler, place, self.plane.prices)
            self._destination = place if intent.pin is None else place.narrowed(endpoint)
            self._destination.budget.earn()
        endpoint = endpoint.at_root(envelope.timeout_s)  # a target's path is whole
        if not envelopes.wants_stream(envelope):
            limit_bytes = self.plane.limits.envelope_answer_bytes_max
            self._collected = envelopes.Collected(limit_bytes, envelope.timeout_s, self._started_ns)
        else:
            self._editor = request.editor  # type: ignore[assignment]  # see `edited`
        self._handler = handler
        self.held_body = []
        self.content_length = -1 if content is None else len(content)
        self.has_body = content is not None
        path = request.path if request.path is not None else call.path or b"/"
        fields = envelopes.completed_fields(envelope, fields, request.headers, self._collected is not None)
        self._sending = call.method, path, fields, content, request
        if self._afford(intent, content, endpoint):
            self._forward(endpoint)

    # -- pay ----------------------------------------------------------------------------------------------

    def _afford(self, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> bool:
        # take a stream's slot, count and set aside the most the call may use and cost
        # False: `slotted`, `metered` or `paid` goes on with it
        grant = self._grant
        assert grant is not None
        if grant.streams and (intent.is_stream or self.head.is_upgrade):
            slots = self.plane.limits_by_key.streams(grant)
            if not slots.take(1, lambda outcome: self.slotted(slots, outcome)):
                self._unpaid = intent, body, endpoint, 0
                self._wait_for_control()
                return False
            self._slots = slots
        return self._meter(intent, body, endpoint)

    def slotted(self, slots: Slots, outcome: LeaseOutcome) -> None:
        """Control has told whether one more stream may be open, or could not tell."""
        if outcome == "taken" and self.state == DONE:
            slots.give()
        if self.state == DONE:
            return
        if outcome == "refused":
            self.refuse(slots.refusal())
        elif outcome == "unknown":
            self.refuse(GatewayError("UNAVAILABLE", "limits cannot be checked at the moment; try again", 1))
        else:
            self._slots = slots
            intent, body, endpoint, _ = self._unpaid
            if self._meter(intent, body, endpoint):
                self._forward_to(endpoint)

    def _meter(self, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> bool:
        grant = self._grant
        assert grant is not None
        if grant.tpm and self.route.kind != INSTANCE:
            output_max = intent.max_output_tokens or self.plane.config.credit.output_tokens_default
            input_max = self._input_bytes_max() if body is None else len(body)
            most = min(grant.tpm, input_max + output_max * intent.choice_count)
            purse = self.plane.limits_by_key.tokens(grant)
            if not purse.take(most, self.metered):
                self._unpaid = intent, body, endpoint, most
                self._wait_for_control()
                return False
            self._tokens = purse, most, purse.lease_id
        return self._reserve(intent, body, endpoint)

    def metered(self, outcome: LeaseOutcome) -> None:
        """Control has told whether so many tokens may be used, or could not tell."""
        grant = self._grant
        assert grant is not None
        intent, body, endpoint, most = self._unpaid
        purse = self.plane.limits_by_key.tokens(grant)
        if outcome == "taken":
            purse.taken(most)
            self._tokens = purse, most, purse.lease_id
        if self.state == DONE:
            self._uncount(0)
        elif outcome == "refused":
            self.refuse(purse.refusal())
        elif outcome == "unknown":
            self.refuse(GatewayError("UNAVAILABLE", "limits cannot be checked at the moment; try again", 1))
        elif self._reserve(intent, body, endpoint):
            self._forward_to(endpoint)

    def _wait_for_control(self) -> None:
        self.state = ADMITTING
        self.downstream.deadline_s = self.plane.now_s + self.plane.config.auth.authorize_timeout_s + 1

    def _reserve(self, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> bool:
        plane = self.plane
        if not plane.prices.is_any:
            return True
        handler = self._handler
        assert handler is not None
        price = price_of_call(plane, self._destination, intent, self._started_ns, handler, body)
        if price is None:
            return True
        grant = self._grant
        assert grant is not None
        price = price_for(grant, price)
        if price is None:
            return True
        input_bytes = self._input_bytes_max() if body is None else len(body)
        bill = self._bill = plane.credit.bill(grant, intent, price, input_bytes)
        bill.endpoint = endpoint
        if price.second_nanousd:
            plane.timed[self] = None
        if plane.credit.reserve(bill, bill.lacking(), self.paid):
            return True
        self._wait_for_control()
        return False

    def _input_bytes_max(self) -> int:
        if not self.has_body:  # what a tunnel will carry nobody knows
            return self.plane.config.credit.output_tokens_default if self.head.is_upgrade else 0
        return self.content_length if self.content_length >= 0 else self.plane.limits.body_bytes_max

    def paid(self, outcome: LeaseOutcome) -> None:
        """Control has told whether what this call may cost could be reserved, or could not tell."""
        bill = self.told(outcome)
        if bill is None:
            return
        if outcome == "taken":
            self._forward_to(bill.endpoint)
        else:
            self.refuse(self.plane.credit.refusal(bill) if outcome == "refused" else unknown_credit())

    def _forward_to(self, endpoint: Endpoint | None) -> None:
        # what waited may go; without an endpoint its upstream chooses one
        try:
            if endpoint is None:
                assert self._destination is not None
                self._go(self._destination)
            else:
                self._forward(endpoint)
        except GatewayError as error:
            self.refuse(error)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        _log.exception("exchange failed", request_id=self.request_id)
        self.refuse(GatewayError("INTERNAL", "the gateway failed; the request id finds it in the log"))

    def _resolve_instance(self, call: Call, handler: ProtocolHandler) -> None:
        route = self.route
        rented = self._rented()
        if rented is None:
            return
        target = rented.at(route.contract_id, route.port)
        intent = self._intent = handler.describe(call)
        self._check_model(intent.model)
        request = handler.prepare(call, intent)
        self._editor = request.editor  # type: ignore[assignment]  # see `edited`
        body, call.body = call.body, None
        call.body_bytes = self.request_bytes
        endpoint = self._user_given(target)
        path = request.path if request.path is not None else route.path
        self._sending = self.method, path, self.head.fields, body, request
        may_wait = self.plane.prices.is_any or self._grant.streams  # type: ignore[union-attr]  # admitted
        if not may_wait or self._afford(intent, body, endpoint):
            self._forward(endpoint)

    def _user_given(self, target: Target) -> Endpoint:
        origin, timeouts = self.plane.pools.user_given(target.scheme, target.host, target.port), self.plane.timeouts
        return Endpoint(origin, target.authority.encode(), timeouts.first_byte_s, timeouts.idle_s)

    def _rented(self) -> Rented | None:
        """Return the caller's machines; None if control must be asked: then `rented` goes on."""
        grant = self._grant
        assert grant is not None
        rented = self.plane.instances.find(grant.user_id, self.rented)
        if rented is None:
            self.state = ADMITTING
            self.downstream.deadline_s = self.plane.now_s + self.plane.config.auth.authorize_timeout_s + 1
        return rented

    def rented(self, result: Rented | GatewayError) -> None:
        """Control has told which machines the caller has, or could not."""
        if self.state != ADMITTING:
            return
        if isinstance(result, GatewayError):
            self.refuse(result)
        else:
            self._resolve()

    # -- forward ----------------------------------------------------------------------------------------

    def _forward(self, endpoint: Endpoint) -> None:
        method, path, fields, body, request = self._sending
        if request.body is not None:
            body = self._question(endpoint, body, request) if request.asks_usage else request.body
        self._endpoint = endpoint
        self._patience_s = endpoint.first_byte_s
        replica = endpoint.replica
        if replica is not None:
            if replica.is_calm:
                replica.begun_count += 1
                self._generation = replica.generation
            else:
                self._attempt_ns = time.monotonic_ns()
                self._generation = replica.begin()
            if endpoint.model and endpoint.model != self._asked:
                path, body = self._renamed(endpoint, path, body)
        if endpoint.fixed_names:
            fields = [field for field in fields if field[0].lower() not in endpoint.fixed_names]
        head = self.head
        is_plain = fields is head.fields and not request.headers
        block = head.blocks.get(request.identity) if is_plain else None
        if block is None:
            block = self._block(fields, request)
            if is_plain:
                head.blocks[request.identity] = block
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
        self._head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%bX-Request-Id: %b\r\n%b\r\n" % (
            method,
            path,
            head.host if endpoint.preserves_host and head.host else endpoint.host,
            endpoint.fixed_fields,
            block,
            self.trace_lines,
            self.request_id.encode(),
            framing,
        )
        self._attempts += 1
        origin = self._origin = endpoint.origin
        if self._attempts == 1 and endpoint.destination is not None and endpoint.destination.terms.total_s:
            self.plane.bounded[self] = self.plane.now_s + endpoint.destination.terms.total_s
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
        if request.identity and head.is_upgrade:
            fields = [field for field in fields if field[0].lower() != b"sec-websocket-extensions"]
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
            self._write(CONTINUE)
        self._sending = self.method, head.target, fields, None, _UNCHANGED
        self._forward(self.plane.control_endpoint)

    def _connect_to(self, origin: "Origin") -> None:
        self.state = CONNECTING
        self.plane.spawn(self._connect(origin))

    async def _connect(self, origin: "Origin") -> None:
        try:
            connection = await origin.connect(self._endpoint.connect_s)  # type: ignore[union-attr]  # chosen
        except GatewayError as error:
            if self.state == CONNECTING:
                self._unreachable(error)
            return
        if self.state == CONNECTING:
            self._send(connection)
        else:  # the client left meanwhile; somebody else will want the connection
            origin.give(connection, self.plane.now_s)

    def _unreachable(self, error: GatewayError) -> None:
        # nothing was sent: another replica may take it
        is_retriable = error.code in ("UPSTREAM_UNREACHABLE", "UPSTREAM_TIMEOUT", "UPSTREAM_BUSY")
        if not is_retriable or not self._goes_elsewhere("", has_failed=error.code != "UPSTREAM_BUSY"):
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


def _body_too_large(limit_bytes: int) -> GatewayError:
    return GatewayError("BODY_TOO_LARGE", f"the body is over {limit_bytes} bytes")


_UNCHANGED = UpstreamRequest()
