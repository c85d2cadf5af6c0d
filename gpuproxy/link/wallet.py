"""A worker's side of a lease: what one caller may spend here without asking, no I/O, no clock of its own.

Control hands out slips: an amount (requests, or nanodollars) and for requests a time until which it must be spent.
The wallet spends them locally, asks for more before they run out, and gives back what it does not need. A call
takes its upper bound and settles with what it used. When the wallet cannot tell, the call waits in line for
control's answer; calls are served in the order they came. As control answers only within what is left, the sum of
what all wallets spend never exceeds a limit or a balance.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal

FOREVER_NS = 1 << 62
FORECAST = 2  # ask for this many times what went since the last answer: what is left over comes back

Outcome = Literal["taken", "refused", "unknown"]
Waiter = Callable[[Outcome], None]
Ask = Callable[[int, int], None]
Give = Callable[[int, int], None]


class Slip:
    """What is left of one answer of control."""

    __slots__ = ("lease_id", "rest", "until_ns")

    def __init__(self, lease_id: int, rest: int, until_ns: int) -> None:
        self.lease_id = lease_id
        self.rest = rest
        self.until_ns = until_ns


class Wallet:
    """What one key or user may spend in this worker.

    ``ask(least, wanted)`` sends a question to control: at least so much is needed now (0: nobody waits), so much
    would be good. Each question must be answered by `refill` or `fail`; there is one at a time. ``give(lease_id,
    amount)`` sends back what is not needed. Times are monotonic nanoseconds, the same in all processes of a machine.
    """

    def __init__(self, ask: Ask, give: Give) -> None:
        self.reserved = 0
        self.rest = 0  # what can be taken at once, expired slips included until they are met
        self._ask = ask
        self._give = give
        self._slips: deque[Slip] = deque()  # oldest first
        self._line: deque[tuple[int, Waiter]] = deque()
        self._asked_least = -1  # of the open question; -1: none is open
        self._renew_below = 0
        self._gone = 0  # since the last answer
        self._was_used = False

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is held, reserved, waited for or asked."""
        return not (self._slips or self.reserved or self._line or self._asked_least >= 0)

    def take(self, amount: int, now_ns: int, waiter: Waiter) -> bool:
        """Reserve an amount. False: `waiter` will be told whether it was taken.

        In the common case this costs one comparison of the oldest slip.
        """
        if self.spend(amount, now_ns):
            self.reserved += amount
            return True
        self.wait(amount, now_ns, waiter)
        return False

    def spend(self, amount: int, now_ns: int) -> bool:
        """Use an amount up, if it is here and nobody waits for it."""
        self._was_used = True
        if self._line or not self._spend(amount, now_ns):
            return False
        if self.rest < self._renew_below and self._asked_least < 0:
            self._question(0)
        return True

    def wait(self, amount: int, now_ns: int, waiter: Waiter) -> None:
        """Stand in line for an amount that is not here; when `waiter` is told that it was taken, it is reserved."""
        self._line.append((amount, waiter))
        if self._asked_least < 0:
            self._question_for_head(now_ns)

    def settle(self, reserved: int, used: int, now_ns: int) -> None:
        """End a reservation: what was not used can be taken again. More than was reserved comes out of the rest, as
        far as it goes; what is beyond that is between ledger and customer.
        """
        self.reserved -= reserved
        if used < reserved:
            self._put(0, reserved - used, FOREVER_NS)
            self._serve(now_ns)
        elif used > reserved:
            self._spend(min(used - reserved, self.rest), now_ns)

    def refill(self, lease_id: int, amount: int, until_ns: int, now_ns: int) -> None:
        """Take control's answer to the open question; 0 is a refusal. `until_ns` 0: for ever."""
        least, self._asked_least = self._asked_least, -1
        self._gone = 0
        self._renew_below = amount // FORECAST  # after a refusal only a call that waits asks again
        if amount:
            self._put(lease_id, amount, until_ns or FOREVER_NS)
        refused_from = least if least > amount else FOREVER_NS
        self._serve(now_ns, refused_from)

    def fail(self) -> None:
        """Note that control could not be asked; whoever waits is told so."""
        self._asked_least = -1
        self._dismiss("unknown")

    def recall(self, now_ns: int) -> int:
        """Give back all that is not reserved, since somebody else needs it; return how much that was."""
        total = 0
        while self._slips:
            slip = self._slips.popleft()
            total += slip.rest if slip.until_ns > now_ns else 0
            self._give(slip.lease_id, slip.rest)
        self.rest = self._renew_below = 0
        return total

    def sweep(self, now_ns: int) -> None:
        """Give back what expired, and everything if nothing was taken since the last sweep; called once a second."""
        if self._line:
            return
        if not self._was_used:
            self.recall(now_ns)
        self._was_used = False
        self._drop_expired(now_ns)

    def close(self, now_ns: int) -> None:
        """Refuse whoever waits and give everything back: the key was revoked, or the worker stops."""
        self._dismiss("refused")
        self.recall(now_ns)

    def _spend(self, amount: int, now_ns: int) -> bool:
        """Take an amount off the slips, all of it or nothing."""
        slips = self._slips
        if slips and (slip := slips[0]).rest > amount and slip.until_ns > now_ns:
            slip.rest -= amount
        elif not self._spend_slowly(amount, now_ns):
            return False
        self.rest -= amount
        self._gone += amount
        return True

    def _spend_slowly(self, amount: int, now_ns: int) -> bool:
        self._drop_expired(now_ns)
        if amount > self.rest:
            return False
        while amount:
            slip = self._slips[0]
            part = min(amount, slip.rest)
            slip.rest -= part
            amount -= part
            if not slip.rest:
                self._slips.popleft()
        return True

    def _drop_expired(self, now_ns: int) -> None:
        for slip in [slip for slip in self._slips if slip.until_ns <= now_ns]:
            self._slips.remove(slip)
            self.rest -= slip.rest
            self._give(slip.lease_id, slip.rest)

    def _put(self, lease_id: int, amount: int, until_ns: int) -> None:
        """Add a slip; those that never expire are one, behind the others."""
        self.rest += amount
        last = self._slips[-1] if self._slips else None
        if last is not None and last.until_ns == until_ns == FOREVER_NS:
            last.rest += amount
        elif until_ns == FOREVER_NS:
            self._slips.append(Slip(lease_id, amount, until_ns))
        else:
            self._slips.appendleft(Slip(lease_id, amount, until_ns))
            self._slips = deque(sorted(self._slips, key=lambda slip: slip.until_ns))

    def _serve(self, now_ns: int, refused_from: int = FOREVER_NS) -> None:
        """Serve the line from its head; refuse who lacks as much as control has just refused to give."""
        while self._line:
            amount, waiter = self._line[0]
            is_taken = self._spend(amount, now_ns)
            if is_taken:
                self.reserved += amount
            elif amount - self.rest < refused_from:
                break
            self._line.popleft()
            waiter("taken" if is_taken else "refused")
        if self._line and self._asked_least < 0:
            self._question_for_head(now_ns)

    def _question_for_head(self, now_ns: int) -> None:
        """Ask for all that the head needs and lay what is here before control: two wallets that hold a part each
        would refuse a call that both parts could pay, or take the parts from each other for ever.
        """
        self.recall(now_ns)
        self._question(self._line[0][0])

    def _question(self, least: int) -> None:
        self._asked_least = least
        waiting = sum(amount for amount, _ in self._line)
        self._ask(least, max(waiting, FORECAST * self._gone))

    def _dismiss(self, outcome: Outcome) -> None:
        line, self._line = self._line, deque()
        for _, waiter in line:
            waiter(outcome)
