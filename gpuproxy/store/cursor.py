"""How far a reader of a table numbered by `seq` has come, when rows may appear out of order.

PostgreSQL gives a transaction its number when it inserts, not when it commits: row 8 may be there before row 7. So
a number that was passed over is looked for again, until it is there or so old that its transaction was rolled back.
"""

import time
from collections.abc import Callable, Collection, Iterable

from sqlalchemy import ColumnElement, or_

GAP_S = 60.0  # no transaction here takes so long
GAPS_MAX = 1_000  # the newest; a transaction that inserts so many rows and is rolled back is not waited for


class Cursor:
    """The newest number seen and the gaps below it. `clock` returns seconds that never go back."""

    def __init__(self, seq: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seq = seq
        self._gaps: dict[int, float] = {}
        self._clock = clock

    @property
    def gaps(self) -> Collection[int]:
        """Return the numbers below the newest that are looked for again."""
        return self._gaps

    def unread(self, column: ColumnElement[int]) -> ColumnElement[bool]:
        """Return the condition for rows not seen yet."""
        return or_(column > self.seq, column.in_(list(self._gaps))) if self._gaps else column > self.seq

    def advance(self, seen: Iterable[int]) -> None:
        """Count these numbers as read."""
        now_s = self._clock()
        numbers = set(seen)
        newest = max(numbers, default=self.seq)
        first = max(self.seq + 1, newest - GAPS_MAX)
        fresh = {number: now_s for number in range(first, newest) if number not in numbers}
        old = {n: since_s for n, since_s in self._gaps.items() if n not in numbers and now_s - since_s < GAP_S}
        self._gaps = dict(list({**old, **fresh}.items())[-GAPS_MAX:])
        self.seq = max(self.seq, newest)
