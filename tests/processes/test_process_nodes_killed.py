"""Two nodes under load while workers, control and PostgreSQL are killed: nothing is lost, nothing counts twice.

GPUPROXY_TEST_NODE_KILLS sets how many kills; the default keeps the run short. GPUPROXY_TEST_SEED chooses others.
"""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from callers import CHAT, STREAM, Answer, Caller, Load
from cluster import Cluster, cluster
from gateways import MODEL, Origin, children, kill, until
from test_process_exactly_once import assert_each_counts_once, of_the_dead

from gpuproxy.ledger.verify import verify

KILLS = int(os.environ.get("GPUPROXY_TEST_NODE_KILLS", "8"))
SEED = int(os.environ.get("GPUPROXY_TEST_SEED", "1"))
HEAL_S = 60.0
POSTGRES_SHARE = 0.15  # of the kills; it takes seconds to come back
PRICES = f'[[prices]]\nmodel = "{MODEL}"\ninput_usd_per_million = "0.15"\noutput_usd_per_million = "0.60"\n'


async def stream(caller: Caller) -> Answer:
    return await caller.post(STREAM)


async def chat(caller: Caller) -> Answer:
    return await caller.post(CHAT)


@pytest.fixture
def nodes(tmp_path: Path, origin: Origin) -> Iterator[Cluster]:
    with cluster(tmp_path, origin, PRICES, 2, journal={"segment_bytes": 16_384, "ingest_s": 0.02}) as made:
        yield made


async def test_every_complete_call_is_charged_once_whatever_is_killed_on_two_nodes(nodes: Cluster) -> None:
    async with AsyncExitStack() as stack:
        loads = [await stack.enter_async_context(Load(here.port, here.place.key)) for here in nodes.gateways]
        for load in loads:
            load.add(3, chat, pause_s=0.005)
            load.add(2, stream, pause_s=0.005)
        await killed(nodes, random.Random(SEED), loads)
    complete = {answer.request_id: answer for load in loads for answer in load.answers if answer.status == 200}
    for gateway in nodes.gateways:
        await until(lambda here=gateway: not of_the_dead(here.place, here), HEAL_S, "what the dead wrote is stored")
    for gateway in nodes.gateways:
        assert await asyncio.to_thread(gateway.stop) == 0
        assert not any(gateway.place.segments().values())
    assert len(complete) > 5 * KILLS
    assert_each_counts_once(complete, await nodes.receipts())
    assert await nodes.in_store(verify) == []
    await assert_money_is_right(nodes)


async def killed(nodes: Cluster, chance: random.Random, loads: list[Load]) -> None:
    """Kill something, wait until calls pass again, and so on."""
    for _ in range(KILLS):
        served = sum(len(load.answers) for load in loads) + chance.randrange(5, 60)
        await until(lambda n=served: sum(len(load.answers) for load in loads) >= n, HEAL_S, "calls pass")
        if chance.random() < POSTGRES_SHARE:
            await asyncio.to_thread(nodes.postgres.kill)
            await asyncio.sleep(chance.random() * 0.5)  # the outage
            await asyncio.to_thread(nodes.postgres.start)
            continue
        gateway = chance.choice(nodes.gateways)
        living = children(gateway.process.pid)
        if living:
            kill(chance.choice(living))


async def assert_money_is_right(nodes: Cluster) -> None:
    """What receipts cost is what was earned; what nobody could be charged for was written off."""
    (cost,) = (await nodes.query("SELECT coalesce(sum(cost_nanousd), 0) FROM receipts"))[0]
    (earned,) = (await nodes.query("SELECT posted_nanousd FROM accounts WHERE kind = 'revenue'"))[0]
    assert cost > 0
    assert abs(earned) == cost
