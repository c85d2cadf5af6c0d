"""Credit in a worker: each call of a priced model reserves the most it may cost before a byte of it goes upstream.

Reserving takes from the user's wallet, which leases of control fill (see `link.wallet`); so in the common case it costs
no question, and over all workers never more is reserved than the account has. When the call ends the wallet gets back
what was not used. A stream that outlives what it reserved reserves more on its way, or is cut.

What was used is reckoned by the very function the ledger charges by, from the same receipt.
"""

import time
from collections.abc import Callable

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import HELD_AT_ONCE, HeldCredit, Leased, Recall, Return
from gpuproxy.link.wallet import Outcome, Wallet
from gpuproxy.plugin import Intent
from gpuproxy.pricing import Price, marked_up, upper_bound
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.types import Grant

CALLS_AHEAD = 64  # a lease is asked for so many calls; control gives less the less is left
NOTHING_LEFT = -1  # as an amount given back: see `Return`

Subject = tuple[str, str]  # user id, key id or nothing


class Bill:
    """What one call has reserved; it covers ``output_max`` tokens of output and ``time_us`` since its start."""

    __slots__ = ("endpoint", "input_max", "output_max", "price", "reserved", "subject", "time_us", "waiting_for")

    def __init__(self, price: Price, subject: Subject, input_max: int, output_max: int, time_us: int) -> None:
        self.price = price
        self.subject = subject
        self.input_max = input_max
        self.output_max = output_max
        self.time_us = time_us
        self.reserved = 0
        self.waiting_for = 0  # what control was asked for and has not answered
        self.endpoint: Endpoint | None = None  # where the call goes once it is paid for; None: its upstream chooses

    def lacking(self) -> int:
        """Return how much is still to be reserved, in nanodollars."""
        return upper_bound(self.price, self.input_max, self.output_max, self.time_us) - self.reserved


class Credit:
    """The wallets of a worker's users."""

    def __init__(self, settings: config.Credit, link: LinkClient) -> None:
        self._settings = settings
        self._link = link
        self._wallets: dict[Subject, Wallet] = {}
        self._budget_ends_ns = 0  # while waiters are told that a budget refuses them

    def bill(self, grant: Grant, intent: Intent, price: Price, input_bytes: int) -> Bill:
        """Return what a call needs to reserve. A token has at least one byte, so the body bounds the input."""
        output_max = (intent.max_output_tokens or self._settings.output_tokens_default) * intent.choice_count
        return Bill(price, subject_of(grant), input_bytes, output_max, int(self._settings.reserved_s * 1e6))

    def reserve(self, bill: Bill, amount: int, waiter: Callable[[Outcome], None]) -> bool:
        """Reserve an amount. False: `waiter` will be told whether it was, and must say so to `told`."""
        if not amount:
            return True
        wallet = self._wallets.get(bill.subject) or self._open(bill.subject)
        if wallet.take(amount, time.monotonic_ns(), waiter):
            bill.reserved += amount
            return True
        bill.waiting_for = amount
        return False

    def told(self, bill: Bill, outcome: Outcome) -> None:
        """Note what a waiter was told."""
        amount, bill.waiting_for = bill.waiting_for, 0
        if outcome == "taken":
            bill.reserved += amount

    def settle(self, bill: Bill, used: int) -> None:
        """End a call's reservation: what it did not use can be reserved again."""
        reserved, bill.reserved = bill.reserved, 0
        if reserved or used:
            wallet = self._wallets.get(bill.subject) or self._open(bill.subject)
            wallet.settle(reserved, used, time.monotonic_ns())

    def extend(self, bill: Bill, is_time: bool) -> None:
        """Let a bill cover as much again: of time, or of output."""
        if is_time:
            bill.time_us += int(self._settings.reserved_s * 1e6)
        else:
            bill.output_max += self._settings.output_tokens_default

    def sweep(self) -> None:
        """Give back what is idle; called about once a second."""
        now_ns = time.monotonic_ns()
        for subject, wallet in list(self._wallets.items()):
            wallet.sweep(now_ns)
            if wallet.is_empty:
                del self._wallets[subject]
                self._link.send(Return(*subject, "nanousd", NOTHING_LEFT))

    def report(self) -> None:
        """Tell control, which may be a new one, of whom there is credit here: of others it holds none on."""
        held = list(self._wallets)
        for start in range(0, max(1, len(held)), HELD_AT_ONCE):
            end = start + HELD_AT_ONCE
            self._link.send(HeldCredit(tuple(held[start:end]), start == 0, end >= len(held)))

    def close(self) -> None:
        """Give everything back: the worker stops."""
        for wallet in self._wallets.values():
            wallet.close(time.monotonic_ns())

    def recall(self, message: Recall) -> None:
        """Give back what no call has reserved, of all wallets of a user: somebody else needs it."""
        for (user_id, _), wallet in self._wallets.items():
            if user_id == message.user_id:
                wallet.recall(time.monotonic_ns())
        self._link.send(Return(message.user_id, message.key_id, message.kind, 0, recall_id=message.id))

    def refusal(self, bill: Bill) -> GatewayError:
        """Return the error for a call that the account, or a budget, cannot pay; within a waiter only."""
        most = upper_bound(bill.price, bill.input_max, bill.output_max, bill.time_us)
        message = f"this call may cost up to {most // 10**9}.{most % 10**9:09} USD, more than "
        remedy = ", or bound the answer with max_tokens" if bill.price.output_nanousd_per_million else ""
        if self._budget_ends_ns:
            left_s = max(1, (self._budget_ends_ns - time.time_ns()) // 10**9)
            return GatewayError("BUDGET_EXCEEDED", f"{message}a budget has left; wait {left_s} s{remedy}", left_s)
        return GatewayError("INSUFFICIENT_CREDITS", f"{message}the account has left; add credit{remedy}")

    def _answered(self, wallet: Wallet, answer: Leased | None) -> None:
        if answer is None:
            wallet.fail()
            return
        self._budget_ends_ns = answer.budget_ends_ns
        wallet.refill(answer.id, answer.amount, answer.until_ns, time.monotonic_ns())
        self._budget_ends_ns = 0

    def _open(self, subject: Subject) -> Wallet:
        def ask(least: int, wanted: int) -> None:
            ahead = max(wanted, CALLS_AHEAD * least)
            self._link.lease(*subject, "nanousd", least, ahead, lambda answer: self._answered(wallet, answer))

        def give(lease_id: int, amount: int) -> None:
            if amount:
                self._link.send(Return(*subject, "nanousd", amount, lease_id))

        wallet = self._wallets[subject] = Wallet(ask, give)
        return wallet


def subject_of(grant: Grant) -> Subject:
    """Return whose wallet a call spends from: one for all keys of a user, but keys with a budget of their own have one
    of their own, with its id; control learns of both and can hold to both.
    """
    return grant.user_id, grant.budget_key


def price_for(grant: Grant, price: Price) -> Price | None:
    """Return what a call of this key costs, None if nothing."""
    if not grant.markup_bps:
        return price
    marked = marked_up(price, grant.markup_bps)
    return None if marked.is_free else marked


def unknown_credit() -> GatewayError:
    """Return the error for a call whose account cannot be asked about."""
    return GatewayError("UNAVAILABLE", "credit cannot be checked at the moment; try again", 1)
