"""Requests and tokens per minute and streams at once in a worker: a wallet for each limit, which leases fill.

A call takes one request out of its wallet, in memory; only when that runs low is control asked, in the background.
Near the limit each call waits for control's answer, so that over all workers never more than the limit pass. While
control is away what is leased is served; then calls get 503, for a limit that cannot be checked is not to be exceeded.

Keys without limits of their own share those of their user. Tokens are counted when a call is admitted, with the most it
may use, and corrected when it ends. A stream takes a slot, and gives it back when it ends.
"""

import math
import time
from collections.abc import Callable

from gpuproxy.errors import GatewayError
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import HELD_AT_ONCE, STREAMS, TOKENS, HeldStreams, Leased, LeaseKind, Recall, Return
from gpuproxy.link.wallet import Outcome, Wallet
from gpuproxy.proxy.headers import Field
from gpuproxy.types import Grant

NS_PER_S = 1_000_000_000
UNKNOWN_RESET_S = 60
WAIT_MOST_S = 59.9  # many SDKs heed no longer wait, and try again at once; who is early is asked for the last second
WAIT_LEAST_S = 0.1  # to come back sooner is not worth the while
AHEAD_PER_MINUTE = 600  # a lease is asked for at least a tenth of a second's worth of the limit
OVERRIDE = b"x-rate-limit-override"
OVERRIDE_MAX = 1 << 31
RAISED = "raised:"


