"""The worker process: chooses the concrete parts, owns what calls share, sweeps deadlines, drains.

One coarse sweep serves every deadline of every connection, so that no call needs a timer: twice a second each
connection compares one number. 10,000 connections cost 0.1 % of a core. Calls read `Plane.now_s` instead of the clock:
the time of the next sweep, so that no deadline comes early and none more than two sweeps late.
"""

import asyncio
import contextlib
import gc
import ipaddress
import os
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Coroutine
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop

from gpuproxy.config import Config
from gpuproxy.errors import GatewayError
from gpuproxy.guard import Guard
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import Hello, Recall, Routing
from gpuproxy.observe.logs import configure_logs, get_logger
from gpuproxy.plugin import Registry, load_plugins
from gpuproxy.pricing import Price, from_config
from gpuproxy.process import Boot, on_stop, receive_boot, report_draining, report_ready
from gpuproxy.proxy.admit import Admission
from gpuproxy.proxy.answer import Answer
from gpuproxy.proxy.breaker import Replicas
from gpuproxy.proxy.credit import Credit
from gpuproxy.proxy.downstream import Downstream
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.exchange import Exchange
from gpuproxy.proxy.instances import Instances
from gpuproxy.proxy.journal import Journal, segment_name
from gpuproxy.proxy.limits import Limits
from gpuproxy.proxy.outbox import Outbox
from gpuproxy.proxy.pins import attach, warm_up
from gpuproxy.proxy.pool import ConnectPolicy, OriginKey, Pools
from gpuproxy.proxy.prices import Prices
from gpuproxy.proxy.probe import Probes
from gpuproxy.proxy.report import Reporter
from gpuproxy.proxy.rooms import Rooms
from gpuproxy.proxy.route import Router
from gpuproxy.proxy.tunnel import TunnelEnd
from gpuproxy.proxy.tunnelled import Tunnelled
from gpuproxy.proxy.unasked import UsageRefusals
from gpuproxy.proxy.upstream import UpstreamConnection
from gpuproxy.resolver import Resolver

_log = get_logger("gpuproxy.worker")

SWEEP_S = 0.5  # how late a deadline may be noticed
CHECKPOINTS_AT_ONCE = 500  # 3 ms
UNREAD_S = 0.05  # how often connections we do not read from are asked whether the client left
LINK_START_S = 5.0  # how long the start waits for the link; keys cannot be checked without it
FRESH_S = 3.0  # how long a drain waits for the first request of a connection just opened, on a busy machine too
PARTING_S = 3.0  # how long a worker with a successor waits for the next call of a connection: closing it may meet one
LEAVE_S = 600.0  # how long a worker with a successor lets open calls go on: as long as clients wait for an answer
CONTROL_KEEPALIVE_S = 30.0  # below the control server's own 75 s
NO_KEEPALIVE_S = -1.0  # over before it begins


