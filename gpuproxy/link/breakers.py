"""What workers tell each other of endpoints, by way of control: what one has found out the others need not.

A worker that leaves an endpoint alone, tries it, or takes it back tells so once; nothing is told per call. Control
passes it on, and remembers what is left alone for workers that are linked later. No I/O; the clock is monotonic.
"""

import time
from collections.abc import Callable, Iterator

from msgspec import structs

from gpuproxy.link.messages import BreakerMove

REMEMBERED_MAX = 10_000  # endpoints; the oldest are forgotten


class Breakers:
    """The endpoints that are left alone, and until when."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._open: dict[tuple[str, str], tuple[BreakerMove, float]] = {}

    def note(self, move: BreakerMove) -> None:
        """Remember what a worker has told."""
        if move.what == "resting":
            return
        place = move.upstream, move.url
        self._open.pop(place, None)
        if move.what == "opened":
            self._open[place] = move, self._now_s() + move.for_s
            if len(self._open) > REMEMBERED_MAX:
                del self._open[next(iter(self._open))]

    def remembered(self) -> Iterator[BreakerMove]:
        """Yield what a worker must be told that knows of nothing."""
        now_s = self._now_s()
        for move, until_s in self._open.values():
            if until_s > now_s:
                yield structs.replace(move, for_s=until_s - now_s)
