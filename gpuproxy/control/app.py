"""The control process: the store, the management API, the link, the journal's way into the store.

This is its composition root. Its sockets come from the supervisor, so nothing is refused while it restarts.
"""

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from gpuproxy.access.attempts import Attempts
from gpuproxy.access.grants import grant_for
from gpuproxy.access.keyring import Keyring, fresh_keyring, load_keyring
from gpuproxy.access.passwords import Hasher
from gpuproxy.codec.seal import Seal
from gpuproxy.config import Config, Rates
from gpuproxy.control import events
from gpuproxy.control.changes import ChangeFeed
from gpuproxy.control.mcp_groups import add_groups
from gpuproxy.control.metrics import (
    GAUGES_READ,
    TRAFFIC,
    add_metrics,
    counted,
    endpoint_calls,
    journal_bytes,
    open_breakers,
    waiting_calls,
)
from gpuproxy.control.nodes import Nodes
from gpuproxy.control.pages.render import add_templates
from gpuproxy.control.pages.serve import add_pages, refusals_as_pages
from gpuproxy.control.pages.table import PAGES
from gpuproxy.control.parts import (
    ATTEMPTS,
    BUS,
    CONFIG,
    EXPORTING,
    FLEET,
    HASHER,
    HUB,
    INGEST,
    KEYRING,
    LEADER,
    LEASES,
    LISTENERS,
    NODES,
    OFFERS,
    ROUTING,
    STOPPING,
    STORE,
    STREAM,
    USAGE_WANTED,
)
from gpuproxy.control.paying import add_payments, look_after_payments, payment_providers
from gpuproxy.control.rates import RATES, ApiRates, tell_count
from gpuproxy.control.respond import errors_in_one_shape, name_server
from gpuproxy.control.route import add_routes
from gpuproxy.control.routing import TOPIC, RoutingFeed
from gpuproxy.control.table import TABLE
from gpuproxy.control.telling import Teller
from gpuproxy.control.wanting import UsageWanted
from gpuproxy.errors import ConfigError, GatewayError, PluginError
from gpuproxy.events.hub import Hub
from gpuproxy.events.post import Bounds, Poster
from gpuproxy.events.sender import Sender
from gpuproxy.events.stream import Stream
from gpuproxy.fleet.keeper import Keeper as FleetKeeper
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reach import machines_of
from gpuproxy.guard import Guard
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.keeper import Keeper, limit_per_minute
from gpuproxy.ledger.leases import Leases, LimitOf, journaled_epochs, node_id
from gpuproxy.ledger.retention import Retention
from gpuproxy.link.server import LinkServer
from gpuproxy.observe.access_log import access_log
from gpuproxy.observe.logs import configure_logs, get_logger, is_json
from gpuproxy.plugin import PaymentProvider, Registry, build_providers, load_plugins
from gpuproxy.process import Boot, on_stop, receive_boot, report_ready
from gpuproxy.store.engine import Store, fault_of, open_store, shown
from gpuproxy.store.migrate import upgrade
from gpuproxy.types import Grant

if TYPE_CHECKING:
    from gpuproxy.control.traces import Exporter

logger = get_logger(__name__)


def run() -> None:
    """Be the control process of the supervisor that started this interpreter."""
    boot = receive_boot()
    configure_logs(boot.config.log)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(serve(boot)))


async def serve(boot: Boot) -> int:
    """Serve until told to stop; return the exit code, 1 for a store or a secret that cannot be used."""
    stopping = asyncio.Event()
    on_stop(boot, stopping.set)
    try:
        keyring = load_keyring(boot.config.auth.jwt_secret_env, Path(boot.config.server.data_dir))
    except (ConfigError, OSError) as error:
        logger.error("the secret that signs tokens cannot be used", cause=str(error))
        return 1
    try:
        providers = payment_providers(boot.config)
    except (ConfigError, PluginError) as error:
        logger.error("payments cannot be taken; see [[payments]]", cause=str(error))
        return 1
    try:
        exporter = _exporter(boot.config)
    except ConfigError as error:
        logger.error("spans cannot be sent; see [traces]", cause=str(error))
        return 1
    try:
        store = await _opened(boot.config.store.url)
    except (SQLAlchemyError, GatewayError, ValueError, OSError) as error:
        cause = fault_of(error)
        logger.error("the store cannot be used; see [store] url", store=shown(boot.config.store.url), cause=cause)
        return 1
    try:
        await _serve(boot, store, keyring, stopping, providers, exporter)
    finally:
        await store.close()
    return 0


