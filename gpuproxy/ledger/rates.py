"""Requests per minute, exactly: in no 60 seconds, wherever they begin, do more than the limit pass.

A lease of n requests may be spent for a second, so it counts from its grant until a minute after its end: whenever
within the lease they were spent, they still count. What comes back unspent stops counting at once. The price of
exactness is that a caller who uses the limit up waits a second longer than a minute; fixed windows of the clock
would let twice the limit pass around each full minute.

Kept in memory: control counts for all workers of its machine, and starts from nothing. Several nodes count in Redis,
see `shared_windows`.
"""

from msgspec import Struct

MINUTE_NS = 60 * 10**9
LEASE_NS = 10**9  # how long a lease of requests may be spent
SHARE = 4  # a lease is at most this part of what is left, so that other workers find some

LeaseKey = tuple[str, int]  # whose, and its number there


class Entry(Struct):
    """Requests handed out, to be spent before a time."""

    amount: int
    until_ns: int


class Window:
    """The last minute of one key or user. Times are monotonic nanoseconds, never going back."""

    def __init__(self) -> None:
        self.entries: dict[LeaseKey, Entry] = {}  # oldest first

    def left(self, limit: int, now_ns: int) -> int:
        """Return how many requests may be handed out now."""
        while self.entries:
            oldest = next(iter(self.entries))
            if self.entries[oldest].until_ns + MINUTE_NS > now_ns:
                break
            del self.entries[oldest]
        return max(0, limit - sum(entry.amount for entry in self.entries.values()))

    def grant(self, key: LeaseKey, limit: int, least: int, wanted: int, now_ns: int) -> Entry:
        """Hand out as much as is wise: up to `wanted`, at least `least`, else nothing."""
        entry = Entry(share(self.left(limit, now_ns), least, wanted, SHARE), now_ns + LEASE_NS)
        if entry.amount:
            self.entries[key] = entry
        return entry

    def take_back(self, key: LeaseKey, amount: int) -> None:
        """Count requests no more that were not spent."""
        entry = self.entries.get(key)
        if entry is not None:
            entry.amount = max(0, entry.amount - max(0, amount))

    def holders(self, now_ns: int) -> set[str]:
        """Return who may still have something unspent."""
        return {owner for (owner, _), entry in self.entries.items() if entry.amount and entry.until_ns > now_ns}

    def reset_ns(self, now_ns: int) -> int:
        """Return when the oldest requests stop counting."""
        return next((each.until_ns + MINUTE_NS for each in self.entries.values() if each.amount), now_ns)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing counted when `left` was called last."""
        return not self.entries


def share(left: int, least: int, wanted: int, part: int) -> int:
    """Return how much of what is left to hand out: the less is left the less, down to what one call needs."""
    if left < least:
        return 0
    return min(left, max(least, min(wanted, left // part)))
