"""Where calls of one model, or to one upstream by its name, may go: endpoints in levels, a strategy, a queue.

Levels are tried in order: by priority, and with the strategy "cheapest" by price within one. When nothing in them is
listed, the fallback models are tried. When these cannot serve either, an endpoint that is left alone gets the call
all the same, for the last one is never given up. Only when all are at their limit does the call wait.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, cast

from msgspec import Struct

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import ProtocolHandler
from gpuproxy.proxy.balance import LEVELS, Level
from gpuproxy.proxy.breaker import Replica, Replicas
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.retry import Budget
from gpuproxy.proxy.served import NOTHING, Served

if TYPE_CHECKING:
    from gpuproxy.proxy.attempts import Attempts
    from gpuproxy.proxy.exchange_state import ExchangeState

BUSY_RETRY_S = 1


class Terms(Struct, frozen=True):
    """How a destination chooses, tries again and lets wait.

    With ``is_idempotent_only`` the reasons to try again hold for methods that may be repeated (RFC 9110 §9.2.2): what
    a call to an upstream by its name means, nobody here knows.
    """

    strategy: str = "round_robin"
    affinity_header: bytes = b""  # lower case
    retry_on: frozenset[str] = frozenset()
    attempts_max: int = 1
    budget_percent: int = 0
    queue_max: int = 0
    queue_s: float = 0.0
    total_s: float = 0.0  # 0: no bound
    is_idempotent_only: bool = False


class Destination:
    """One model or upstream. `only` is the endpoint of those that have no choice to make."""

    __slots__ = (
        "_is_serving",
        "_turn",
        "affinity_header",
        "budget",
        "endpoints",
        "fallbacks",
        "handler",
        "has_choice",
        "levels",
        "may_ask_usage",
        "model",
        "only",
        "places",
        "served",
        "stands_in_for",
        "terms",
        "upstream",
        "waiting",
    )

    def __init__(
        self,
        upstream: str,
        model: str,
        handler: ProtocolHandler,
        endpoints: Sequence[Endpoint],
        terms: Terms,
        replicas: Replicas,
        cost: Callable[[Endpoint], float] | None = None,
    ) -> None:
        self.upstream = upstream  # its name, empty if there are several
        self.model = model
        self.handler = handler
        self.served: Served = NOTHING  # of an upstream by its name
        self.endpoints = tuple(endpoints)
        self.terms = terms
        self.affinity_header = terms.affinity_header if terms.strategy == "affinity" else b""
        self.budget = Budget(terms.budget_percent)
        self.fallbacks: tuple[Destination, ...] = ()
        self.stands_in_for: tuple[Destination, ...] = ()  # whose fallbacks have this one among them
        self.waiting: OrderedDict[Attempts, None] = OrderedDict()
        self._turn = 0
        self._is_serving = False
        self.levels = tuple(_levels(self.endpoints, terms.strategy, replicas, cost))
        for level in self.levels:
            for endpoint in level.endpoints:
                self._take_in(endpoint, level)
        self.settle()

    def _take_in(self, endpoint: Endpoint, level: Level) -> None:
        replica = endpoint.replica
        assert replica is not None
        endpoint.destination = self
        endpoint.level = level
        replica.endpoints.append(endpoint)
        if level.watches:
            replica.watchers += ((level, endpoint),)
        if endpoint.room is not None:
            endpoint.room.endpoints.append(endpoint)
            replica.watchers += ((endpoint.room, endpoint),)
        endpoint.weigh()
        endpoint.refresh()

    def settle(self) -> None:
        """Find out what holds for all there is to choose from; to be called when `fallbacks` are known."""
        served = [(place.model, endpoint) for place in (self, *self.fallbacks) for endpoint in place.endpoints]
        self.places = {(model, endpoint.upstream) for model, endpoint in served}
        self.may_ask_usage = any(endpoint.may_ask_usage for _, endpoint in served)
        self.has_choice = len(self.endpoints) > 1 or bool(self.fallbacks)
        self.only = None if self.has_choice or self.endpoints[0].room else self.endpoints[0]

    # -- choosing ---------------------------------------------------------------------------------------------

    def choose(self, key: int, models: Sequence[str] | None) -> Endpoint | None:
        """Return the endpoint for a call, None if all are at their limit. `models` may be used, None: all."""
        for level in self.levels:
            endpoint = level.pick(key)
            if endpoint is not None:
                return endpoint
        for destination in self._allowed_fallbacks(models):
            for level in destination.levels:
                if (endpoint := level.pick(key)) is not None:
                    return endpoint
        return self._last_resort(())

    def another(self, tried: Sequence[Replica], key: int, models: Sequence[str] | None, any: bool) -> Endpoint | None:
        """Return an endpoint for a second try at a replica not `tried`; with `any` also one that is left alone."""
        for destination in (self, *self._allowed_fallbacks(models)):
            for level in destination.levels:
                endpoint = level.pick(key)
                if endpoint is not None and endpoint.replica in tried:
                    endpoint = _untried(level, tried)
                if endpoint is not None:
                    return endpoint
        return self._last_resort(tried) if any else None

    def _allowed_fallbacks(self, models: Sequence[str] | None) -> "Iterator[Destination]":
        return (each for each in self.fallbacks if models is None or each.model in models)

    def _last_resort(self, tried: Sequence[Replica]) -> Endpoint | None:
        """Return an endpoint that has room, in turn, whether it is left alone or not."""
        count = len(self.endpoints)
        self._turn += 1
        for index in range(self._turn, self._turn + count):
            endpoint = self.endpoints[index % count]
            if endpoint.has_room and endpoint.replica not in tried:
                return endpoint
        return None

    def endpoint_of(self, upstream: str, url: str) -> Endpoint | None:
        """Return the endpoint at this base URL of an upstream. Looks through all: for what is remembered."""
        for endpoint in self.endpoints:
            replica = endpoint.replica
            if replica is not None and (replica.upstream, replica.url) == (upstream, url):
                return endpoint
        return None

    def narrowed(self, endpoint: Endpoint) -> "Destination":
        """Return the same with this endpoint only: there is nothing to choose, wait for or try again elsewhere."""
        narrow = copy.copy(self)
        narrow.endpoints = (endpoint,)
        narrow.only = endpoint
        narrow.has_choice = False
        return narrow

    # -- waiting ----------------------------------------------------------------------------------------------

    def hold(self, exchange: "Attempts") -> None:
        """Let a call wait for room. Raises GatewayError UPSTREAM_BUSY when too many wait already."""
        if len(self.waiting) >= self.terms.queue_max:
            self._ask_for_room(is_urgent=False)
            raise self.busy()
        self.waiting[exchange] = None
        self._ask_for_room(is_urgent=True)

    def leave(self, exchange: "ExchangeState") -> None:
        """Let a call wait no more."""
        self.waiting.pop(cast("Attempts", exchange), None)

    def busy(self) -> GatewayError:
        """Return the error for a call that cannot wait, or not longer."""
        what = f"model {self.model!r}" if self.model else f"upstream {self.upstream!r}"
        message = f"all endpoints of {what} are at their limit of calls; try again"
        return GatewayError("UPSTREAM_BUSY", message, BUSY_RETRY_S)

    def _ask_for_room(self, is_urgent: bool) -> None:
        """Let other workers leave us some of theirs. Looks through all, but only what was not asked yet is sent."""
        for destination in (self, *self.fallbacks):
            for endpoint in destination.endpoints:
                if endpoint.room is not None:
                    endpoint.room.want(len(self.waiting) or 1, is_urgent)

    def serve_waiting(self) -> None:
        """Let those who wait go on, first come first served, as long as there is room."""
        if self._is_serving or not self.waiting:  # one that failed at once has made room: the loop goes on
            return
        self._is_serving = True
        try:
            self._serve_in_turn()
        finally:
            self._is_serving = False

    def _serve_in_turn(self) -> None:
        while self.waiting:
            exchange = next(iter(self.waiting))
            endpoint = self.only or exchange.choose_from(self)
            if endpoint is None:
                self._ask_for_room(is_urgent=True)
                return
            self.waiting.pop(exchange, None)
            exchange.go_to(endpoint)


def _untried(level: Level, tried: Sequence[Replica]) -> Endpoint | None:
    """Look through all of a level: only for second tries, which the budget bounds."""
    return next((each for each in level.endpoints if each.is_listed and each.replica not in tried), None)


def _levels(
    endpoints: Sequence[Endpoint], strategy: str, replicas: Replicas, cost: Callable[[Endpoint], float] | None
) -> Iterator[Level]:
    def rank(endpoint: Endpoint) -> tuple[int, float]:
        return endpoint.priority, cost(endpoint) if cost is not None and strategy == "cheapest" else 0.0

    for _, group in groupby(sorted(endpoints, key=rank), rank):
        equal = tuple(group)
        first = int(len(equal) * replicas.lead)
        yield LEVELS[strategy]((*equal[first:], *equal[:first]), replicas)
