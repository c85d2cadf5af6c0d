"""Room at endpoints with a limit of calls at once: the seats that this worker holds, see `gpuproxy.link.seating`.

A worker keeps the part of a limit that would be its own if all had the same, asks for more when that is used up, and
gives back what it has not used for a while. Calls under way count whatever way they came. While control is away each
worker goes on with the seats it has.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import FreeSeats, GiveSeats, HoldSeats, SeatPlace, Seats, WantSeats

if TYPE_CHECKING:
    from gpuproxy.proxy.breaker import Replica
    from gpuproxy.proxy.endpoint import Endpoint

NOTHING, AHEAD, URGENT = range(3)
TURN_S = 0.05  # between two seats that one worker passes on; an ordinary call lasts longer


class Room:
    """The seats at one base URL under one limit; ``endpoints`` are those that keep to it."""

    __slots__ = (
        "_asked",
        "_is_pressed",
        "_link",
        "_now_s",
        "_passed_s",
        "_spare",
        "endpoints",
        "limit",
        "part",
        "place",
        "replica",
        "seats",
    )

    def __init__(
        self, link: LinkClient | None, replica: "Replica", limit: int, part: int, now_s: Callable[[], float]
    ) -> None:
        self._link = link
        self._now_s = now_s
        self._passed_s = 0.0
        self.replica = replica
        self.limit = limit
        self.part = part
        self.place: SeatPlace = replica.upstream, replica.url, limit
        self.seats = replica.open_count if link is not None else limit
        self.endpoints: list[Endpoint] = []
        self._asked = NOTHING  # an open question
        self._is_pressed = False
        self._spare = 0  # the fewest that were free since the last sweep
        if link is not None:
            self.report()

    @property
    def spare(self) -> int:
        """Return how many seats are free, below 0 when calls came that need none."""
        return self.seats - self.replica.open_count

    def report(self) -> None:
        """Tell control, which may be a new one, what is held here and wanted."""
        self._is_pressed = False
        self._send(HoldSeats(self.place, self.seats))
        asked, self._asked = self._asked, NOTHING
        if asked or self.seats < (self.part or 1):
            self.want(self.part or 1, is_urgent=asked == URGENT)

    def moved(self, endpoint: "Endpoint", by: int) -> None:
        """Take note that a call began or ended, and list the endpoint or not."""
        if by < 0 and self._is_pressed:
            self._pass_on()
        spare = self.spare
        self._spare = min(self._spare, spare)
        endpoint.refresh()
        if by < 0:
            endpoint.wake()
        elif spare <= 0:
            self.want(self.part or 1, is_urgent=False)

    def want(self, count: int, is_urgent: bool) -> None:
        """Ask for more seats, unless that has been asked; it is urgent if calls wait."""
        level = URGENT if is_urgent else AHEAD
        if self._asked < level and self.seats < self.limit:
            self._asked = level
            self._send(WantSeats(self.place, min(count, self.limit - self.seats), is_urgent))

    def take(self, count: int) -> None:
        """Hold so many more."""
        self._asked = NOTHING
        self.seats += count
        for endpoint in self.endpoints:
            endpoint.refresh()
            endpoint.wake()
        if self._is_pressed:  # asked for by calls that have gone elsewhere since
            self._give(self.spare)

    def free(self, when: str) -> None:
        """Give up seats that are free: once but for a last one, or now and always, or no more."""
        self._is_pressed = when == "always"
        if when != "no more":
            self._give(self.spare if self._is_pressed else self.seats - min(1, self.part))

    def sweep(self) -> None:
        """Give up what was free all the time; never be without a seat if there are enough for all."""
        self._give(min(self._spare, self.seats - self.part))
        self._spare = self.spare
        if not self.seats and self.part:
            self.want(1, is_urgent=False)

    def leave(self) -> None:
        """Give up what is free, and the rest in the sweeps: this worker has successors."""
        self.part = 0
        self._give(self.spare)

    def close(self) -> None:
        """Give up all seats: nothing keeps to this limit any more."""
        self._send(GiveSeats(self.place, self.seats))

    def _pass_on(self) -> None:
        """Give up what is free; where calls wait here too, not each time, or short ones would wait for what travels."""
        if any(endpoint.destination is not None and endpoint.destination.waiting for endpoint in self.endpoints):
            now_s = self._now_s()
            if now_s < self._passed_s + TURN_S:
                return
            self._passed_s = now_s
        self._give(self.spare)

    def _give(self, count: int) -> None:
        """Give up so many, if they are free and there is somebody to give them to."""
        count = min(count, self.spare)
        if count > 0 and self._link is not None and self._link.connected.is_set():
            self.seats -= count
            self._send(GiveSeats(self.place, count))
            for endpoint in self.endpoints:
                endpoint.refresh()

    def _send(self, message: HoldSeats | WantSeats | GiveSeats) -> None:
        if self._link is not None:
            self._link.send(message)


class Rooms:
    """The rooms of a worker, one of `workers`. Without a link it is alone."""

    def __init__(
        self, link: LinkClient | None = None, workers: int = 1, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._now_s = now_s
        self._workers = workers
        self._by_place: dict[SeatPlace, Room] = {}
        if link is not None:
            link.on_seats = self._take
            link.on_free_seats = self._free

    def of(self, replica: "Replica", limit: int) -> Room | None:
        """Return the room at a replica under a limit, None without one (0)."""
        if not limit:
            return None
        place = replica.upstream, replica.url, limit
        room = self._by_place.get(place)
        if room is None:
            room = self._by_place[place] = Room(self._link, replica, limit, limit // self._workers, self._now_s)
        return room

    def begin_rebuild(self) -> None:
        """Forget whose endpoints the rooms have."""
        for room in self:
            room.endpoints = []

    def end_rebuild(self) -> None:
        """Give up rooms that no endpoint has any more."""
        for room in [room for room in self if not room.endpoints]:
            room.close()
            del self._by_place[room.place]

    def report(self) -> None:
        """Tell control of all."""
        for room in self:
            room.report()

    def sweep(self) -> None:
        """Give up what is not used; called about twice a second."""
        for room in self:
            room.sweep()

    def leave(self) -> None:
        """Leave the seats to others as calls end: this worker takes no more."""
        for room in self:
            room.leave()

    def _take(self, message: Seats) -> None:
        room = self._by_place.get(message.place)
        if room is not None:
            room.take(message.count)
        elif self._link is not None:  # asked before its limit was taken out
            self._link.send(GiveSeats(message.place, message.count))

    def _free(self, message: FreeSeats) -> None:
        room = self._by_place.get(message.place)
        if room is not None:
            room.free(message.when)

    def __iter__(self) -> Iterator[Room]:
        return iter(self._by_place.values())