async def _opened(url: str) -> Store:
    store = open_store(url)
    try:
        if await upgrade(store):
            logger.info("store brought to the newest schema")
    except BaseException:
        await store.close()
        raise
    return store


async def _serve(
    boot: Boot,
    store: Store,
    keyring: Keyring,
    stopping: asyncio.Event,
    providers: Mapping[str, PaymentProvider],
    exporter: "Exporter | None",
) -> None:
    """Start the parts in the order they need each other; stop them the other way round, the journal last."""
    auth = boot.config.auth
    node = node_id(Path(boot.config.server.data_dir))
    ingest = Ingest(store, journal_directory(boot.config), node=node)
    link = link_server(store, boot.config)
    nodes = Nodes(store, boot.config.redis.url, node)
    link.seal_keys = keyring.session_keys()
    link.lessor = leases = Leases(
        store, node, limits(store, boot.config.rates), link.push, lambda: ingest.pass_count, nodes.windows, nodes.peers
    )
    leases.limit_stale_s = auth.stale_grant_s
    leases.credit.expiry_s = boot.config.ledger.lost_node_s
    keeper = Keeper(
        store, ingest, leases, link.epochs, journal_directory(boot.config), boot.config.prices, link.publish
    )
    await keeper.read_prices()
    await nodes.start()
    feed = ChangeFeed(store, link)
    nodes.bus.on("changes", feed.wake)
    await feed.start(auth.stale_grant_s)
    link.refresh = feed.poll_once
    routing = RoutingFeed(store, boot.config, link)
    nodes.bus.on(TOPIC, routing.wake)
    await routing.poll_once()  # before any worker links: it is told what is in force before it serves
    await link.start(socket.socket(fileno=boot.link_fd))
    fleet = await open_fleet(store, boot.config)
    fleet.written = feed.wake
    link.machines_of = partial(machines_of, fleet)
    app = application(store, stopping, boot.config, keyring, nodes, providers, fleet, routing, leases)
    add_groups(app, boot.config, boot.address, Seal(keyring.session_keys()))
    await app[STREAM].start()
    _observe(app, ingest, link, boot.config, exporter)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=boot.config.server.drain_s)
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=boot.listen_fd)).start()
    works = (
        feed.run(stopping),
        routing.run(stopping),
        ingest.run(boot.config.journal),
        keeper.run(stopping),
        nodes.run(stopping),
        look_after_payments(app, stopping),
        app[STREAM].run(stopping),
        events.watch(app, stopping),
        webhook_sender(store, boot.config, keyring).run(stopping),
        Teller(store, boot.config, nodes.leader.confirm).run(stopping),
        Retention(store, boot.config.ledger.retention_days, nodes.leader.confirm).run(stopping),
        FleetKeeper(fleet, app[OFFERS], nodes.leader.confirm).run(stopping),
        *([exporter.run(stopping)] if exporter is not None else ()),
    )
    tasks = [asyncio.create_task(work) for work in works]
    gc.freeze()  # else every full collection walks all of SQLAlchemy and aiohttp: 50 ms
    report_ready(boot)
    try:
        await _first(stopping, *tasks)
    finally:
        await link.close()  # first: a successor must know all workers before it hands out what they hold
        await runner.cleanup()
        stopping.set()
        ingest.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        await app[OFFERS].close()
        await fleet.close()
        await _last_pass(ingest, leases, journal_directory(boot.config))
        if exporter is not None:
            await exporter.close()


def _exporter(settings: Config) -> "Exporter | None":
    """Return what sends spans, if they are wanted. Raises ConfigError."""
    if not settings.traces.endpoint:
        return None
    from gpuproxy.control.traces import Exporter  # costs only those who want it

    return Exporter(settings.traces, node_id(Path(settings.server.data_dir)), os.environ)


def _observe(
    app: web.Application, ingest: Ingest, link: LinkServer, settings: Config, exporter: "Exporter | None"
) -> None:
    """Let stored receipts be counted, logged and traced, and gauges be read."""
    app[INGEST] = ingest
    log, traffic = settings.log, app[TRAFFIC]
    ingest.watchers = (traffic.add, access_log(is_json(log))) if log.access else (traffic.add,)
    if exporter is not None:
        ingest.watchers += (exporter.add,)
        exporter.count = traffic.add_traces
    app[GAUGES_READ].set("gpuproxy_breaker_open", lambda: open_breakers(link.states()))
    app[GAUGES_READ].set("gpuproxy_endpoint_calls", lambda: endpoint_calls(link.states()))
    app[GAUGES_READ].set("gpuproxy_waiting_calls", lambda: waiting_calls(link.waiting()))
    app[GAUGES_READ].set("gpuproxy_workers", lambda: {(): float(len(link.links))})
    app[GAUGES_READ].set("gpuproxy_journal_bytes", lambda: journal_bytes(journal_directory(settings)))


