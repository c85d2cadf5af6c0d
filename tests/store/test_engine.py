"""Opening stores: URLs as people write them, and what a transaction promises."""

import asyncio
import socket
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from gpuproxy.store import engine
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.schema import accounts, changes, journal_segments


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("nonsense", "write sqlite:///./gpuproxy.db"),
        ("mysql://host/name", "known: sqlite:///PATH, postgresql:"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://host/name?sslmode=maybe", "known: disable"),
        ("postgresql://host/name?connect_timeout=3", "only sslmode is understood"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_remedy(url: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        open_store(url)


def test_the_error_for_a_bad_url_does_not_tell_the_password() -> None:
    with pytest.raises(ValueError) as caught:
        open_store("mysql://user:secret@host/name")
    assert "secret" not in str(caught.value)


async def test_the_postgresql_url_of_the_guide_is_taken_as_written() -> None:
    opened = open_store("postgresql://user:password@host:5432/gpuproxy?sslmode=disable")
    assert (opened.engine.url.drivername, opened.engine.url.database) == ("postgresql+asyncpg", "gpuproxy")
    await opened.close()


async def test_the_folder_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    opened = open_store(f"sqlite:///{tmp_path}/a/b/gpuproxy.db")
    assert await opened.is_healthy()
    await opened.close()
    assert (tmp_path / "a/b/gpuproxy.db").exists()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_sqlite_is_set_up_for_money(store: Store) -> None:
    async with store.reading() as connection:
        found = {
            name: await connection.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5_000}


async def test_a_block_that_raises_leaves_nothing_behind(store: Store) -> None:
    async def add_and_fail() -> None:
        async with store.writing() as connection:
            await connection.execute(insert(changes).values(kind="k", subject_id="s", at=datetime.now(UTC)))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await add_and_fail()
    async with store.reading() as connection:
        assert (await connection.execute(select(changes))).all() == []


async def test_transactions_that_read_then_write_wait_for_each_other(store: Store) -> None:
    await _add_account(store)

    async def add_one() -> None:
        async with store.writing() as connection:
            now = await connection.scalar(select(accounts.c.posted_nanousd).with_for_update())
            await asyncio.sleep(0)
            await connection.execute(accounts.update().values(posted_nanousd=(now or 0) + 1))

    await asyncio.gather(*(add_one() for _ in range(20)))
    async with store.reading() as connection:
        assert await connection.scalar(select(accounts.c.posted_nanousd)) == 20


async def test_a_transfer_can_neither_be_changed_nor_deleted(store: Store) -> None:
    await _add_account(store)
    await _add_account(store, "b")
    async with store.writing() as connection:
        await connection.execute(
            text(
                "INSERT INTO transfers (id, debit_account_id, credit_account_id, amount_nanousd, kind,"
                " idempotency_key, created_at) VALUES ('t', 'a', 'b', 5, 'k', 'i', '2026-01-01 00:00:00')"
            )
        )
    for change in ("UPDATE transfers SET amount_nanousd = 6", "DELETE FROM transfers"):
        with pytest.raises(DBAPIError, match="transfers are immutable"):
            async with store.writing() as connection:
                await connection.execute(text(change))


async def test_times_come_back_in_utc(store: Store) -> None:
    written = datetime(2026, 5, 1, 12, 0, tzinfo=timezone(timedelta(hours=2)))
    async with store.writing() as connection:
        await connection.execute(insert(changes).values(kind="k", subject_id="s", at=written))
        found = await connection.scalar(select(changes.c.at))
    assert found is not None
    assert (found, found.tzinfo) == (written, UTC)


async def test_a_time_without_a_zone_is_refused(store: Store) -> None:
    with pytest.raises(StatementError, match="has no zone"):
        async with store.writing() as connection:
            await connection.execute(insert(changes).values(kind="k", subject_id="s", at=datetime(2026, 1, 1)))


async def test_a_store_that_cannot_be_opened_is_unhealthy(tmp_path: Path) -> None:
    opened = open_store(f"sqlite:///{tmp_path}/gpuproxy.db")
    (tmp_path / "gpuproxy.db").mkdir()
    assert not await opened.is_healthy()
    await opened.close()


async def _add_account(store: Store, name: str = "a") -> None:
    async with store.writing() as connection:
        await connection.execute(insert(accounts).values(id=name, kind="adjustments", posted_nanousd=0, held_nanousd=0))


async def test_who_writes_waits_for_its_turn_and_none_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own waiting is by chance: of many that want to write, one may be passed over until it gives up."""
    monkeypatch.setattr(engine, "PRAGMAS", (*engine.PRAGMAS, "PRAGMA busy_timeout=200"))
    store = open_store(f"sqlite:///{tmp_path}/g.db")
    turns: list[int] = []

    async def write(number: int) -> None:
        async with store.writing() as connection:
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(0.01)
            turns.append(number)

    await asyncio.gather(*map(write, range(100)))
    await store.close()
    assert turns == list(range(100))


async def test_who_looks_sees_what_was_committed_and_nothing_else(store: Store) -> None:
    query = select(journal_segments.c.offset).where(journal_segments.c.name == "a")
    assert list(await store.look(query)) == []
    async with store.writing() as connection:
        await connection.execute(insert(journal_segments).values(name="a", offset=1))
        assert list(await store.look(query)) == []
    assert [row.offset for row in await store.look(query)] == [1]
    async with store.writing() as connection:
        await connection.execute(update(journal_segments).values(offset=2))
        assert [row.offset for row in await store.look(query)] == [1]
    assert [row.offset for row in await store.look(query)] == [2]


async def test_who_looks_at_what_is_not_there_is_told_as_everywhere(store_url: str) -> None:
    store = open_store(store_url)
    with pytest.raises(SQLAlchemyError):
        await store.look(select(journal_segments))
    await store.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_machine_that_falls_off_the_network_is_noticed_by_the_other(store: Store) -> None:
    async with store.reading() as connection:
        names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        assert [await connection.scalar(text(f"SHOW {name}")) for name in names] == ["10", "5", "3"]
        driver: Any = (await connection.get_raw_connection()).driver_connection
        opened = driver._transport.get_extra_info("socket")
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [opened.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [10, 5, 3, 25_000]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_process_that_is_stopped_in_a_transaction_keeps_its_locks_for_a_while_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "IDLE_TIMEOUT_MS", 100)
    stopped = open_store(store.engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection = await stopped.engine.connect()
    await connection.execute(text("LOCK TABLE accounts"))
    async with store.writing() as other:
        await other.execute(text("LOCK TABLE accounts"))
    with pytest.raises(DBAPIError):
        await connection.execute(text("SELECT 1"))
    await connection.close()
    assert await stopped.is_healthy()
    await stopped.close()
