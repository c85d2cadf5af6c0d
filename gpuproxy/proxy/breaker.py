"""Whether an endpoint gets calls: a circuit breaker for each base URL, fed by how its calls go.

    closed --- failures in a row, or Retry-After ---> open --- time ---> half open --- one call ---> trying
       ^------------------------- a good answer ------'---------------------'-----------------------'  |
                                                      ^------------------- a bad one ------------------'

Which moves are legal stands in one table. A call remembers the generation of the breaker it began in, and each move
begins a new one: what calls of an earlier generation report is ignored. So 2,000 calls that fail together open a
breaker once, and none of them closes it again or lengthens its time.

Workers tell each other of their moves: what one has opened all have, and one call of all workers tries it. Two may
if they come within the same millisecond. A try elsewhere is waited for no longer than `open_max_s`.

Bad probes in a row open it whatever calls say, and keep it open until one is good.

A replica that comes back gets a growing share of its calls (slow start).
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, Protocol

from gpuproxy.config.routing import Routing
from gpuproxy.link.messages import BreakerMove
from gpuproxy.observe.logs import get_logger
from gpuproxy.proxy.resting import Resting
from gpuproxy.proxy.rooms import Rooms

if TYPE_CHECKING:
    from gpuproxy.proxy.endpoint import Endpoint

_log = get_logger("gpuproxy.breaker")

CLOSED, OPEN, HALF_OPEN, TRYING = range(4)
STATES = ("closed", "open", "half_open", "half_open")  # trying: half open, and its one call is under way

FAILURES, WAIT, TIME, ADMITTED, GOOD, BAD, ABANDONED, TOLD = range(8)
MOVES: dict[tuple[int, int], int] = {
    (CLOSED, FAILURES): OPEN,
    (CLOSED, WAIT): OPEN,  # it said 503 with Retry-After
    (CLOSED, TOLD): OPEN,  # another worker opened it
    (OPEN, TIME): HALF_OPEN,
    (OPEN, GOOD): CLOSED,  # a call that had nowhere else to go, or a probe
    (HALF_OPEN, ADMITTED): TRYING,
    (HALF_OPEN, GOOD): CLOSED,  # a probe
    (HALF_OPEN, BAD): OPEN,  # a probe
    (HALF_OPEN, TOLD): OPEN,  # a call of another worker tries it, or found it bad
    (TRYING, GOOD): CLOSED,
    (TRYING, BAD): OPEN,
    (TRYING, WAIT): OPEN,
    (TRYING, ABANDONED): HALF_OPEN,  # its client left before anything was known
}

EWMA_PART = 0.2  # weight of the newest answer in the average
SHARE_LEAST = 0.1  # of its calls, right after it came back
BAD_STATUSES = range(502, 505)  # what proxies and overloaded servers answer; a 500 may be the request's own fault


What = Literal["opened", "trying", "closed", "abandoned"]


class Watcher(Protocol):
    """Whoever must know how many calls are open at an endpoint."""

    def moved(self, endpoint: "Endpoint", by: int) -> None:
        """Take note that one more (1) or one less (-1) is open."""


class Replica:
    """The live state of one base URL of an upstream in this worker; shared by all models it serves."""

    __slots__ = (
        "_open_for_s",
        "_registry",
        "bad_probe_count",
        "begun_count",
        "ended_count",
        "endpoints",
        "ewma_s",
        "ewma_us",
        "failed_count",
        "failure_count",
        "generation",
        "is_calm",
        "open_until_s",
        "opened_count",
        "recovered_s",
        "share",
        "state",
        "upstream",
        "url",
        "watchers",
    )

    def __init__(self, registry: "Replicas", upstream: str, url: str) -> None:
        self._registry = registry
        self.upstream = upstream
        self.url = url
        self.endpoints: list[Endpoint] = []
        self.watchers: tuple[tuple[Watcher, Endpoint], ...] = ()
        self.state = CLOSED
        self.generation = 0
        self.begun_count = self.ended_count = 0  # calls; the difference is under way
        self.failed_count = self.opened_count = 0
        self.failure_count = 0  # in a row
        self.bad_probe_count = 0  # in a row, whatever calls told between them
        self.ewma_us = 0.0  # of the time to the first byte; 0: nothing known
        self.ewma_s = 0.0  # when it was last tried
        self.open_until_s = 0.0
        self._open_for_s = 0.0
        self.recovered_s = 0.0
        self.share = 1.0
        self.is_calm = False

    @property
    def resting(self) -> Resting:
        """Return the endpoints that rest."""
        return self._registry.resting

    @property
    def open_count(self) -> int:
        """Return how many calls are under way."""
        return self.begun_count - self.ended_count

    def calm(self) -> None:
        """Find out whether calls must be told to anybody. If not, an exchange does no more than count them."""
        is_watched = self.watchers or any(endpoint.level.learns for endpoint in self.endpoints)
        is_quiet = self.state == CLOSED and not self.failure_count
        self.is_calm = is_quiet and not is_watched and not self._registry.config.slow_first_byte_s

    @property
    def admits(self) -> bool:
        """Tell whether the breaker lets one more call through."""
        return self.state == CLOSED or self.state == HALF_OPEN

    # -- what calls tell ------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Count a call in; return the generation to report with."""
        self.begun_count += 1
        if self.state == HALF_OPEN:
            self._move(ADMITTED)
            self._tell("trying")
        for watcher, endpoint in self.watchers:
            watcher.moved(endpoint, 1)
        return self.generation

    def end(self, generation: int) -> None:
        """Count a call out."""
        self.ended_count += 1
        if self.state == TRYING and generation == self.generation:
            self._move(ABANDONED)
            self._tell("abandoned")
        for watcher, endpoint in self.watchers:
            watcher.moved(endpoint, -1)

    def answered(self, status: int, first_byte_us: float, generation: int) -> None:
        """Learn from the head of an answer."""
        if status < 400:
            ewma_us = self.ewma_us
            self.ewma_us = ewma_us + (first_byte_us - ewma_us) * EWMA_PART if ewma_us else first_byte_us
        self.ewma_s = self._registry.now_s
        if status in BAD_STATUSES or first_byte_us > self._registry.slow_us:
            self.failed(generation)
        elif self.failure_count or self.state:
            self._succeeded(generation)

    def failed(self, generation: int) -> None:
        """Note that a call got no answer, or a bad one."""
        self.failed_count += 1
        if generation != self.generation:
            return
        self.failure_count += 1
        self.is_calm = False
        if self.state == CLOSED and self.failure_count >= self._registry.config.failures_max:
            self._open(FAILURES)
        elif self.state == TRYING:
            self._open(BAD)

    def told_to_wait(self, wait_s: float, generation: int) -> None:
        """Leave it alone for as long as its Retry-After says, but within bounds."""
        if generation == self.generation and self.state in (CLOSED, TRYING):
            self._open(WAIT, wait_s)

    def rest(self, endpoint: "Endpoint", wait_s: float) -> None:
        """Leave this endpoint alone, but not others here: it said 429."""
        if endpoint in self.endpoints and endpoint not in self.resting:  # else each limited call would be told
            registry = self._registry
            wait_s = min(wait_s, registry.config.open_max_s)
            registry.resting.add(endpoint, registry.now_s + wait_s)
            registry.tell(BreakerMove(self.upstream, self.url, "resting", wait_s, model=endpoint.title))

    def probed(self, is_good: bool) -> None:
        """Learn from an active probe."""
        self.bad_probe_count = 0 if is_good else self.bad_probe_count + 1
        if not is_good:
            if self.state == HALF_OPEN:
                self._open(BAD)
            else:
                self.failed(self.generation)
                if self.state == CLOSED and self.is_unfit:
                    self._open(FAILURES)
        elif self.state in (OPEN, HALF_OPEN):
            self._close()
        else:
            self.failure_count = 0
            self.calm()

    @property
    def is_unfit(self) -> bool:
        """Tell whether its probes say that it should get no calls."""
        return self.bad_probe_count >= self._registry.config.failures_max

    def _succeeded(self, generation: int) -> None:
        if generation != self.generation or (self.state != CLOSED and self.is_unfit):
            return
        if self.state == CLOSED:
            self.failure_count = 0
            self.calm()
        elif (self.state, GOOD) in MOVES:
            self._close()

    # -- moves ------------------------------------------------------------------------------------------------

    def _open(self, event: int, wait_s: float = 0.0) -> None:
        if not self._registry.has(self):  # taken out of the configuration while a call was under way
            return
        config = self._registry.config
        if not wait_s:
            self._open_for_s = wait_s = min(config.open_max_s, self._open_for_s * 2 or config.open_s)
        wait_s = min(wait_s, config.open_max_s)
        self.open_until_s = self._registry.now_s + wait_s
        self.opened_count += 1
        self._move(event)
        self._registry.restless[self] = None
        self.tell_open()
        _log.warning("endpoint left alone", upstream=self.upstream, url=self.url, for_s=round(wait_s, 1))

    def _close(self, is_told: bool = False) -> None:
        self.failure_count = 0
        self._open_for_s = 0.0
        self.recovered_s = self._registry.now_s
        self._take_share()
        self._move(GOOD)
        self._registry.restless[self] = None
        if is_told:
            return
        self._tell("closed")
        _log.info("endpoint is back", upstream=self.upstream, url=self.url)

    def _move(self, event: int) -> None:
        """Raises KeyError for a move that is not in the table."""
        self.state = MOVES[self.state, event]
        self.generation += 1
        self.calm()
        for endpoint in self.endpoints:
            endpoint.refresh()

    # -- other workers ----------------------------------------------------------------------------------------

    def told(self, move: BreakerMove) -> None:
        """Learn what another worker has found out. A call of this one that tries it goes on."""
        if move.what == "resting":
            for endpoint in self.endpoints:
                if endpoint.title == move.model:
                    self._registry.resting.add(endpoint, self._registry.now_s + move.for_s)
            return
        if self.state == TRYING:
            return
        if move.what == "closed":
            if self.state != CLOSED:
                self._close(is_told=True)
        elif move.what == "abandoned":
            self.open_until_s = 0.0  # the next sweep lets one of ours try
        elif move.what == "opened":
            self.opened_count += self.state == CLOSED
            self._leave_alone(move.for_s)
            self._open_for_s = move.step_s
        elif self.state != CLOSED:
            self._leave_alone(self._registry.config.open_max_s)

    def tell_open(self) -> None:
        """Tell the other workers if it is left alone here."""
        wait_s = self.open_until_s - self._registry.now_s
        if self.state == OPEN and wait_s > 0:
            self._tell("opened", wait_s, self._open_for_s)

    def _leave_alone(self, wait_s: float) -> None:
        self.open_until_s = self._registry.now_s + wait_s
        if self.state != OPEN:
            self._move(TOLD)
            self._registry.restless[self] = None

    def _tell(self, what: What, for_s: float = 0.0, step_s: float = 0.0) -> None:
        self._registry.tell(BreakerMove(self.upstream, self.url, what, for_s, step_s))

    # -- time -------------------------------------------------------------------------------------------------

    def sweep(self, now_s: float) -> bool:
        """Do what time brings; False when nothing more is to be expected."""
        if self.state == OPEN and now_s >= self.open_until_s and not self.is_unfit:
            self._move(TIME)
        if self.state == CLOSED and self.share < 1.0:
            self._take_share()
        return self.state != CLOSED or self.share < 1.0

    def _take_share(self) -> None:
        slow_start_s = self._registry.config.slow_start_s
        passed_s = self._registry.now_s - self.recovered_s
        self.share = min(1.0, max(SHARE_LEAST, passed_s / slow_start_s)) if slow_start_s else 1.0
        for endpoint in self.endpoints:
            endpoint.weigh()


