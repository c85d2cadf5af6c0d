"""What a loop turn has to write, written at its end: first the journal, then the sockets, back to back.

uvloop writes to a socket the moment it is asked. Two things are won by waiting for the end of the turn:
a receipt is in the page cache before the client can see the end of its answer, so a worker killed at any moment
loses no call that looked complete; and one burst of sends wakes a sleeping peer once instead of once a call, which
halved the CPU of a small call where peers run on another core.

`turn` counts the turns. Bytes that arrive on an upstream connection in the turn in which a request was put here for
it cannot be its answer: the request has not been sent yet.
"""

import asyncio
from collections.abc import Callable


class Outbox:
    """The writes of this turn. `settle` runs before them (it writes the journal).

    Whoever appends to ``writes`` sees to it that the turn's end ``is_scheduled``; `write` does both, the hot path
    does it in place.
    """

    __slots__ = ("_loop", "_settle", "is_scheduled", "turn", "writes")

    def __init__(self, loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
        self._loop = loop
        self._settle = settle
        self.writes: list[tuple[asyncio.Transport, bytes]] = []
        self.is_scheduled = False
        self.turn = 0

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write `data` at the end of this turn, after what was given earlier."""
        self.writes.append((transport, data))
        if not self.is_scheduled:
            self.is_scheduled = True
            self._loop.call_soon(self._end_turn)

    def schedule(self) -> None:
        """See to it that `settle` runs at the end of this turn."""
        if not self.is_scheduled:
            self.is_scheduled = True
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self.is_scheduled = False
        self.turn += 1
        self.flush()

    def flush(self) -> None:
        """Write everything now; to be called before a transport is closed or handed to somebody else."""
        self._settle()
        writes = self.writes
        if writes:
            self.writes = []
            for transport, data in writes:
                try:
                    transport.write(data)
                except RuntimeError:  # closed meanwhile; whoever owned it has been told
                    continue