class Plane:
    """What all connections of a worker share."""

    def __init__(
        self, config: Config, registry: Registry, link: LinkClient, journal: Journal, control_path: str, slot: int = 0
    ) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        self._registry = registry
        self.limits = config.limits
        self.timeouts = config.timeouts
        self.exchange = _exchange(config)
        self._time = loop.time
        self.now_s = loop.time() + SWEEP_S
        self.journal = journal
        self.outbox = Outbox(loop, journal.flush)
        self.downstreams: set[Downstream] = set()
        self.unread: set[Downstream] = set()
        self.tunnels: dict[Answer, tuple[TunnelEnd, TunnelEnd]] = {}
        self.is_draining = False
        self.is_hurried = False
        self.parting_s = 0.0  # how long after a call a drain waits for the next one on its connection
        self.drain_until_s = 0.0  # 0: as ``drain_s`` says
        self.wall_offset_ns = time.time_ns() - time.monotonic_ns()
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._trusted = tuple(ipaddress.ip_network(text) for text in config.server.trusted_proxies)
        self._id_prefix = f"req_{time.time_ns():x}{secrets.token_hex(3)}"
        self._id_count = 1_000_000_000  # of fixed width, so that ids sort by time in the store's index
        policy = ConnectPolicy(
            self.timeouts.connect_s,
            self.timeouts.dns_s,
            self.limits.upstream_connections_max,
            config.egress.connect_to,
            Guard(config.egress.allow),
            Resolver("dns"),
            Resolver("target-dns"),
        )
        self.pools = Pools(policy, UpstreamConnection, self.timeouts.upstream_keepalive_s, config.egress.ca_file)
        workers = config.server.workers
        self.rooms = Rooms(link, workers)
        self.replicas = Replicas(config.routing, loop.time(), self.rooms, slot / workers)
        self.replicas.tell = link.send
        link.on_breaker_move = self.replicas.told
        self.prices = Prices()
        self.prices.replace(map(from_config, config.prices))  # until control tells those in force
        self.router = self.build_router(config)
        self.usage_refusals = UsageRefusals(self)
        self.probes = Probes(self)
        self.routed = asyncio.Event()  # control has told which upstreams and models there are
        link.on_routing = self.take_routing
        self.seal = attach(registry, config)
        link.on_seal_keys = self.seal.take
        self.bounded: dict[Answer, float] = {}  # calls with a total time, and its end
        self.admission = Admission(config.auth, link, loop.time)
        self.limits_by_key = Limits(link)
        link.on_prices = self.take_prices
        self.credit = Credit(config.credit, link)
        self.timed: dict[Answer, None] = {}  # open calls whose price is by the second
        link.on_recall = self._recall
        link.on_revoke = self.admission.revoke
        link.on_renew = self.admission.renew
        self.instances = Instances(link, lambda: self._time())
        link.on_forget_machines = self.instances.forget
        link.on_reconnect = self._relinked
        self.control_endpoint = self._control("control", control_path, CONTROL_KEEPALIVE_S)
        self.control_changes = self._control("changes", control_path, NO_KEEPALIVE_S)

    def _control(self, name: str, path: str, keepalive_s: float) -> Endpoint:
        key = OriginKey("http", name, 0, unix_path=path)
        origin = self.pools.configured(key, "the management plane", keepalive_s=keepalive_s)
        endpoint = Endpoint(origin, b"localhost", self.timeouts.first_byte_s, self.timeouts.idle_s)
        endpoint.preserves_host = True
        return endpoint

    def build_router(self, config: Config) -> Router:
        """Return a router for these upstreams and models, on the pools and replicas there are."""
        self.replicas.begin_rebuild()
        try:
            return Router(config, self._registry, self.pools, os.environ, self.replicas, self._find_price)
        finally:
            self.replicas.end_rebuild()

    def _find_price(self, model: str, upstream: str) -> Price | None:
        return self.prices.find(model, upstream, time.time_ns())

    def take_routing(self, told: Routing) -> None:
        """Go by the upstreams and models that control has told. What cannot be used is told in the log."""
        self.routed.set()
        before = self.router.config
        if (told.upstreams, told.models) == (before.upstreams, before.models):
            return
        try:
            config = msgspec.structs.replace(before, upstreams=told.upstreams, models=told.models)
            self.take_router(self.build_router(config))
        except (GatewayError, OSError) as error:  # of a plugin this worker has not got yet; a file that is gone
            _log.error("upstreams and models refused, the old ones stay", reason=str(error))
            self.take_router(self.build_router(before))

    def take_router(self, router: Router) -> None:
        """Route by it from now on. Calls under way go on; those that wait for an endpoint wait for its new ones."""
        before, self.router = self.router, router
        self.usage_refusals.apply()
        for destination in set(before.models.values()):
            waiting, destination.waiting = destination.waiting, OrderedDict()
            for exchange in waiting:
                exchange.move_to(router.models.get(destination.model))
        self.pools.keep_only(router.origins())

    def take_prices(self, prices: list[Price]) -> None:
        """Go by the prices that control has told; where they decide who gets calls, decide anew."""
        self.prices.replace(prices)
        if any(place.terms.strategy == "cheapest" for place in self.router.models.values()):
            self.take_router(self.build_router(self.router.config))

    def _relinked(self) -> None:
        """Know nothing for sure that control may have taken back while it was away."""
        self.admission.refresh_all()
        self.instances.forget_all()
        self.limits_by_key.report()
        self.credit.report()
        self.rooms.report()
        self.replicas.report()

    def new_id(self) -> str:
        """Return an id for a request and its receipt, unique over all workers and restarts, growing with time."""
        self._id_count = count = self._id_count + 1
        return f"{self._id_prefix}{count}"

    def _recall(self, message: Recall) -> None:
        (self.credit if message.kind == "nanousd" else self.limits_by_key).recall(message)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that belongs to this worker; only for connecting, bounded by the pools."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def is_trusted_proxy(self, peer: str) -> bool:
        """Tell whether the peer may say who the client is."""
        if not self._trusted or peer == "unix":
            return False
        address = ipaddress.ip_address(peer.split("%", 1)[0])
        return any(address in network for network in self._trusted)

    def watch_unread(self, downstream: Downstream) -> None:
        """Look after a connection nobody reads from: its client may leave unnoticed by the loop."""
        if not self.unread:
            self._loop.call_later(UNREAD_S, self._check_unread)
        self.unread.add(downstream)

    def _check_unread(self) -> None:
        for downstream in list(self.unread):
            if downstream.has_hung_up():
                downstream.abort()
        if self.unread:
            self._loop.call_later(UNREAD_S, self._check_unread)

    def sweep(self) -> None:
        """Act on every deadline that has passed."""
        now_s = self._time()
        self.now_s = now_s + SWEEP_S
        self.replicas.sweep(now_s)
        self.rooms.sweep()
        self.probes.sweep(now_s)
        self.usage_refusals.sweep(now_s)
        for downstream in [d for d in self.downstreams if d.deadline_s <= now_s]:
            downstream.expire()
        for exchange in list(self.timed):
            exchange.prolong()
        for exchange in [each for each, until_s in self.bounded.items() if until_s <= now_s]:
            exchange.expire_total()
        for exchange, ends in list(self.tunnels.items()):
            cast(Tunnelled, exchange).tend_tunnel(ends, now_s)
        self._note_open_calls()
        self.pools.expire(now_s)
        self.admission.sweep()
        self.wall_offset_ns = time.time_ns() - time.monotonic_ns()

    def _note_open_calls(self) -> None:
        """Let calls that last note what they have used: a few in each sweep, so that many stop no other."""
        now_ns = time.monotonic_ns()
        open_calls = chain([d.current for d in self.downstreams if d.current is not None], list(self.tunnels))
        for exchange in islice((each for each in open_calls if each.is_due(now_ns)), CHECKPOINTS_AT_ONCE):
            exchange.checkpoint(now_ns)

    def begin_drain(self) -> None:
        """Take one last call on each connection, if it comes soon."""
        self.is_draining = True
        self.rooms.leave()
        for downstream in list(self.downstreams):
            if downstream.is_fresh:
                downstream.deadline_s = min(downstream.deadline_s, self.now_s + FRESH_S)
            elif downstream.current is None:
                downstream.part()

    async def drain(self) -> None:
        """Let calls in flight end, until ``drain_until_s`` or ``is_hurried``; then cut the rest."""
        self.drain_until_s = self.drain_until_s or self._time() + self.config.server.drain_s
        while (self.downstreams or self.tunnels) and self._time() < self.drain_until_s and not self.is_hurried:
            self.sweep()
            await asyncio.sleep(0.02)
        for downstream in list(self.downstreams):
            downstream.abort()
        for ends in list(self.tunnels.values()):
            ends[1].cut(GatewayError("UNAVAILABLE", "the gateway is stopping; connect again"))
        for ends in list(self.tunnels.values()):  # the middle of a frame is passing there
            ends[0].close()
        await asyncio.sleep(0)
        self.pools.close()


