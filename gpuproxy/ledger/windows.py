"""Where the requests of the last minute are counted: in this process, or together with other nodes.

Times are this machine's monotonic nanoseconds.
"""

from collections.abc import Set as AbstractSet
from typing import Protocol

from msgspec import Struct

from gpuproxy.ledger.rates import Entry, LeaseKey, Window

Subject = tuple[str, str]  # user id, key id or nothing


class Part(Struct):
    """A part of a limit that was handed out, 0 for a refusal: to be spent before `until_ns`; what is left, and when
    something comes back.
    """

    amount: int
    until_ns: int
    left: int
    reset_ns: int
    elsewhere: AbstractSet[str] = frozenset()  # of a refusal: other nodes that may hold something unspent


class Windows(Protocol):
    """Counts for every subject."""

    async def grant(self, subject: Subject, key: LeaseKey, limit: int, least: int, wanted: int, now_ns: int) -> Part:
        """Hand out as much as is wise: up to `wanted`, at least `least`, else nothing."""

    def take_back(self, subject: Subject, key: LeaseKey, amount: int) -> None:
        """Count requests no more that were not spent."""

    def holders(self, subject: Subject, now_ns: int) -> set[str]:
        """Return the workers here that may have something unspent."""

    async def flush(self) -> None:
        """Let other nodes see what was taken back."""

    def sweep(self, now_ns: int) -> None:
        """Forget what counts no more."""


class LocalWindows:
    """Counts in memory, for all workers of this machine, from nothing."""

    def __init__(self) -> None:
        self.windows: dict[Subject, Window] = {}

    async def grant(self, subject: Subject, key: LeaseKey, limit: int, least: int, wanted: int, now_ns: int) -> Part:
        """Hand out."""
        window = self.windows.setdefault(subject, Window())
        entry = window.grant(key, limit, least, wanted, now_ns)
        return Part(entry.amount, entry.until_ns, window.left(limit, now_ns), window.reset_ns(now_ns))

    def note(self, subject: Subject, key: LeaseKey, entry: Entry) -> None:
        """Count what somebody else handed out."""
        self.windows.setdefault(subject, Window()).entries[key] = entry

    def take_back(self, subject: Subject, key: LeaseKey, amount: int) -> None:
        """Count no more."""
        window = self.windows.get(subject)
        if window is not None:
            window.take_back(key, amount)

    def holders(self, subject: Subject, now_ns: int) -> set[str]:
        """Return who may have something unspent."""
        window = self.windows.get(subject)
        return window.holders(now_ns) if window is not None else set()

    async def flush(self) -> None:
        """Do nothing: nobody else counts."""

    def sweep(self, now_ns: int) -> None:
        """Forget windows in which nothing counts any more."""
        for subject, window in list(self.windows.items()):
            window.left(0, now_ns)
            if window.is_empty:
                del self.windows[subject]


_: type[Windows] = LocalWindows
