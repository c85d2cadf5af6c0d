"""Which worker may have how many calls at once at an endpoint with a limit, so that all together never exceed it.

A limit of n calls is n seats. A worker begins a call only on a seat that it holds, so nothing has to be fast for the
limit to hold: control hands out free seats and asks for others back, and only the worker itself gives one up. Whoever
has calls that wait stands in line; as long as somebody else does, a worker gives up seats when calls end, also if calls
wait there: so the line is served in turn. Whoever has merely used up what it holds gets what others leave.

Kept in memory: workers tell what they hold whenever they are linked. No I/O, no clock.
"""

from collections.abc import Callable

from gpuproxy.link.messages import FreeSeats, SeatPlace, Seats

Push = Callable[[str, Seats | FreeSeats], bool]


class _Pool:
    """The seats of one limit, by the epochs of workers."""

    __slots__ = ("ahead", "held", "limit", "line", "pressed")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: dict[str, int] = {}
        self.line: dict[str, int] = {}  # how many are wanted for calls that wait; the first comes first
        self.ahead: dict[str, int] = {}  # the same for calls that may come
        self.pressed: set[str] = set()  # who gives up each seat as soon as it can


class Seating:
    """The seats of all limits. ``push(epoch, message)`` tells a worker, False if it is not linked.

    Nothing is handed out before `open`: until then workers may tell what they hold from before.
    """

    def __init__(self, push: Push) -> None:
        self._push = push
        self._pools: dict[SeatPlace, _Pool] = {}
        self._is_open = False

    def open(self) -> None:
        """Hand out seats from now on."""
        self._is_open = True
        for place in list(self._pools):
            self._settle(place)

    def linked(self, epoch: str) -> None:
        """Forget what a worker wanted that is linked anew: it asks again once it has told what it holds."""
        for pool in self._pools.values():
            pool.line.pop(epoch, None)
            pool.ahead.pop(epoch, None)

    def hold(self, epoch: str, place: SeatPlace, count: int) -> None:
        """Note what a worker holds, whoever gave it; it has heard of nothing yet."""
        pool = self._pools.setdefault(place, _Pool(place[2]))
        pool.held[epoch] = count
        pool.pressed.discard(epoch)
        self._settle(place)

    def want(self, epoch: str, place: SeatPlace, count: int, is_urgent: bool) -> None:
        """Hand out up to `count` seats, now or when there are some. Answered at most once."""
        pool = self._pools.setdefault(place, _Pool(place[2]))
        pool.ahead.pop(epoch, None)
        (pool.line if is_urgent else pool.ahead)[epoch] = count
        self._settle(place)
        if self._is_open and epoch in pool.ahead:
            for other in pool.held.keys() - pool.pressed - {epoch}:
                self._push(other, FreeSeats(place, "once"))

    def give(self, epoch: str, place: SeatPlace, count: int) -> None:
        """Take seats back."""
        pool = self._pools.get(place)
        if pool is not None:
            pool.held[epoch] = max(0, pool.held.get(epoch, 0) - count)
            self._settle(place)

    def gone(self, epoch: str, linked: Callable[[], set[str]] = set) -> None:
        """Free the seats of a worker that is dead: none of those that are linked."""
        if epoch in linked():
            return
        for place, pool in list(self._pools.items()):
            for known in (pool.held, pool.line, pool.ahead):
                known.pop(epoch, None)
            pool.pressed.discard(epoch)
            self._settle(place)

    def _settle(self, place: SeatPlace) -> None:
        """Hand out what is free, then press those who hold seats that are wanted, and no others."""
        pool = self._pools[place]
        if not self._is_open:
            return
        free = pool.limit - sum(pool.held.values())
        for line in (pool.line, pool.ahead):
            while free > 0 and line:
                epoch = next(iter(line))
                amount = min(line.pop(epoch), -(-free // (len(line) + 1)))
                if self._push(epoch, Seats(place, amount)):
                    pool.held[epoch] = pool.held.get(epoch, 0) + amount
                    free -= amount
        for epoch in pool.held:
            is_pressed = free < 0 or len(pool.line) > (epoch in pool.line)
            if is_pressed != (epoch in pool.pressed):
                pool.pressed ^= {epoch}
                self._push(epoch, FreeSeats(place, "always" if is_pressed else "no more"))
        if not (any(pool.held.values()) or pool.line or pool.ahead):
            del self._pools[place]