def _exchange(config: Config) -> type[Exchange]:
    if not config.traces.endpoint:
        return Exchange
    from gpuproxy.proxy.traced import TracedExchange  # costs only those who want it

    return TracedExchange


async def _sweep_forever(plane: Plane, reporter: Reporter) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            plane.sweep()
            reporter.sweep()
            plane.limits_by_key.sweep()
            plane.credit.sweep()
            plane.journal.measure()
        except Exception:
            _log.exception("sweep failed")


async def serve(boot: Boot) -> None:
    """Serve until told to stop, then drain."""
    loop = asyncio.get_running_loop()
    config = boot.config
    registry = load_plugins(config.plugins.enabled)
    epoch = segment_name(boot.slot)
    link = LinkClient(boot.link_path, Hello(boot.slot, os.getpid(), epoch))
    journal = Journal(Path(config.server.data_dir) / "journal", epoch, config.journal)
    plane = Plane(config, registry, link, journal, boot.control_path, boot.slot)
    stopping = asyncio.Event()
    was_told = False

    def stop() -> None:
        nonlocal was_told
        plane.is_hurried, was_told = was_told, True  # told again
        plane.drain_until_s = loop.time() + config.server.drain_s
        stopping.set()

    def leave() -> None:
        plane.parting_s = PARTING_S
        plane.drain_until_s = loop.time() + LEAVE_S
        stopping.set()

    on_stop(boot, stop, leave)
    server = await loop.create_server(
        lambda: Downstream(plane), sock=socket.socket(fileno=boot.listen_fd), backlog=LISTEN_BACKLOG
    )
    reporter = Reporter(plane.replicas, link, lambda: plane.router.models)
    background = [loop.create_task(link.run()), loop.create_task(_sweep_forever(plane, reporter))]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINK_START_S):
            await link.connected.wait()
            await plane.routed.wait()
    warm_up(plane.seal, plane.router)
    report_ready(boot)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await stopping.wait()
    server.close()
    plane.begin_drain()
    report_draining(boot)
    await plane.drain()
    plane.limits_by_key.close()
    plane.credit.close()
    for task in background:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*background)
    journal.close()


LISTEN_BACKLOG = 4096


def run() -> None:
    """Entry point of the process."""
    boot = receive_boot()
    configure_logs(boot.config.log)
    uvloop.run(serve(boot))


if __name__ == "__main__":
    run()
