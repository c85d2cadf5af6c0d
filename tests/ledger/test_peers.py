"""Two nodes on one PostgreSQL: credit that one holds and does not use is there for the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from lessors import Site, Worker
from redis_server import RedisServer

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.peers import Peers
from gpuproxy.ledger.shared_windows import SharedWindows
from gpuproxy.ledger.verify import verify
from gpuproxy.ledger.windows import Windows
from gpuproxy.link.messages import LeaseKind
from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import Store
from gpuproxy.store.redis import Redis

SOON_S = 20.0
pytestmark = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


@asynccontextmanager
async def node(store: Store, name: str, windows: Windows | None = None) -> AsyncIterator[Site]:
    """Run a node."""
    bus, stopping, connected = Bus(store), asyncio.Event(), asyncio.Event()
    peers = Peers(bus, name)
    bus.on("ready", lambda _: connected.set())
    running = asyncio.create_task(bus.run(stopping))
    try:
        async with asyncio.timeout(SOON_S):
            await connected.wait()
        yield Site(store, name, windows, peers)
    finally:
        stopping.set()
        await running


@asynccontextmanager
async def two_nodes(store: Store) -> AsyncIterator[tuple[Site, Site]]:
    async with node(store, "a") as a, node(store, "b") as b:
        yield a, b


async def test_credit_idle_on_one_node_is_spent_on_the_other(store: Store) -> None:
    async with two_nodes(store) as (a, b):
        user = await create_user(store, "u@example.com")
        await credit(store, user.id, 100, "key")
        here, there = Worker(a, "a1", user.id), Worker(b, "b1", user.id)
        assert await here.call(60)
        assert await there.call(30), "what is not in use on the other node"
        assert not await there.call(11)
        assert await there.call(10)
        assert not await here.call(1)


@pytest.mark.parametrize("round_", range(3))
async def test_of_a_hundred_calls_on_two_nodes_those_that_are_paid_for_pass(store: Store, round_: int) -> None:
    async with two_nodes(store) as (a, b):
        user = await create_user(store, "u@example.com")
        await credit(store, user.id, 10, "key")
        workers = [Worker(site, f"{site_name}{n}", user.id) for site_name, site in (("a", a), ("b", b)) for n in (1, 2)]
        passed = await asyncio.gather(*(worker.call(1) for worker in workers for _ in range(25)))
        assert sum(passed) == 10
        assert await verify(store) == []


async def test_requests_idle_on_one_node_are_there_for_the_other(store: Store, redis_server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        sites = []
        for name in ("a", "b"):
            redis = Redis(redis_server.url)
            stack.push_async_callback(redis.close)
            windows = SharedWindows(redis, name)
            await redis.probe()
            sites.append(await stack.enter_async_context(node(store, name, windows)))
        kind: LeaseKind = "requests"
        here, there = (Worker(site, f"{name}1", "u1", kind) for name, site in zip("ab", sites, strict=True))
        assert await here.call(1), "and more is leased"
        passed = [await there.call(1) for _ in range(12)]
        assert sum(passed) == 9


async def test_a_node_that_is_gone_is_waited_for_once(store: Store) -> None:
    async with two_nodes(store) as (a, _):
        user = await create_user(store, "u@example.com")
        await credit(store, user.id, 100, "key")
        async with node(store, "gone") as gone:
            assert await gone.ask("g1", user.id, 100)
        loop = asyncio.get_running_loop()
        assert not await a.ask("a1", user.id, 1)
        started_s = loop.time()
        assert [await a.ask("a1", user.id, 1) for _ in range(20)] == [0] * 20
        assert loop.time() - started_s < 20 * 0.7