async def _first(stopping: asyncio.Event, *tasks: "asyncio.Task[None]") -> None:
    """Wait for the word to stop; a task that ends before is a fault and raises."""
    waiting = asyncio.create_task(stopping.wait())
    done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for task in done:
        task.result()


async def _last_pass(ingest: Ingest, leases: Leases, journal: Path) -> None:
    """Read the journal to its end; then what workers that are gone had leased is for others."""
    try:
        await ingest.ingest_once()
        await leases.close(lambda: journaled_epochs(journal))
    except Exception as error:
        logger.error("journal is left for the next start", error=f"{type(error).__name__}: {error}")
    ingest.close()


async def open_fleet(store: Store, config: Config) -> Fleet:
    """Return the fleet of the providers in the configuration. Raises what the store raises."""
    registry = load_plugins(config.plugins.enabled) if config.providers else Registry()
    fleet = Fleet(store, build_providers(config.providers, registry, os.environ), config.fleet, config.providers)
    await fleet.open()
    return fleet


def journal_directory(config: Config) -> Path:
    """Return where workers write their segments."""
    return Path(config.server.data_dir) / "journal"


def link_server(store: Store, config: Config) -> LinkServer:
    """Return the link server that answers from `store`."""

    async def authorize(digest: bytes) -> Grant | None:
        rates = config.rates
        return await grant_for(store, digest, rates.requests_per_minute, rates.tokens_per_minute, rates.streams)

    return LinkServer(authorize, config.auth.authorize_timeout_s, config.auth.stale_grant_s)


def webhook_sender(store: Store, config: Config, keyring: Keyring) -> Sender:
    """Return the sender of what webhooks are owed."""
    settings, egress = config.webhooks, config.egress
    guard = Guard(egress.allow)
    bounds = Bounds(
        settings.timeout_s, settings.connect_s, config.timeouts.dns_s, egress.connect_to, guard, egress.ca_file
    )
    return Sender(store, keyring, Poster(bounds), settings)


def limits(store: Store, rates: Rates) -> LimitOf:
    """Return the function that tells what a key, or a user, may do in a minute or at once."""

    async def limit_of(_user_id: str, key_id: str) -> int:
        return await limit_per_minute(store, key_id, rates)

    return limit_of


def application(
    store: Store,
    stopping: asyncio.Event,
    config: Config | None = None,
    keyring: Keyring | None = None,
    nodes: Nodes | None = None,
    providers: Mapping[str, PaymentProvider] | None = None,
    fleet: Fleet | None = None,
    routing: RoutingFeed | None = None,
    leases: Leases | None = None,
) -> web.Application:
    """Return the management API over `store`; without a keyring its tokens end with it.

    `providers` take payments; they are closed with the application. Without a `fleet` nothing can be rented.
    """
    app = web.Application(middlewares=[counted, refusals_as_pages, errors_in_one_shape])
    nodes = nodes or Nodes(store)
    app[STORE] = store
    app[BUS], app[LEADER], app[NODES] = nodes.bus, nodes.leader, nodes
    app[CONFIG] = config or Config()
    app[RATES] = ApiRates(app[CONFIG].rates)
    app[ROUTING] = routing or RoutingFeed(store, app[CONFIG])
    app[KEYRING] = keyring or fresh_keyring()
    app[HASHER] = Hasher()
    app[ATTEMPTS] = Attempts()
    app[EXPORTING] = set()
    app[LEASES] = leases or Leases(store, "", limits(store, app[CONFIG].rates), lambda epoch, recall: False)
    app[FLEET] = fleet or Fleet(store, {}, app[CONFIG].fleet)
    app[OFFERS] = Offers(app[FLEET])
    app[STOPPING] = stopping
    add_payments(app, store, providers or {})
    app[LISTENERS] = set()
    app[HUB] = Hub()
    app[USAGE_WANTED] = UsageWanted(store)
    app[STREAM] = Stream(store, app[HUB].publish, app[CONFIG].events)
    add_metrics(app)
    add_routes(app, TABLE)
    add_templates(app)
    add_pages(app, PAGES)
    app.on_response_prepare.append(name_server)
    app.on_response_prepare.append(tell_count)
    app.on_shutdown.append(events.close_all)
    app.on_cleanup.append(_close_hasher)
    return app


async def _close_hasher(app: web.Application) -> None:
    app[HASHER].close()


if __name__ == "__main__":
    run()
