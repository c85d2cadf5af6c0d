"""One node leads, and another after it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from gpuproxy.store.engine import Store
from gpuproxy.store.leader import Leader

SOON_S = 20.0


@asynccontextmanager
async def running(store: Store) -> AsyncIterator[Leader]:
    leader = Leader(store)
    stopping = asyncio.Event()
    task = asyncio.create_task(leader.run(stopping))
    try:
        yield leader
    finally:
        stopping.set()
        await task


async def leads(*leaders: Leader) -> Leader:
    """Wait until one of them leads; return it."""
    async with asyncio.timeout(SOON_S):
        while not any(leader.is_leader for leader in leaders):
            await asyncio.sleep(0.01)
    return next(leader for leader in leaders if leader.is_leader)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_the_only_node_leads(store: Store) -> None:
    leader = Leader(store)
    assert leader.is_leader
    assert await leader.confirm()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_of_several_nodes_one_leads_and_when_it_stops_another(store: Store) -> None:
    async with running(store) as second:
        async with running(store) as first:
            leading = await leads(first, second)
            assert [await leader.confirm() for leader in (first, second)].count(True) == 1
            if leading is second:
                return  # it leads alone, whatever the other does
        await leads(second)


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_leader_whose_session_was_ended_finds_out_when_it_asks(store: Store) -> None:
    leader = Leader(store)
    await leader._look()
    assert leader.is_leader
    async with store.reading() as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        await connection.execute(text(cut + " AND datname = current_database()"))
    assert await leader.confirm() is False
    await leader._look()
    assert await leader.confirm()
    leader._end()
