"""Two gateways on one PostgreSQL and one Redis act as one, and go on while either is away."""

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator

import aiohttp
import pytest
from callers import CHAT, Answer, Caller, all_refused
from cluster import CALL_NANOUSD, PAID_MODEL, USER, Cluster, cluster
from conftest import MakeCaller
from gateways import Gateway, Origin

from gpuproxy.access.accounts import create_key, create_user, revoke_key
from gpuproxy.events.outbox import record
from gpuproxy.ledger.book import credit
from gpuproxy.store.engine import Store

HEAL_S = 30.0
MONEY_ROUNDS = int(os.environ.get("GPUPROXY_TEST_MONEY_ROUNDS", "2"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("nodes"), origin) as made:
        yield made


async def new_key(nodes: Cluster, rpm: int) -> tuple[str, str]:
    async def make(store: Store) -> tuple[str, str]:
        secret, key = await create_key(store, USER, rpm=rpm)
        return secret, key.id

    return await nodes.in_store(make)


async def health(caller: Caller) -> dict[str, str]:
    services: dict[str, str] = json.loads((await caller.get("/health")).body)["services"]
    return services


async def shows(gateways: list[Gateway], make: MakeCaller, service: str, state: str) -> None:
    """Wait until every node says so of a service."""
    for gateway in gateways:
        caller = make(gateway)
        async with asyncio.timeout(HEAL_S):
            while (await health(caller))[service] != state:
                await asyncio.sleep(0.05)


async def test_no_more_than_the_limit_pass_over_all_nodes(nodes: Cluster, new_caller: MakeCaller) -> None:
    limit, callers_each, calls_each = 40, 8, 10
    key, _ = await new_key(nodes, limit)
    callers = [new_caller(gateway) for gateway in nodes.gateways for _ in range(callers_each)]

    async def many(caller: Caller) -> list[int]:
        caller.key = key
        return [(await caller.post()).status for _ in range(calls_each)]

    statuses = Counter(status for row in await asyncio.gather(*map(many, callers)) for status in row)
    assert statuses == {200: limit, 429: 2 * callers_each * calls_each - limit}


@pytest.mark.parametrize("round_", range(MONEY_ROUNDS))
async def test_with_money_for_ten_exactly_ten_of_a_hundred_pass(
    nodes: Cluster, new_caller: MakeCaller, round_: int
) -> None:
    async def make(store: Store) -> str:
        user = await create_user(store, f"ten{round_}@example.com")
        await credit(store, user.id, 10 * CALL_NANOUSD, f"ten{round_}")
        secret, _ = await create_key(store, user.email, rpm=0)
        return secret

    key = await nodes.in_store(make)
    callers = [new_caller(nodes.gateways[number % 2]) for number in range(100)]
    for caller in callers:
        caller.key = key
    answers = await asyncio.gather(*(caller.post({**CHAT, "model": PAID_MODEL}) for caller in callers))
    assert Counter(answer.status for answer in answers) == {200: 10, 402: 90}


async def test_a_revoked_key_is_dead_on_every_node_within_a_second(nodes: Cluster, new_caller: MakeCaller) -> None:
    key, key_id = await new_key(nodes, 0)
    callers = [new_caller(gateway) for gateway in nodes.gateways]
    for caller in callers:
        caller.key = key
        assert (await caller.post()).status == 200

    async def revoke(store: Store) -> None:
        await revoke_key(store, key_id)

    await nodes.in_store(revoke)
    await all_refused(callers, 1.0)


async def test_calls_pass_while_redis_is_away_and_limits_are_shared_again_after(
    nodes: Cluster, new_caller: MakeCaller
) -> None:
    key, _ = await new_key(nodes, 1_000)
    callers = [new_caller(gateway) for gateway in nodes.gateways]
    await shows(nodes.gateways, new_caller, "redis", "healthy")
    nodes.redis.stop()
    for caller in callers:
        caller.key = key
        assert {(await caller.post()).status for _ in range(20)} == {200}
    await shows(nodes.gateways, new_caller, "redis", "unhealthy")
    nodes.redis.start()
    await shows(nodes.gateways, new_caller, "redis", "healthy")
    assert {(await caller.post()).status for caller in callers} == {200}


async def test_known_keys_are_served_while_postgresql_is_away_and_nothing_is_lost(
    nodes: Cluster, new_caller: MakeCaller
) -> None:
    limited, _ = await new_key(nodes, 1_000)
    unknown, _ = await new_key(nodes, 0)
    callers = [new_caller(gateway) for gateway in nodes.gateways for _ in range(2)]
    for number, caller in enumerate(callers):
        caller.key = limited if number % 2 else caller.key
        assert (await caller.post()).status == 200
    nodes.postgres.kill()
    answers: list[Answer] = []
    try:
        await shows(nodes.gateways, new_caller, "database", "unhealthy")
        answers += [await caller.post() for _ in range(10) for caller in callers]
        assert {answer.status for answer in answers} == {200}
        stranger = new_caller(nodes.gateways[0])
        stranger.key = unknown
        refused = await stranger.post()
        assert (refused.status, refused.code) == (503, "UNAVAILABLE"), "a good key is never told 401"
    finally:
        nodes.postgres.start()
    await shows(nodes.gateways, new_caller, "database", "healthy")
    assert (await stranger.post()).status == 200
    wanted = {answer.request_id for answer in answers}
    found: Counter[str] = Counter()
    async with asyncio.timeout(HEAL_S):
        while set(found) < wanted:
            await asyncio.sleep(0.1)
            found = Counter(row.request_id for row in await nodes.receipts() if row.request_id in wanted)
    assert set(found.values()) == {1}


async def test_who_goes_from_node_to_node_hears_each_event_once(nodes: Cluster) -> None:
    count = 200

    async def make(store: Store) -> tuple[str, str]:
        user = await create_user(store, "wanderer@example.com")
        return user.id, (await create_key(store, user.email))[0]

    user_id, key = await nodes.in_store(make)

    async def happen(store: Store) -> None:
        for n in range(count):
            async with store.writing() as connection:
                await connection.run_sync(record, "credits.added", user_id, {"n": n})

    heard: list[int] = []
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http, asyncio.timeout(HEAL_S):
        last, visits, happening = "", itertools.count(), None
        while len(heard) < count:
            visit = next(visits)
            async with http.ws_connect(f"http://127.0.0.1:{nodes.gateways[visit % 2].port}/ws") as socket:
                await socket.send_json({"type": "subscribe", "channels": ["billing_events"], "last_event_id": last})
                last = (await socket.receive_json())["payload"]["last_event_id"]
                happening = happening or asyncio.create_task(nodes.in_store(happen))
                for _ in range(min(visit % 9, count - len(heard))):
                    told = await socket.receive_json()
                    last = told["id"]
                    heard.append(told["payload"]["n"])
        assert happening is not None
        await happening
    assert heard == list(range(count))