class Replicas:
    """All replicas of a worker. They outlive the routers that are built on them.

    ``lead`` is from 0 up to 1: where among endpoints that are equally good this worker begins. Were it the same in all,
    the first calls of all workers would meet at one endpoint.
    """

    def __init__(self, config: Routing, now_s: float = 0.0, rooms: Rooms | None = None, lead: float = 0.0) -> None:
        self.now_s = now_s or time.monotonic()
        self.restless: dict[Replica, None] = {}
        self.rooms = rooms or Rooms()
        self.resting = Resting()
        self.lead = lead
        self.tell: Callable[[BreakerMove], None] = lambda move: None  # the other workers
        self._by_place: dict[tuple[str, str], Replica] = {}
        self.configure(config)

    def all(self) -> Iterable[Replica]:
        """Return every replica."""
        return self._by_place.values()

    def configure(self, config: Routing) -> None:
        """Take the terms of ``[routing]``."""
        self.config = config
        self.slow_us = config.slow_first_byte_s * 1e6 or float("inf")

    def get(self, upstream: str, url: str) -> Replica:
        """Return the replica at this place."""
        place = upstream, url
        replica = self._by_place.get(place)
        if replica is None:
            replica = self._by_place[place] = Replica(self, upstream, url)
        return replica

    def has(self, replica: Replica) -> bool:
        """Tell whether it is still one of them."""
        return self._by_place.get((replica.upstream, replica.url)) is replica

    def told(self, move: BreakerMove) -> None:
        """Take what another worker tells."""
        replica = self._by_place.get((move.upstream, move.url))
        if replica is not None:
            replica.told(move)

    def report(self) -> None:
        """Tell control, which may be a new one, what is left alone."""
        for replica in self.restless:
            replica.tell_open()

    def begin_rebuild(self) -> None:
        """Forget whose endpoints the replicas are: another router will say so anew."""
        for replica in self._by_place.values():
            replica.endpoints = []
            replica.watchers = ()
            replica.bad_probe_count = 0  # it may be probed no more
        self.rooms.begin_rebuild()
        self.resting.clear()

    def end_rebuild(self) -> None:
        """Forget replicas that no endpoint has any more."""
        self._by_place = {place: replica for place, replica in self._by_place.items() if replica.endpoints}
        for replica in self._by_place.values():
            replica.calm()
        self.restless = {replica: None for replica in self.restless if replica.endpoints}
        self.rooms.end_rebuild()

    def sweep(self, now_s: float) -> None:
        """Do what time brings to those that expect something of it."""
        self.now_s = now_s
        self.resting.sweep(now_s)
        for replica in [replica for replica in self.restless if not replica.sweep(now_s)]:
            del self.restless[replica]
