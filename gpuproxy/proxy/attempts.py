"""The part of an exchange that chooses: an endpoint at first, another when that fails, the queue when all are busy.

A try may be repeated only while nothing has reached the client; see `retry` for when. Each attempt is counted in and
out at its endpoint's breaker, which learns from it; the call itself has one receipt, whatever the number of attempts.
"""

from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import Call, Intent, ModelLister, ModelRenamer, ProtocolHandler, UpstreamRequest
from gpuproxy.proxy.affinity import key_of
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.exchange_state import WAITING
from gpuproxy.proxy.retry import IDEMPOTENT, STATUS_REASONS
from gpuproxy.proxy.tunnelled import Tunnelled
from gpuproxy.proxy.unasked import is_refusal, without_question

NO_TIME_S = 0.001  # to wait for what is sent when the envelope's time is over

if TYPE_CHECKING:
    from gpuproxy.proxy.destination import Destination
    from gpuproxy.proxy.upstream import UpstreamConnection


class Attempts(Tunnelled):
    """Chooses endpoints for an exchange."""

    __slots__ = ()

    def _forward(self, endpoint: Endpoint) -> None:
        raise NotImplementedError  # the way there: `Exchange`

    def choose_from(self, destination: "Destination") -> Endpoint | None:
        """Return an endpoint for the call, None if all that may serve it are at their limit."""
        key = self._affinity_key(destination) if destination.affinity_header else 0
        endpoint = destination.choose(key, self._grant.models if self._grant is not None else None)
        if endpoint is not None and endpoint.destination is not destination:
            self._fall_back(endpoint)
        return endpoint

    def _fall_back(self, endpoint: Endpoint) -> None:
        """Another model serves the call: that one is used and billed."""
        assert self._intent is not None
        assert endpoint.destination is not None
        self._intent.model = endpoint.destination.model

    def _affinity_key(self, destination: "Destination") -> int:
        _, _, fields, body, _ = self._sending
        return key_of(fields, destination.affinity_header, body)

    def _go(self, destination: "Destination") -> None:
        """Send the call to an endpoint, or let it wait for one. Raises GatewayError UPSTREAM_BUSY."""
        endpoint = destination.only
        if endpoint is None:
            destination.budget.earn()
            endpoint = self.choose_from(destination)
        if endpoint is not None:
            self._forward(endpoint)
        else:
            self._wait(destination)

    # -- waiting ------------------------------------------------------------------------------------------------

    def _wait(self, destination: "Destination") -> None:
        destination.hold(self)
        self.state = WAITING
        self.downstream.deadline_s = self.plane.now_s + destination.terms.queue_s

    def go_to(self, endpoint: Endpoint) -> None:
        """An endpoint has room for this call, which has waited for it."""
        try:
            self._forward(endpoint)
        except GatewayError as error:
            self.refuse(error)
        except Exception:  # a plugin's: whose end has made room, or who tells of it, must not fail by it
            self._fail()

    def move_to(self, destination: "Destination | None") -> None:
        """The configuration has changed while this call waits: it waits there from now on."""
        if destination is None:
            self.refuse(GatewayError("UNKNOWN_MODEL", "this model is not served any more", param="model"))
            return
        self._destination = destination
        endpoint = destination.only or self.choose_from(destination)
        if endpoint is not None:
            self.go_to(endpoint)
            return
        try:
            destination.hold(self)
        except GatewayError as error:
            self.refuse(error)

    # -- another try ----------------------------------------------------------------------------------------------

    def _goes_elsewhere(
        self, reason: str, connection: "UpstreamConnection | None" = None, has_failed: bool = True
    ) -> bool:
        """Send the call to another endpoint, if the rules allow; `reason` is empty if nobody has got it yet."""
        destination = self._destination
        if self._generation < 0 or destination is None or not destination.has_choice:
            return False
        terms = destination.terms
        if reason and (reason not in terms.retry_on or self._attempts >= terms.attempts_max or not self._can_replay()):
            return False
        if reason and terms.is_idempotent_only and self._sending[0] not in IDEMPOTENT:
            return False
        endpoint = self._endpoint
        assert endpoint is not None
        assert endpoint.replica is not None
        tried = self._tried = [*getattr(self, "_tried", ()), endpoint.replica]  # unset until the first one
        key = self._affinity_key(destination) if destination.affinity_header else 0
        models = self._grant.models if self._grant is not None else None
        other = destination.another(tried, key, models, any=not reason)
        if other is not None and self._call is not None and self._call.is_envelope:
            other = self._as_target(destination, endpoint, other)
        if other is None or (reason and not destination.budget.spend()):
            return False
        if destination.model:
            self._fall_back(other)
        if connection is None:
            self._drop_upstream()
            self._end_attempt(has_failed)
        else:
            self._discard(connection)
        try:
            self._forward(other)
        except GatewayError as error:
            self.refuse(error)
        return True

    def _as_target(self, destination: "Destination", endpoint: Endpoint, other: Endpoint) -> Endpoint | None:
        """Return another URL of the upstream that an envelope's target is one of, if the target's path holds there."""
        base_path = next(each.base_path for each in destination.endpoints if each.replica is endpoint.replica)
        return other.at_root(self._patience_s) if other.base_path == base_path else None

    def _is_kept_back(self, connection: "UpstreamConnection", body: bytes) -> bool:
        """Tell whether an answer 4xx or 5xx is not for the client: it is tried again, or more of it must come first."""
        status = connection.head.status
        if status >= 429:
            return status in STATUS_REASONS and self._goes_elsewhere(STATUS_REASONS[status], connection)
        if self._editor is None or not self._can_replay():
            return False
        is_refused = is_refusal(self._editor, connection, body)
        if is_refused is None and body:
            connection.parts.append(body)  # to be looked at as a whole
        elif is_refused:
            self._goes_unasked(connection)
        return is_refused is not False

    def _goes_unasked(self, connection: "UpstreamConnection") -> None:
        """Send the call once more, to the same endpoint, as the client wrote it."""
        endpoint, generation, status = self._endpoint, self._generation, connection.head.status
        assert endpoint is not None
        method, path, fields, body, request = self._sending
        self._sending = method, path, fields, body, without_question(request, endpoint.upstream)
        self._editor = None
        self.upstream = None
        connection.release(self.plane.now_s)
        replica = endpoint.replica
        if replica is not None:
            replica.answered(status, 0.0, generation)
        self._forward(endpoint)
        if replica is not None:
            replica.end(generation)  # after the new one began: the call keeps its place

    def _goes_on(self, connection: "UpstreamConnection", following: UpstreamRequest) -> None:
        """Send what follows an answer that is not for the caller, to the same server, within the envelope's time."""
        endpoint, generation, collected = self._endpoint, self._generation, self._collected
        assert endpoint is not None
        assert collected is not None
        method, path, fields, body, _ = self._sending
        self._sending = method, path, fields, body, following
        if self._destination is not None:
            self._destination = self._destination.narrowed(endpoint)
        self._first_byte_ns = 0
        self._attempts -= 1  # it is the same one still
        collected.clear()
        self.upstream = None
        connection.release(self.plane.now_s)
        self._forward(endpoint.at_root(collected.rest_s(endpoint.first_byte_s) or NO_TIME_S))
        if endpoint.replica is not None:
            endpoint.replica.end(generation)

    def _question(self, endpoint: Endpoint, body: bytes | None, request: UpstreamRequest) -> bytes | None:
        """Return the body that asks for usage, or the client's own for an endpoint that is not to be asked."""
        self._editor = request.editor if endpoint.may_ask_usage else None  # type: ignore[assignment]  # see `edited`
        return request.body if endpoint.may_ask_usage else body

    def _discard(self, connection: "UpstreamConnection") -> None:
        """Drop an answer whose head has come, and learn what it means for its endpoint."""
        status = connection.head.status
        self._heed(connection.head)
        self.upstream = None
        if connection.is_complete:
            connection.release(self.plane.now_s)
        else:
            connection.abort()
        self._end_attempt(has_failed=status != 429)

    # -- models -----------------------------------------------------------------------------------------------------

    def _renamed(self, endpoint: Endpoint, path: bytes, body: bytes | None) -> tuple[bytes, bytes | None]:
        handler = self._handler
        if not isinstance(handler, ModelRenamer):
            name = handler.name if handler is not None else ""
            raise GatewayError("INTERNAL", f"protocol {name!r} cannot give a model another name; take `as` out")
        assert self._call is not None
        return handler.rename(self._call, path, body, endpoint.model)

    def _lists_models(self, call: Call, handler: ProtocolHandler, intent: Intent) -> bool:
        """Answer a call for the list of models: no single upstream knows it."""
        if intent.upstream or not isinstance(handler, ModelLister) or not handler.asks_for_models(call):
            return False
        assert self._grant is not None
        offers = self.plane.router.offers(handler, self._grant.models)
        self.is_received = self.is_received or not self.has_body  # its end has not been parsed yet
        self._write_json(200, handler.list_models(call, offers), b"")
        self._finish("ok")
        return True
