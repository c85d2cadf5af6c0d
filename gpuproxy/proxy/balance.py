"""Strategies: which of several endpoints gets the next call.

Each keeps what it needs up to date as calls begin and end, and as endpoints come and go, so that a choice never
looks at all of them. A choice among 100 endpoints takes under 2 µs (tests/proxy/test_balance.py measures it).

    round_robin        weighted: the endpoint whose next turn is earliest; a turn lasts 1 / weight
    least_connections  the fewest open calls for its weight
    power_of_two       of two at random the one with less to expect: time to first byte times open calls
    cheapest           as round_robin, in the levels of price (see `Destination`)
    affinity           consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016)
"""

import hashlib
import math
import random
from bisect import bisect
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

from gpuproxy.proxy.breaker import Replicas
from gpuproxy.proxy.endpoint import Endpoint

GOLDEN = 0.6180339887498949  # spreads the first turns of any number of endpoints evenly
LATENCY_FADES_S = 10.0  # what is known of an endpoint's latency counts half after so long without news
LOAD_MAX = 1.25  # affinity: how far above the average an endpoint may be loaded
RING_POINTS = 64  # of an endpoint of average weight; evens out their parts to about 12 %


class Level:
    """Endpoints that are equally welcome, and a strategy. Only listed ones are chosen."""

    watches = False  # whether `moved` must be told of calls
    learns = False  # whether the time to the first byte must be known

    def __init__(self, endpoints: Sequence[Endpoint], replicas: Replicas) -> None:
        self.endpoints = tuple(endpoints)
        self._replicas = replicas

    def pick(self, key: int) -> Endpoint | None:
        """Return the endpoint for a call, None if none is listed. `key` is what affinity goes by."""
        raise NotImplementedError

    def add(self, endpoint: Endpoint) -> None:
        """List an endpoint."""

    def remove(self, endpoint: Endpoint) -> None:
        """List an endpoint no more."""

    def moved(self, endpoint: Endpoint, by: int) -> None:
        """Take note that a call began or ended."""

    def weighed(self, endpoint: Endpoint) -> None:
        """Take note that its weight changed."""


class RoundRobin(Level):
    """A heap of next turns. Endpoints that are not listed fall out when their turn comes."""

    def __init__(self, endpoints: Sequence[Endpoint], replicas: Replicas) -> None:
        super().__init__(endpoints, replicas)
        self._turns: list[tuple[float, int, Endpoint]] = []
        self._numbers = {endpoint: number for number, endpoint in enumerate(self.endpoints)}
        self._queued: set[int] = set()
        self._now = 0.0

    def pick(self, key: int) -> Endpoint | None:
        """Return the endpoint whose turn it is."""
        turns = self._turns
        while turns:
            turn, number, endpoint = turns[0]
            if endpoint.is_listed:
                self._now = turn
                heapreplace(turns, (turn + endpoint.step, number, endpoint))
                return endpoint
            heappop(turns)
            self._queued.discard(number)
        return None

    def add(self, endpoint: Endpoint) -> None:
        """Give it a first turn, somewhere within its step."""
        number = self._numbers[endpoint]
        if number not in self._queued:
            self._queued.add(number)
            count = len(self.endpoints)
            phase = (number + 0.5) / count if endpoint.step == 1.0 else (0.5 + number * GOLDEN) % 1.0
            heappush(self._turns, (self._now + endpoint.step * phase, number, endpoint))


class LeastConnections(Level):
    """A heap of loads with stale entries: an endpoint's newest entry counts, older ones fall out at the top."""

    watches = True

    def __init__(self, endpoints: Sequence[Endpoint], replicas: Replicas) -> None:
        super().__init__(endpoints, replicas)
        self._loads: list[tuple[float, int, Endpoint]] = []
        self._newest: dict[Endpoint, int] = {}
        self._turn = 0

    def pick(self, key: int) -> Endpoint | None:
        """Return the least loaded one; among equals the one that has waited longest."""
        loads = self._loads
        while loads:
            _, turn, endpoint = loads[0]
            if endpoint.is_listed and self._newest[endpoint] == turn:
                return endpoint
            heappop(loads)
        return None

    def moved(self, endpoint: Endpoint, by: int) -> None:
        """Enter its new load."""
        if endpoint.is_listed:
            self.add(endpoint)

    def add(self, endpoint: Endpoint) -> None:
        """Enter its load."""
        self._turn = turn = self._turn + 1
        self._newest[endpoint] = turn
        replica = endpoint.replica
        assert replica is not None
        heappush(self._loads, (replica.open_count * endpoint.step, turn, endpoint))
        if len(self._loads) > 8 * len(self.endpoints) + 64:  # rare enough to cost nothing per call
            self._loads = [entry for entry in self._loads if self._newest[entry[2]] == entry[1]]
            heapify(self._loads)

    def weighed(self, endpoint: Endpoint) -> None:
        """Enter its new load."""
        self.moved(endpoint, 0)


