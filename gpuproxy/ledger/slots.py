"""How many streams each worker of this machine may have open, of a key or of a user.

A slot counts from the moment it is handed out until the worker gives it back or is gone. Kept in memory: workers tell
what they hold whenever they are linked, so a control that has just started waits until all could do so.
"""

import asyncio
import time
from collections.abc import Iterable

from gpuproxy.ledger.rates import share
from gpuproxy.ledger.windows import Subject
from gpuproxy.link.client import RECONNECT_S

SHARE = 4  # at most this part of what is left is handed out at once, so that other workers find some
GRACE_S = 3 * RECONNECT_S  # from the first word of a worker until all have told what they hold


class Slots:
    """The slots that are handed out."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._ready_s = 0.0
        self._held: dict[Subject, dict[str, int]] = {}  # by epoch
        self._suspects: set[str] = set()

    async def ready(self) -> None:
        """Wait until every worker could tell what it holds."""
        self._begin()
        wait_s = self._ready_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def grant(self, subject: Subject, epoch: str, limit: int, least: int, wanted: int) -> int:
        """Hand out up to `wanted`, at least `least`, else nothing; without a limit (0) what is wanted."""
        amount = share(self.left(subject, limit), least, wanted, SHARE) if limit else max(least, wanted)
        self._add(subject, epoch, amount)
        return amount

    def take_back(self, subject: Subject, epoch: str, amount: int) -> None:
        """Free what a worker gave back."""
        self._add(subject, epoch, -max(0, amount))

    def restate(self, epoch: str, held: Iterable[tuple[Subject, int]], is_first: bool) -> None:
        """Note what a worker says it holds; the first of its messages ends what was known."""
        self._begin()
        if is_first:
            self._forget({epoch})
        for subject, amount in held:
            self._add(subject, epoch, max(0, amount))

    def left(self, subject: Subject, limit: int) -> int:
        """Return how many may be handed out now."""
        return max(0, limit - sum(self._held.get(subject, {}).values()))

    def holders(self, subject: Subject) -> set[str]:
        """Return the epochs that hold some."""
        return set(self._held.get(subject, ()))

    def sweep(self, linked: Iterable[str]) -> None:
        """Free the slots of workers that were not linked in the sweep before either: a link may break for a moment."""
        missing = {epoch for held in self._held.values() for epoch in held} - set(linked)
        self._forget(missing & self._suspects)
        self._suspects = missing

    def _begin(self) -> None:
        if not self._ready_s:
            self._ready_s = time.monotonic() + self._grace_s

    def _add(self, subject: Subject, epoch: str, amount: int) -> None:
        held = self._held.setdefault(subject, {})
        held[epoch] = held.get(epoch, 0) + amount
        if held[epoch] <= 0:
            del held[epoch]
        if not held:
            del self._held[subject]

    def _forget(self, epochs: set[str]) -> None:
        for subject, held in list(self._held.items()):
            for epoch in epochs & held.keys():
                del held[epoch]
            if not held:
                del self._held[subject]
