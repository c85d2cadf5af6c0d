"""The end of an exchange: what it used, what that costs, and its one receipt.

Whatever happens, `_finish` runs exactly once for each exchange that was started and writes exactly one receipt.
"""

import time

from gpuproxy.pricing import FREE, Price, cost_of
from gpuproxy.proxy.counts import NO_USAGE, used_by_now, used_in_all
from gpuproxy.proxy.credit import price_for
from gpuproxy.proxy.exchange_state import (
    CHECKPOINT_NS,
    DONE,
    NO_GRANT,
    NO_INTENT,
    NO_PLACE,
    SENT,
    WAITING,
    ExchangeState,
)
from gpuproxy.proxy.route import CONTROL
from gpuproxy.types import Outcome, Receipt, Usage


class Settled(ExchangeState):
    """Ends an exchange, and notes how far one has come that lasts."""

    __slots__ = ()

    def _finish(self, outcome: Outcome) -> None:
        """Write the receipt and let the connection go on. Runs once."""
        if self._generation >= 0:
            replica = self._endpoint.replica  # type: ignore[union-attr]  # an attempt is under way there
            if replica.is_calm and outcome != "upstream_failed":  # type: ignore[union-attr]
                replica.ended_count += 1  # type: ignore[union-attr]
            else:
                is_hurried = self._error == "UPSTREAM_TIMEOUT" and self._endpoint.is_hurried  # type: ignore[union-attr]
                self._end_attempt(outcome == "upstream_failed" and not is_hurried)
        elif self.state == WAITING:
            self._destination.leave(self)  # type: ignore[union-attr]  # it waits there
        if self.plane.bounded:
            self.plane.bounded.pop(self, None)  # type: ignore[call-overload]  # it is a whole exchange
        self.state = DONE
        self.held_body = []
        route = self.route
        if route.kind != CONTROL:
            plane = self.plane
            reader = self._reader
            usage = NO_USAGE if reader is None else used_in_all(reader, self._handler.name)  # type: ignore[union-attr]  # its own
            receipt = self._receipt(outcome, usage, time.monotonic_ns())
            bill = self._bill
            if bill is not None:
                plane.timed.pop(self, None)  # type: ignore[call-overload]  # it is a whole exchange
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

    def is_due(self, now_ns: int) -> bool:
        """Tell whether it is time for a checkpoint of this call."""
        is_open = self.state == SENT and self.route.kind != CONTROL
        return is_open and now_ns - (self._checkpoint_ns or self._started_ns) >= CHECKPOINT_NS

    def checkpoint(self, now_ns: int) -> None:
        """Note in the journal what was used by now: it counts if this worker is killed."""
        plane = self.plane
        self._checkpoint_ns = now_ns
        if (ends := plane.tunnels.get(self)) is not None:  # type: ignore[call-overload]  # it is a whole exchange
            self.request_bytes, self._response_bytes = ends[0].byte_count, ends[1].byte_count
        if not self._receipt_id:
            self._receipt_id = plane.new_id() if self.head.request_id else self.request_id
            self._wall_offset_ns = plane.wall_offset_ns
        plane.journal.append(self._receipt("open", used_by_now(self._reader) or NO_USAGE, now_ns))
        plane.outbox.schedule()

    def _uncount(self, used: int) -> None:
        # the call is over: what it did not use of the tokens counted may be used by others
        if self._tokens is not None:
            purse, most, lease_id = self._tokens
            self._tokens = None
            purse.uncount(most - used, lease_id)