class PowerOfTwo(Level):
    """A plain list of the listed ones."""

    learns = True

    def __init__(self, endpoints: Sequence[Endpoint], replicas: Replicas) -> None:
        super().__init__(endpoints, replicas)
        self._listed: list[Endpoint] = []
        self._places: dict[Endpoint, int] = {}
        self._random = random.random

    def pick(self, key: int) -> Endpoint | None:
        """Return the better of two."""
        listed = self._listed
        count = len(listed)
        if count < 2:
            return listed[0] if listed else None
        first, second = divmod(int(self._random() * count * (count - 1)), count - 1)
        one, other = listed[first], listed[second if second < first else second + 1]
        near, far = one.replica, other.replica
        load_near = (near.begun_count - near.ended_count + 1) * one.step  # type: ignore[union-attr]
        load_far = (far.begun_count - far.ended_count + 1) * other.step  # type: ignore[union-attr]
        if near.ewma_us and far.ewma_us:  # type: ignore[union-attr]
            since_s = self._replicas.now_s + LATENCY_FADES_S
            # each divided by its age, which is here multiplied to the other side
            load_near *= near.ewma_us * (since_s - far.ewma_s)  # type: ignore[union-attr]
            load_far *= far.ewma_us * (since_s - near.ewma_s)  # type: ignore[union-attr]
        return one if load_near <= load_far else other

    def add(self, endpoint: Endpoint) -> None:
        """Put it at the end."""
        self._places[endpoint] = len(self._listed)
        self._listed.append(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Put the last one into its place."""
        place = self._places.pop(endpoint)
        last = self._listed.pop()
        if last is not endpoint:
            self._listed[place] = last
            self._places[last] = place


class Affinity(Level):
    """A ring of hashes: a key belongs to the endpoint at the next point, or to the next one with room."""

    watches = True

    def __init__(self, endpoints: Sequence[Endpoint], replicas: Replicas) -> None:
        super().__init__(endpoints, replicas)
        points = sorted(point for endpoint in self.endpoints for point in self._points_of(endpoint))
        self._points = [point for point, _ in points]
        self._owners = [self.endpoints[number] for _, number in points]
        self._open_count = 0  # over those that are listed
        self._weight = 0.0
        self._parts: dict[Endpoint, tuple[float, int]] = {}  # of each of these, in the two sums

    def _points_of(self, endpoint: Endpoint) -> list[tuple[int, int]]:
        average = sum(each.weight for each in self.endpoints) / len(self.endpoints)
        count = max(8, round(RING_POINTS * endpoint.weight / average))
        replica = endpoint.replica
        assert replica is not None
        number = self.endpoints.index(endpoint)
        names = (f"{replica.url} {endpoint.model} {index}".encode() for index in range(count))
        return [(int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big"), number) for name in names]

    def pick(self, key: int) -> Endpoint | None:
        """Return the first from the key's place on that may take one more."""
        if not self._parts:
            return None
        owners = self._owners
        fair = LOAD_MAX * (self._open_count + 1) / self._weight
        at = bisect(self._points, key)
        for index in range(at - len(owners), at):  # once around, over the end by way of negative places
            endpoint = owners[index]
            if endpoint.is_listed and endpoint.replica.open_count < math.ceil(fair / endpoint.step):  # type: ignore[union-attr]
                return endpoint
        return next(iter(self._parts))  # what other models have open there may leave no room by this count

    def add(self, endpoint: Endpoint) -> None:
        """Let it have its part again."""
        assert endpoint.replica is not None
        self._count(endpoint, 1.0 / endpoint.step, endpoint.replica.open_count)

    def remove(self, endpoint: Endpoint) -> None:
        """Let the others have its part."""
        self._count(endpoint, 0.0, 0)
        del self._parts[endpoint]

    def moved(self, endpoint: Endpoint, by: int) -> None:
        """Keep the sum."""
        if endpoint in self._parts:
            weight, count = self._parts[endpoint]
            self._count(endpoint, weight, count + by)

    def weighed(self, endpoint: Endpoint) -> None:
        """Keep the sum."""
        if endpoint in self._parts:
            self._count(endpoint, 1.0 / endpoint.step, self._parts[endpoint][1])

    def _count(self, endpoint: Endpoint, weight: float, count: int) -> None:
        weight_before, count_before = self._parts.get(endpoint, (0.0, 0))
        self._parts[endpoint] = weight, count
        self._weight += weight - weight_before
        self._open_count += count - count_before


LEVELS: dict[str, type[Level]] = {
    "round_robin": RoundRobin,
    "least_connections": LeastConnections,
    "power_of_two": PowerOfTwo,
    "cheapest": RoundRobin,
    "affinity": Affinity,
}
