"""``/metrics`` for Prometheus: what calls add up to since control started, and how things are now."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct
from prometheus_async.aio import time
from prometheus_client import Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from sqlalchemy import func, select

from gpuproxy.control.parts import FLEET, ROUTING, STORE
from gpuproxy.fleet import findings
from gpuproxy.fleet.sight import unreachable_counts
from gpuproxy.fleet.states import ENDED
from gpuproxy.link.messages import EndpointState
from gpuproxy.observe.series import GAUGES, MANAGEMENT, Labels
from gpuproxy.observe.traffic import Traffic
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import rentals

Reading = dict[Labels, float]
STORED = (
    "gpuproxy_active_instances",
    "gpuproxy_fleet_findings",
    "gpuproxy_provider_listed_seconds",
    "gpuproxy_unreachable_instances",
)
MANAGED_NAME = "gpuproxy_management_seconds"
LASTING = ("/ws",)  # a WebSocket lasts for hours
PROXIED = "/api/v1/gpu/proxy/"  # these are calls of their own, with receipts
READ_TIMEOUT_S = 1.0  # a store that is away must not hide all other series


class Gauges(Collector):
    """Values that are read when asked for."""

    def __init__(self) -> None:
        self.stored: dict[str, Reading] = {}  # those that are in the store, as they were last read
        self._readers: dict[str, Callable[[], Reading]] = {name: partial(self._of_store, name) for name in STORED}

    def set(self, name: str, read: Callable[[], Reading]) -> None:
        """Let `read` tell the values of a series of GAUGES."""
        if name not in GAUGES:
            raise ValueError(f"no gauge {name!r}; add it to observe/series.py")
        self._readers[name] = read

    def _of_store(self, name: str) -> Reading:
        return self.stored.get(name, {})

    def total(self, name: str) -> float | None:
        """Return what a series says now, over all its labels; None if nobody tells it."""
        read = self._readers.get(name)
        return None if read is None else sum(read().values())

    def collect(self) -> Iterator[Metric]:
        """Yield every series, for the registry."""
        for name, read in self._readers.items():
            description, labels = GAUGES[name]
            family = GaugeMetricFamily(name, description, labels=labels)
            for values, value in read().items():
                family.add_metric(values, value)
            yield family


TRAFFIC = web.AppKey("traffic", Traffic)
GAUGES_READ = web.AppKey("gauges", Gauges)
MANAGED = web.AppKey("managed", Histogram)
REGISTRY = web.AppKey("registry", CollectorRegistry)


def add_metrics(app: web.Application) -> None:
    """Let the application count its own answers and serve `show`."""
    registry = CollectorRegistry()
    app[TRAFFIC], app[GAUGES_READ], app[REGISTRY] = Traffic(app[ROUTING].is_model), Gauges(), registry
    registry.register(app[TRAFFIC])
    registry.register(app[GAUGES_READ])
    app[MANAGED] = Histogram(MANAGED_NAME, *MANAGEMENT[MANAGED_NAME], registry=registry)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)


async def show(request: web.Request) -> web.Response:
    """Show all metrics in the text form of Prometheus."""
    gauges = request.app[GAUGES_READ]
    with suppress(Exception):
        async with asyncio.timeout(READ_TIMEOUT_S):
            gauges.stored = await _stored(request.app[STORE], request.app[FLEET].providers)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(request.app[REGISTRY]), headers={"Content-Type": content_type})


@web.middleware
async def counted(request: web.Request, handler: Any) -> web.StreamResponse:
    """Count and time each answer of the management API."""
    resource = request.match_info.route.resource
    if resource is not None and resource.canonical.startswith(PROXIED):
        proxied: web.StreamResponse = await handler(request)
        return proxied
    answering = handler(request)
    if resource is not None and resource.canonical not in LASTING:
        answering = time(request.app[MANAGED].labels(resource.canonical), answering)
    response: web.StreamResponse = await answering
    request.app[TRAFFIC].add_managed(response.status, _code_of(response))
    return response


class _Coded(Struct):
    code: str = ""


_decode = msgspec.json.Decoder(_Coded).decode


def _code_of(response: web.StreamResponse) -> str:
    if response.status < 400 or not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return ""
    try:
        return _decode(response.body).code
    except msgspec.MsgspecError:
        return ""


async def _stored(store: Store, providers: Iterable[str]) -> dict[str, Reading]:
    query = select(rentals.c.provider, func.count()).where(rentals.c.state.not_in(ENDED)).group_by(rentals.c.provider)
    async with store.reading() as connection:
        counted = (await connection.execute(query)).all()
        found = await connection.run_sync(findings.open_counts)
        looks = (await connection.run_sync(findings.looks)).values()
        unseen = await connection.run_sync(unreachable_counts)
    none: Reading = {(provider,): 0.0 for provider in providers}  # is a number too
    active = none | {(provider,): float(count) for provider, count in counted}
    amiss: Reading = {labels: float(count) for labels, count in found.items()}
    listed: Reading = {(look.provider,): look.listed_at.timestamp() for look in looks if look.listed_at}
    unreachable = none | {(provider,): float(count) for provider, count in unseen.items()}
    return dict(zip(STORED, (active, amiss, listed, unreachable), strict=True))


def open_breakers(states: Iterable[EndpointState]) -> Reading:
    """Return in how many workers each endpoint is left alone."""
    return _by_endpoint(states, lambda state: state.state != "closed")


def endpoint_calls(states: Iterable[EndpointState]) -> Reading:
    """Return how many calls each endpoint serves."""
    return _by_endpoint(states, lambda state: state.open_count)


def waiting_calls(waiting: Iterable[tuple[str, int]]) -> Reading:
    """Return how many calls of each model wait, over all workers."""
    found: Reading = {}
    for model, count in waiting:
        found[(model,)] = found.get((model,), 0.0) + count
    return found


def _by_endpoint(states: Iterable[EndpointState], value: Callable[[EndpointState], float]) -> Reading:
    found: Reading = {}
    for state in states:
        labels = (state.upstream, state.url)
        found[labels] = found.get(labels, 0.0) + value(state)
    return found


def journal_bytes(directory: Path) -> Reading:
    """Return how much the journal holds."""
    with suppress(FileNotFoundError):
        return {(): float(sum(path.stat().st_size for path in directory.iterdir()))}
    return {(): 0.0}
