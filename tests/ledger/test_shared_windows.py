"""Requests per minute over nodes that count in one Redis: together never more than the limit."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from redis_server import RedisServer

from gpuproxy.ledger import shared_windows
from gpuproxy.ledger.shared_windows import SharedWindows
from gpuproxy.ledger.windows import Part
from gpuproxy.store.redis import Redis

USER = ("u1", "k1")
SOON_S = 20.0


class Node(NamedTuple):
    """A node of its own: its windows and its way to Redis."""

    windows: SharedWindows
    redis: Redis

    async def asks(self, number: int, limit: int, least: int = 1, wanted: int = 1) -> Part:
        """Ask for a part, as worker w1's question `number`."""
        return await self.windows.grant(USER, ("w1", number), limit, least, wanted, time.monotonic_ns())

    async def takes(self, first: int, count: int, limit: int) -> int:
        """Ask for one request `count` times; return how many were granted."""
        return sum([(await self.asks(number, limit)).amount for number in range(first, first + count)])

    async def finds_redis_again(self) -> None:
        async with asyncio.timeout(SOON_S):
            while not self.redis.is_up:
                await self.redis.probe()


@asynccontextmanager
async def nodes(server: RedisServer, *names: str) -> AsyncIterator[list[Node]]:
    """Return nodes that have met."""
    made = []
    for name in names:
        redis = Redis(server.url)
        made.append(Node(SharedWindows(redis, name), redis))
    try:
        for node in [*made, *made]:
            await node.redis.probe()
        yield made
    finally:
        for node in made:
            await node.redis.close()


async def test_nodes_that_race_get_the_limit_together_and_no_more(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b") as (a, b):
        tasks = [node.asks(number, 100, wanted=7) for number in range(100) for node in (a, b)]
        parts = await asyncio.gather(*tasks)
        assert sum(part.amount for part in parts) == 100
        assert (await a.asks(1_000, 100)).left == 0


async def test_the_less_is_left_the_smaller_the_parts(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a") as (a,):
        assert [(await a.asks(number, 16, wanted=100)).amount for number in range(3)] == [4, 3, 2]
        assert (await a.asks(9, 16, least=8)).amount == 0
        assert (await a.asks(10, 16, least=7)).amount == 7


async def test_what_comes_back_can_be_had_by_the_other_node(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b") as (a, b):
        assert (await a.asks(1, 10, least=10)).amount == 10
        refused = await b.asks(1, 10)
        assert (refused.amount, refused.elsewhere) == (0, {"a"})
        a.windows.take_back(USER, ("w1", 1), 4)
        await a.windows.flush()
        assert await b.takes(2, 10, 10) == 4


async def test_requests_count_until_a_minute_after_their_lease(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_windows, "LEASE_NS", 100_000_000)
    monkeypatch.setattr(shared_windows, "MINUTE_NS", 1_000_000_000)
    async with nodes(redis_server, "a") as (a,):
        started_s = time.monotonic()
        part = await a.asks(1, 1)
        assert part.amount == 1
        assert part.until_ns <= time.monotonic_ns() + 100_000_000
        number = 1
        while not (await a.asks(number := number + 1, 1)).amount:
            assert time.monotonic() < started_s + SOON_S
        assert time.monotonic() - started_s >= 1.1


async def test_while_redis_is_away_each_node_has_its_share(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b") as (a, b):
        redis_server.stop()
        assert await a.takes(1, 20, 10) == 5
        assert await b.takes(1, 20, 10) == 5
        assert await a.takes(50, 2, 1) == 0, "of what is used up nothing is left"
        assert not a.redis.is_up


async def test_a_share_is_at_least_one(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b", "c") as (a, *_):
        redis_server.stop()
        assert await a.takes(1, 5, 2) == 1


async def test_a_redis_that_comes_back_empty_hears_what_was_handed_out(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b") as (a, b):
        assert await a.takes(1, 4, 20) == 4
        assert await b.takes(1, 3, 20) == 3
        redis_server.stop()
        assert await a.takes(10, 2, 20) == 2
        redis_server.start()
        await a.finds_redis_again()
        await b.finds_redis_again()
        assert (await b.asks(30, 0)).amount == 0
        monotone = [await node.takes(100, 30, 20) for node in (a, b)]
        assert 4 + 3 + 2 + sum(monotone) <= 20
        b.windows._careful_until_s = 0.0  # as after two seconds
        assert 4 + 3 + 2 + sum(monotone) + await b.takes(200, 30, 20) == 20


async def test_a_redis_that_was_emptied_is_noticed_with_the_next_question(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a", "b") as (a, b):
        assert await a.takes(1, 6, 10) == 6
        assert redis_server.command("FLUSHALL").startswith(b"+OK")
        granted = await a.takes(10, 10, 10)
        for node in (a, b, a, b):
            await node.redis.probe()
        granted += await b.takes(20, 10, 10) + await a.takes(30, 10, 10)
        assert 6 + granted <= 10


async def test_what_comes_back_while_redis_is_away_comes_back(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a") as (a,):
        assert (await a.asks(1, 10, least=10)).amount == 10
        redis_server.stop()
        assert await a.takes(2, 1, 10) == 0
        a.windows.take_back(USER, ("w1", 1), 3)
        redis_server.start()
        await a.finds_redis_again()
        await a.windows.flush()
        assert await a.takes(10, 10, 10) == 3


async def test_wrong_data_is_as_if_redis_were_away(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a") as (a,):
        redis_server.command("SET", "gpuproxy:limits:u1/k1:amounts", "rubbish")
        assert await a.takes(1, 20, 10) == 10


async def test_nothing_is_kept_for_a_subject_that_rests(redis_server: RedisServer) -> None:
    async with nodes(redis_server, "a") as (a,):
        await a.takes(1, 3, 10)
        assert redis_server.command("PTTL", "gpuproxy:limits:u1/k1:amounts") > b":60000"
        a.windows.sweep(time.monotonic_ns() + 62 * 10**9)
        assert not a.windows._here.windows
