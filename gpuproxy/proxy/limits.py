"""Requests per minute in a worker: one wallet for each key with a limit of its own, filled by leases of control.

A call takes one request out of its key's wallet, in memory; only when that runs low is control asked, in the
background. Near the limit each call waits for control's answer, so that over all workers never more than the limit
pass. While control is away what is leased is served; then calls get 503, for a limit that cannot be checked is
not to be exceeded.
"""

import math
import time
from collections.abc import Callable

from gpuproxy.errors import GatewayError
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import Leased, Recall, Return
from gpuproxy.link.wallet import Outcome, Wallet
from gpuproxy.types import Grant

NS_PER_S = 1_000_000_000
UNKNOWN_RESET_S = 60


class Purse:
    """What a worker knows of one key's limit."""

    __slots__ = ("limit", "remaining", "reset_ns", "wallet")

    def __init__(self, ask: Callable[[int, int], None], give: Callable[[int, int], None]) -> None:
        self.wallet = Wallet(ask, give)
        self.limit = 0
        self.remaining = 0  # at control, when it last answered
        self.reset_ns = 0


class Limits:
    """The purses of a worker, by key id."""

    def __init__(self, link: LinkClient) -> None:
        self._link = link
        self._purses: dict[str, Purse] = {}

    def take(self, grant: Grant, waiter: Callable[[Outcome], None]) -> bool:
        """Count one request of this key. False: `waiter` will be told whether it may pass."""
        purse = self._purses.get(grant.key_id) or self._open(grant)
        wallet = purse.wallet
        now_ns = time.monotonic_ns()
        if wallet.take(1, now_ns, waiter):
            wallet.settle(1, 1, now_ns)
            return True
        return False

    def taken(self, grant: Grant) -> None:
        """Note that a request a waiter was told about has passed."""
        purse = self._purses.get(grant.key_id)
        if purse is not None:
            purse.wallet.settle(1, 1, time.monotonic_ns())

    def fields(self, grant: Grant) -> bytes:
        """Return the X-RateLimit lines for an answer to this key; Reset is in seconds from now."""
        purse = self._purses.get(grant.key_id)
        if purse is None or not purse.limit:
            return b""
        left = min(purse.limit, purse.remaining + purse.wallet.rest)
        return b"X-RateLimit-Limit: %d\r\nX-RateLimit-Remaining: %d\r\nX-RateLimit-Reset: %d\r\n" % (
            purse.limit,
            left,
            self._reset_s(purse),
        )

    def refusal(self, grant: Grant) -> GatewayError:
        """Return the error for a key whose limit is used up."""
        purse = self._purses.get(grant.key_id)
        wait_s = max(1, self._reset_s(purse)) if purse is not None else UNKNOWN_RESET_S
        limit = purse.limit if purse is not None and purse.limit else grant.rpm
        return GatewayError("RATE_LIMITED", f"over {limit} requests a minute with this key; wait {wait_s} s", wait_s)

    def sweep(self) -> None:
        """Give back what is idle or expired; called about once a second."""
        now_ns = time.monotonic_ns()
        for key_id, purse in list(self._purses.items()):
            purse.wallet.sweep(now_ns)
            if purse.wallet.is_empty and purse.reset_ns < now_ns:
                del self._purses[key_id]

    def close(self) -> None:
        """Give everything back: the worker stops."""
        for purse in self._purses.values():
            purse.wallet.close(time.monotonic_ns())

    def _open(self, grant: Grant) -> Purse:
        user_id, key_id = grant.user_id, grant.key_id

        def ask(least: int, wanted: int) -> None:
            self._link.lease(user_id, key_id, "requests", least, wanted, lambda answer: self._answered(purse, answer))

        def give(lease_id: int, amount: int) -> None:
            if amount:
                self._link.send(Return(user_id, key_id, "requests", amount, lease_id))

        purse = self._purses[key_id] = Purse(ask, give)
        return purse

    def _answered(self, purse: Purse, answer: Leased | None) -> None:
        if answer is None:
            purse.wallet.fail()
            return
        purse.limit, purse.remaining, purse.reset_ns = answer.limit, answer.remaining, answer.reset_ns
        purse.wallet.refill(answer.id, answer.amount, answer.until_ns, time.monotonic_ns())

    def recall(self, message: Recall) -> None:
        """Give back what no call has taken: another worker needs it."""
        purse = self._purses.get(message.key_id)
        if purse is not None:
            purse.wallet.recall(time.monotonic_ns())
        self._link.send(Return(message.user_id, message.key_id, message.kind, 0, recall_id=message.id))

    def _reset_s(self, purse: Purse) -> int:
        return max(0, math.ceil((purse.reset_ns - time.monotonic_ns()) / NS_PER_S))
