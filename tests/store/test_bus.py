"""Words between nodes: hints that arrive at once, and whose loss is noticed."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import insert, text

from gpuproxy.access.accounts import create_user
from gpuproxy.events.outbox import record
from gpuproxy.store import bus
from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import changes

SOON_S = 20.0
Listen = Callable[[str], Awaitable["Ear"]]


class Ear:
    """A node's bus and what it heard of one topic."""

    def __init__(self, store: Store, topic: str) -> None:
        self.bus = Bus(store)
        self.heard: list[str] = []
        self._arrived = asyncio.Event()
        self.bus.on(topic, self._hear)

    async def hears(self, word: str) -> None:
        """Wait until `word` has been heard once more than before, then forget all."""
        async with asyncio.timeout(SOON_S):
            while word not in self.heard:
                await self._arrived.wait()
                self._arrived.clear()
        self.heard.clear()

    def _hear(self, word: str) -> None:
        self.heard.append(word)
        self._arrived.set()


@asynccontextmanager
async def listening(store: Store, topic: str) -> AsyncIterator[Ear]:
    """Run a bus; on PostgreSQL it has connected."""
    ear = Ear(store, topic)
    stopping = asyncio.Event()
    running = asyncio.create_task(ear.bus.run(stopping))
    try:
        if not store.is_sqlite:
            await ear.hears("")
        yield ear
    finally:
        stopping.set()
        await running


async def test_a_word_reaches_the_teller_too(store: Store) -> None:
    async with listening(store, "recall") as ear:
        assert await ear.bus.tell("recall", "give it back")
        await ear.hears("give it back")


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_word_reaches_other_nodes_and_only_its_topic(store: Store) -> None:
    async with listening(store, "recall") as here, listening(store, "other") as there:
        assert await there.bus.tell("recall", "now")
        await here.hears("now")
        assert there.heard == []


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_new_changes_and_events_are_told_when_they_are_committed(store: Store) -> None:
    async with listening(store, "changes") as changed, listening(store, "events") as happened:
        async with store.writing() as connection:
            row = {"kind": "key_revoked", "subject_id": "k1", "at": datetime.now(UTC)}
            await connection.execute(insert(changes).values(row))
            await connection.run_sync(record, "payment.failed", None, {})
        await changed.hears("")
        await happened.hears("")


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_while_it_listens_it_knows_whether_anybody_has_written(store: Store) -> None:
    heard: list[int | str | None] = []
    async with listening(store, "changes") as ear:
        ear.bus.on("changes", lambda _: heard.append(store.version()))
        before = await version_other_than(store, None)
        await create_user(store, "ann@example.com")  # of which no word is said
        assert await version_other_than(store, None, before)
        async with store.writing() as connection:
            row = {"kind": "key_revoked", "subject_id": "k1", "at": datetime.now(UTC)}
            await connection.execute(insert(changes).values(row))
        await ear.hears("")
        assert heard == [None], "who is woken would find nothing changed, and sleep on"
    assert store.version() is None


async def version_other_than(store: Store, *known: int | str | None) -> int | str | None:
    async with asyncio.timeout(SOON_S):
        while (version := store.version()) in known:
            await asyncio.sleep(0.01)
    return version


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_lost_connection_is_replaced_and_the_loss_told(store: Store) -> None:
    async with listening(store, "recall") as ear:
        async with store.reading() as connection:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            await connection.execute(text(cut + " AND datname = current_database()"))
        await ear.hears("")
        assert await ear.bus.tell("recall", "again")
        await ear.hears("again")


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_slow_connection_is_kept_but_nothing_is_known_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "ALIVE_S", SOON_S)
    async with listening(store, "recall") as ear:
        await version_other_than(store, None)
        with stopped(await backend_of(store)):
            async with asyncio.timeout(SOON_S):
                while store.version() is not None:
                    await asyncio.sleep(0.01)
            assert await ear.bus.tell("recall", "in vain") is False
        await version_other_than(store, None)
        assert await ear.bus.tell("recall", "again")
        async with asyncio.timeout(SOON_S):
            while "again" not in ear.heard:
                await asyncio.sleep(0.01)
        assert "" not in ear.heard, "no loss was told"


@contextmanager
def stopped(process_id: int) -> Iterator[None]:
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


async def backend_of(store: Store) -> int:
    """Return the process that serves the bus."""
    async with store.reading() as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%snapshot()%' AND pid <> pg_backend_pid()"
        found: int = (await connection.execute(text(query + " AND datname = current_database()"))).scalar_one()
    return found


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_word_that_cannot_get_out_is_reported(store: Store) -> None:
    assert await Bus(store).tell("recall", "nobody listens yet") is False


async def test_a_word_that_is_too_long_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="too long for 7000 bytes"):
        await Bus(store).tell("recall", "é" * 4_000)
