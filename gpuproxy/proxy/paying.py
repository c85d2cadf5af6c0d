"""The part of an exchange that pays before anything goes: a stream's slot, tokens, and the most the call may cost.

What control must be asked for goes on by a call-back.
"""

from collections.abc import Callable

from gpuproxy.errors import GatewayError
from gpuproxy.link.wallet import Outcome as LeaseOutcome
from gpuproxy.plugin import Intent
from gpuproxy.proxy.calls import price_of_call, refuse_deferred
from gpuproxy.proxy.credit import price_for, unknown_credit
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.exchange_state import ADMITTING, DONE
from gpuproxy.proxy.limits import Slots, unknown_limits
from gpuproxy.proxy.route import INSTANCE
from gpuproxy.proxy.sending import Sending
from gpuproxy.types import RENTED

Step = Callable[[Intent, bytes | None, Endpoint | None], bool]


class Paying(Sending):
    """Sets aside what a call may use."""

    __slots__ = ()

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
            self.refuse(unknown_limits())
        else:
            self._slots = slots
            intent, body, endpoint, _ = self._unpaid
            self._pay_on(self._meter, intent, body, endpoint)

    def _meter(self, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> bool:
        grant = self._grant
        assert grant is not None
        if grant.tpm and self.route.kind != INSTANCE:
            output_max = intent.max_output_tokens or self.plane.config.credit.output_tokens_default
            input_max = self._input_max(intent, body)
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
            self.refuse(unknown_limits())
        else:
            self._pay_on(self._reserve, intent, body, endpoint)

    def _pay_on(self, step: Step, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> None:
        # in a call-back of the link, which must not see what is wrong with a call
        try:
            if step(intent, body, endpoint):
                self._forward_to(endpoint)
        except GatewayError as error:
            self.refuse(error)
        except Exception:
            self._fail()

    def _reserve(self, intent: Intent, body: bytes | None, endpoint: Endpoint | None) -> bool:
        plane = self.plane
        if not plane.prices.is_any or (endpoint is not None and endpoint.upstream == RENTED):
            return True
        handler = self._handler
        assert handler is not None
        may_use_one = self.has_body or self.head.is_upgrade
        started_ns = self._started_ns
        price = price_of_call(plane, self._destination, intent, started_ns, handler, body, may_use_one)
        if price is None:
            return True
        grant = self._grant
        assert grant is not None
        price = price_for(grant, price)
        if price is None:
            return True
        if intent.is_deferred:
            refuse_deferred(price)
        input_bytes = self._input_max(intent, body)
        bill = self._bill = plane.credit.bill(grant, intent, price, input_bytes)
        bill.endpoint = endpoint
        if price.second_nanousd:
            plane.timed[self] = None
        if plane.credit.reserve(bill, bill.lacking(), self.paid):
            return True
        self._wait_for_control()
        return False

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

    def _wait_for_control(self) -> None:
        self.state = ADMITTING
        self.downstream.deadline_s = self.plane.now_s + self.plane.config.auth.authorize_timeout_s + 1

    def _input_max(self, intent: Intent, body: bytes | None) -> int:
        if intent.input_tokens_max:
            return intent.input_tokens_max
        if self.head.is_upgrade:  # what a tunnel will carry nobody knows
            return self.plane.config.credit.output_tokens_default
        if body is not None:
            return len(body)
        if not self.has_body:
            return 0
        return self.content_length if self.content_length >= 0 else self.plane.limits.body_bytes_max
