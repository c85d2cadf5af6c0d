"""One proxied call from its head to its receipt: the phases in one straight line.

    start -> admitted -> (whole body, if the route needs it) -> resolve -> (pay) -> forward -> relay -> finish

A phase awaits nothing: what must wait (an unknown key, a new connection) goes on by a call-back. In the common
case, known key and pooled connection, a call is handled without creating a task, future or timer. Whatever
happens, `_finish` runs exactly once for each exchange that was started and writes exactly one receipt.

The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
"""

import time

from gpuproxy.errors import GatewayError
from gpuproxy.guard import Target, parse_target
from gpuproxy.link.wallet import Outcome as LeaseOutcome
from gpuproxy.plugin import Call, ProtocolHandler
from gpuproxy.proxy import envelope as envelopes
from gpuproxy.proxy.admit import is_expired
from gpuproxy.proxy.calls import bind_tools, check_protocol, needs_whole
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.exchange_state import (
    ADMITTING,
    COLLECTING,
    CONTINUE,
    DISCARDED_BODY_BYTES_MAX,
    DONE,
    PSEUDONYM,
    READ_BUFFER,
    SENT,
    VIA_HOPS_MAX,
)
from gpuproxy.proxy.headers import (
    checked_fields,
)
from gpuproxy.proxy.instances import Rented
from gpuproxy.proxy.limits import unknown_limits
from gpuproxy.proxy.paying import Paying
from gpuproxy.proxy.pins import pinned
from gpuproxy.proxy.route import CONTROL, ENVELOPE, INSTANCE, MOUNT, UNKNOWN
from gpuproxy.proxy.visits import greeting
from gpuproxy.types import ALL_SCOPES, RENTED, Grant


class Exchange(Paying):
    """One request and its answer on a client connection; see `exchange_state` for its parts."""

    __slots__ = ()

    # -- admit -----------------------------------------------------------------------------------------

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
        except Exception:  # of a handler; this may be a call-back of the link, which must not see it
            self._fail()
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
            self.refuse(unknown_limits())

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
            message = f"{route.shown} takes POST with a JSON envelope"
            raise GatewayError("METHOD_NOT_ALLOWED", message, allow="POST")

    # -- the body --------------------------------------------------------------------------------------

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

    # -- route -----------------------------------------------------------------------------------------

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
                name = destination.model
            else:
                intent = self._intent = handler.describe(call)
                assert route.upstream is not None
                destination = self._destination = route.upstream
                name, intent.model = intent.model, destination.served.name_of(intent.model)
            grant = self._grant
            if intent.pin is not None:
                destination = self._destination = pinned(plane.router, destination, intent.pin, grant)
            if grant.tools is not None:  # type: ignore[union-attr]  # admitted
                bind_tools(call, self.head, grant.tools, handler, destination.handler, destination.upstream)  # type: ignore[union-attr]
            if grant.models is not None and call.tools is None:  # type: ignore[union-attr]  # admitted
                self._check_model(intent.model, name)
            if not intent.model:
                if route.kind == MOUNT and self._lists_models(call, handler, intent):
                    return
                if route.kind == MOUNT and self.method == b"POST" and not destination.upstream:
                    raise plane.router.nameless(handler)
                if self.has_body or self.head.is_upgrade:
                    intent.model = destination.served.sole
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
        # `name` is another of the model, if it may have one
        grant = self._grant
        assert grant is not None
        models = grant.models
        may_name_one = self.has_body or self.head.is_upgrade
        if models is not None and model not in models and name not in models and (model or may_name_one):
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
        method = self.sent_method = (envelope.method or "GET").encode()
        call = self._call = Call(
            method, target.path.encode(), fields, content, is_envelope=True, body_bytes=len(content or b"")
        )
        intent = self._intent = handler.describe(call)
        endpoint = router.endpoint_at(target.scheme, target.host, target.port)
        place = endpoint.destination if endpoint is not None else None
        name = intent.model
        if place is not None:
            intent.model = place.served.name_of(name)
        tools = self._grant.tools  # type: ignore[union-attr]  # admitted
        if tools is not None:
            names = (handler, place.handler, place.upstream) if place is not None else (handler, handler, target.host)
            bind_tools(call, self.head, tools, *names)
        if call.tools is None:
            self._check_model(intent.model, name)
        if not intent.model and place is not None and content is not None:
            intent.model = place.served.sole
        is_collected = not envelopes.wants_stream(envelope)
        if place is not None and place.handler is handler and not is_collected:
            call.may_ask_usage = place.may_ask_usage
        request = handler.prepare(call, intent)
        if endpoint is None:
            rented = self._rented()
            if rented is None:
                return
            mapped = rented.outside(target)
            endpoint = self._user_given(mapped, is_rented=mapped is not target)
        elif place is not None:
            check_protocol(handler, place, self.plane.prices)
            self._destination = place if intent.pin is None else place.narrowed(endpoint)
            self._destination.budget.earn()
        endpoint = endpoint.at_root(envelope.timeout_s)  # a target's path is whole
        if is_collected:
            limit_bytes = self.plane.limits.envelope_answer_bytes_max
            self._collected = envelopes.Collected(limit_bytes, envelope.timeout_s, self._started_ns)
        else:
            self._editor = request.editor  # type: ignore[assignment]  # see `edited`
        self._handler = handler
        self.held_body = []
        self.content_length = -1 if content is None else len(content)
        self.has_body = content is not None
        path = request.path if request.path is not None else call.path or b"/"
        fields = envelopes.completed_fields(envelope, fields, request, is_collected)
        self._sending = call.method, path, fields, content, request
        if self._afford(intent, content, endpoint):
            self._forward(endpoint)

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
        endpoint = self._user_given(target, is_rented=True)
        path = request.path if request.path is not None else route.path
        self._sending = self.method, path, self.head.fields, body, request
        may_wait = self.plane.prices.is_any or self._grant.streams  # type: ignore[union-attr]  # admitted
        if not may_wait or self._afford(intent, body, endpoint):
            self._forward(endpoint)

    def _user_given(self, target: Target, is_rented: bool) -> Endpoint:
        origin, timeouts = self.plane.pools.user_given(target.scheme, target.host, target.port), self.plane.timeouts
        endpoint = Endpoint(origin, target.authority.encode(), timeouts.first_byte_s, timeouts.idle_s)
        endpoint.upstream = RENTED if is_rented else ""
        return endpoint

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


def _body_too_large(limit_bytes: int) -> GatewayError:
    return GatewayError("BODY_TOO_LARGE", f"the body is over {limit_bytes} bytes")