class Purse:
    """What a worker knows of one limit. ``raised_to`` is a higher one that the caller wished for and may have."""

    __slots__ = ("_kind", "_link", "_subject", "lease_id", "limit", "raised_to", "remaining", "reset_ns", "wallet")

    def __init__(self, link: LinkClient, user_id: str, key_id: str, kind: LeaseKind, limit: int) -> None:
        self._link = link
        self._subject = user_id, key_id
        self._kind = kind
        self.wallet = Wallet(self._ask, self._give)
        self.limit = limit
        self.raised_to = 0
        self.remaining = 0  # at control, when it last answered
        self.reset_ns = 0
        self.lease_id = 0  # of the newest lease

    def take(self, amount: int, waiter: Callable[[Outcome], None]) -> bool:
        """Count so much of a call. False: `waiter` will be told whether it may pass."""
        now_ns = time.monotonic_ns()
        if self.wallet.spend(amount, now_ns):
            return True
        self.wallet.wait(amount, now_ns, waiter)
        return False

    def taken(self, amount: int) -> None:
        """Note that what a waiter was told about has passed."""
        self.wallet.settle(amount, amount, time.monotonic_ns())

    def uncount(self, amount: int, lease_id: int) -> None:
        """Tell control that a call used so much less of this lease than was counted; below 0: so much more."""
        if amount > 0:
            self._link.send(Return(*self._subject, self._kind, amount, lease_id))
        elif amount:
            self._link.lease(*self._subject, self._kind, -amount, -amount, self._overran)

    def _overran(self, answer: Leased | None) -> None:
        # more than the window had: then all that it has, and no later one is charged with the rest
        if answer is not None and not answer.amount and answer.remaining > 0:
            self._link.lease(*self._subject, self._kind, answer.remaining, answer.remaining, lambda answer: None)

    def fields(self) -> bytes:
        """Return the X-RateLimit lines for an answer; Reset is in seconds from now."""
        left = self.remaining + self.wallet.rest
        limit = self.limit
        return b"X-RateLimit-Limit: %d\r\nX-RateLimit-Remaining: %d\r\nX-RateLimit-Reset: %d\r\n" % (
            limit,
            left if left < limit else limit,
            self._reset_s(),
        )

    def refusal(self) -> GatewayError:
        """Return the error for a limit that is used up."""
        wait_s = min(max(WAIT_LEAST_S, self._until_reset_s()), WAIT_MOST_S) if self.reset_ns else UNKNOWN_RESET_S
        whose = "with this key" if self._subject[1] else "with this account"
        message = f"over {self.limit} {self._kind} a minute {whose}; wait {math.ceil(wait_s)} s"
        return GatewayError("RATE_LIMITED", message, wait_s)

    def _reset_s(self) -> int:
        wait_ns = self.reset_ns - time.monotonic_ns()
        return -(-wait_ns // NS_PER_S) if wait_ns > 0 else 0  # rounded up

    def _until_reset_s(self) -> float:
        return (self.reset_ns - time.monotonic_ns()) / NS_PER_S

    def _ask(self, least: int, wanted: int) -> None:
        ahead = max(wanted, self.limit // AHEAD_PER_MINUTE)
        self._link.lease(*self._subject, self._kind, least, ahead, self._answered, self.raised_to)

    def _give(self, lease_id: int, amount: int) -> None:
        if amount:
            self._link.send(Return(*self._subject, self._kind, amount, lease_id))

    def _answered(self, answer: Leased | None) -> None:
        if answer is None:
            self.wallet.fail()
            return
        self.limit, self.remaining, self.reset_ns = answer.limit or self.limit, answer.remaining, answer.reset_ns
        self.lease_id = answer.id
        self.wallet.refill(answer.id, answer.amount, answer.until_ns, time.monotonic_ns())


class Slots(Purse):
    """What a worker knows of one limit of streams; what is taken stays reserved until it is given back."""

    __slots__ = ()

    def take(self, amount: int, waiter: Callable[[Outcome], None]) -> bool:
        """Take slots. False: `waiter` will be told whether it has them."""
        return self.wallet.take(amount, time.monotonic_ns(), waiter)

    def taken(self, amount: int) -> None:
        """Do nothing: what a waiter was told about is reserved."""

    def give(self) -> None:
        """Give a slot back: a stream has ended."""
        self.wallet.settle(1, 0, time.monotonic_ns())

    def held(self) -> tuple[str, str, int]:
        """Return user, key and how many slots are here, in use or not."""
        return *self._subject, self.wallet.reserved + self.wallet.rest

    def refusal(self) -> GatewayError:
        """Return the error for when no slot is free."""
        whose = "with this key" if self._subject[1] else "with this account"
        return GatewayError("RATE_LIMITED", f"over {self.limit} streams at once {whose}; wait until one ends", 1)


class Limits:
    """The purses of a worker."""

    def __init__(self, link: LinkClient) -> None:
        self._link = link
        self._purses: dict[str, Purse] = {}

    def requests(self, grant: Grant) -> Purse:
        """Return what counts the requests of a grant with a limit of them. One dict look-up."""
        name = grant.user_id if grant.is_rpm_shared else grant.key_id
        return self._purses.get(name) or self._open(name, grant, "requests")

    def raised(self, grant: Grant, own_fields: list[Field] | None) -> Purse:
        """Return the same for a key that may raise its limit, by a header. Raises GatewayError BAD_REQUEST."""
        wish = min(override_of(own_fields), grant.rpm_ceiling)
        if wish <= grant.rpm:
            return self.requests(grant)
        name = RAISED + grant.key_id
        purse = self._purses.get(name) or self._open(name, grant, "requests")
        purse.raised_to = wish
        purse.limit = max(purse.limit, wish)
        return purse

    def tokens(self, grant: Grant) -> Purse:
        """Return what counts the tokens of a grant with a limit of them."""
        name = TOKENS + (grant.user_id if grant.is_tpm_shared else grant.key_id)
        return self._purses.get(name) or self._open(name, grant, "tokens")

    def streams(self, grant: Grant) -> Slots:
        """Return what counts the open streams of a grant with a limit of them."""
        name = STREAMS + (grant.user_id if grant.is_streams_shared else grant.key_id)
        slots = self._purses.get(name)
        if slots is None:
            key_id = "" if grant.is_streams_shared else grant.key_id
            slots = self._purses[name] = Slots(self._link, grant.user_id, key_id, "streams", grant.streams)
        assert isinstance(slots, Slots)  # by its name
        return slots

    def report(self) -> None:
        """Tell control, which may be a new one, which streams are held here."""
        held = [purse.held() for purse in self._purses.values() if isinstance(purse, Slots)]
        for start in range(0, max(1, len(held)), HELD_AT_ONCE):
            self._link.send(HeldStreams(tuple(held[start : start + HELD_AT_ONCE]), start == 0))

    def sweep(self) -> None:
        """Give back what is idle or expired; called about once a second."""
        now_ns = time.monotonic_ns()
        for name, purse in list(self._purses.items()):
            purse.wallet.sweep(now_ns)
            if purse.wallet.is_empty and purse.reset_ns < now_ns:
                del self._purses[name]

    def close(self) -> None:
        """Give everything back: the worker stops."""
        for purse in self._purses.values():
            purse.wallet.close(time.monotonic_ns())

    def recall(self, message: Recall) -> None:
        """Give back what no call has taken: another worker needs it."""
        prefix = {"tokens": TOKENS, "streams": STREAMS}.get(message.kind, "")
        name = message.key_id.removeprefix(prefix) or message.user_id
        for purse in (self._purses.get(prefix + name), self._purses.get(RAISED + name)):
            if purse is not None:
                purse.wallet.recall(time.monotonic_ns())
        self._link.send(Return(message.user_id, message.key_id, message.kind, 0, recall_id=message.id))

    def _open(self, name: str, grant: Grant, kind: LeaseKind) -> Purse:
        is_shared, limit = (grant.is_rpm_shared, grant.rpm) if kind == "requests" else (grant.is_tpm_shared, grant.tpm)
        key_id = "" if is_shared else grant.key_id
        purse = self._purses[name] = Purse(self._link, grant.user_id, key_id, kind, limit)
        return purse


def unknown_limits() -> GatewayError:
    """Return the error for a call whose limits cannot be asked about."""
    return GatewayError("UNAVAILABLE", "limits cannot be checked at the moment; try again", 1)


def override_of(own_fields: list[Field] | None) -> int:
    """Return the limit a caller wishes for, 0 for none. Raises GatewayError BAD_REQUEST for what is no number."""
    given = [value for name, value in own_fields or () if name.lower() == OVERRIDE]
    if not given:
        return 0
    text = given[0]
    if len(given) > 1 or not (text.isdigit() and len(text) <= 10 and 0 < int(text) <= OVERRIDE_MAX):
        raise GatewayError("BAD_REQUEST", "X-Rate-Limit-Override must be one whole number from 1 to 2147483648")
    return int(text)
