"""Writes receipts and journal offsets into the store and charges the calls, all in one transaction.

Receipts go past SQLAlchemy: over a connection of its own on SQLite, by COPY on PostgreSQL. A row costs a third of what
it costs there. They are taken for new, as they are but when a journal is read anew; only if the store knows one
already is the batch written again, without those it knows.
"""

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

from sqlalchemy import Connection, create_engine, event, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import StaticPool

from gpuproxy.ledger.batch import Batch
from gpuproxy.ledger.open_calls import keep
from gpuproxy.ledger.segment import Row
from gpuproxy.ledger.settle import settle
from gpuproxy.ledger.used import add_used
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store, connect_plain, fault_of
from gpuproxy.store.schema import journal_segments, receipts
from gpuproxy.types import Receipt

TIMES_AT_ONCE = 1_000  # parameters of one query

_STARTED_NS = Receipt.__struct_fields__.index("started_ns")

logger = get_logger(__name__)


class Writer(Protocol):
    """Stores receipts, passing over those that are there already, and moves the offsets; both or neither."""

    async def write(self, batch: Batch) -> None:
        """Commit. Raises what the database raises; nothing is stored then."""

    def close(self) -> None:
        """Give up what is held. Not while a write runs."""


def open_writer(store: Store) -> Writer:
    """Return the fastest writer for this kind of store; it connects on first use."""
    return SqliteWriter(store) if store.is_sqlite else PostgresqlWriter(store)


async def write_storable(writer: Writer, batch: Batch) -> None:
    """Write; values no database takes are made fit. An upstream may claim any number, a client any text: one
    such receipt must not stop all others.
    """
    try:
        await writer.write(batch)
    except (OverflowError, DBAPIError, sqlite3.Error) as error:
        clipped = batch.storable()
        if clipped.rows == batch.rows:
            raise
        logger.error("receipts hold values no database takes, clipped", error=fault_of(error))
        await writer.write(clipped)


def _known(connection: Connection, rows: Sequence[Row]) -> set[str]:
    """Return the ids of the stored receipts that began when one of these did; SQLite finds no pairs by an index."""
    times = sorted({row[_STARTED_NS] for row in rows})
    starts = range(0, len(times), TIMES_AT_ONCE)
    queries = (select(receipts.c.id).where(receipts.c.started_ns.in_(times[at : at + TIMES_AT_ONCE])) for at in starts)
    return {receipt_id for query in queries for receipt_id in connection.scalars(query)}


def _charged(connection: Connection, batch: Batch, is_new: bool) -> tuple[tuple[str, ...], list[Row]]:
    """Do all that is to be done beside the receipts and offsets; return columns and rows of the receipts to store."""
    if not is_new:
        batch = batch.without(partial(_known, connection))
    charge_ids = settle(connection, batch.owed())
    add_used(connection, batch, charge_ids)
    keep(connection, batch.notes)
    return batch.completed(charge_ids)


class SqliteWriter:
    """Writes over one connection, in a thread."""

    _MOVE = 'INSERT INTO journal_segments VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET "offset" = excluded."offset"'

    def __init__(self, store: Store) -> None:
        self._engine = create_engine("sqlite://", creator=partial(connect_plain, store), poolclass=StaticPool)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    async def write(self, batch: Batch) -> None:
        """Commit. Raises what sqlite3 or SQLAlchemy raise, OverflowError for a number over 64 bits."""
        await asyncio.to_thread(self._write, batch)

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()

    def _write(self, batch: Batch) -> None:
        try:
            self._commit(batch, is_new=True)
        except sqlite3.IntegrityError:
            self._commit(batch, is_new=False)

    def _commit(self, batch: Batch, is_new: bool) -> None:
        with self._engine.begin() as connection:
            names, rows = _charged(connection, batch, is_new)
            insert = f"INSERT INTO receipts ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608
            driver = cast(sqlite3.Connection, connection.connection.driver_connection)
            driver.executemany(insert, rows)
            driver.executemany(self._MOVE, batch.offsets.items())


class PostgresqlWriter:
    """Writes over a connection of SQLAlchemy's pool."""

    def __init__(self, store: Store) -> None:
        insert = postgresql.insert(journal_segments)
        self._store = store
        self._move = insert.on_conflict_do_update(index_elements=["name"], set_={"offset": insert.excluded.offset})

    async def write(self, batch: Batch) -> None:
        """Commit. Raises what SQLAlchemy raises."""
        from asyncpg import UniqueViolationError  # type: ignore[import-untyped]  # 50 ms that SQLite does not need

        with _as_sqlalchemy():
            try:
                await self._commit(batch, is_new=True)
            except UniqueViolationError:
                await self._commit(batch, is_new=False)

    def close(self) -> None:
        """Do nothing: the pool is the store's."""

    async def _commit(self, batch: Batch, is_new: bool) -> None:
        moved = [{"name": name, "offset": offset} for name, offset in batch.offsets.items()]
        async with self._store.writing() as connection:
            if moved:
                await connection.execute(self._move, moved)
            names, rows = await connection.run_sync(_charged, batch, is_new)
            if rows:
                await _copy(connection, names, rows)


async def _copy(connection: AsyncConnection, names: Sequence[str], rows: list[Row]) -> None:
    await connection.exec_driver_sql("SELECT 1")  # SQLAlchemy begins a transaction with its first statement
    driver: Any = (await connection.get_raw_connection()).driver_connection
    await driver.copy_records_to_table("receipts", records=rows, columns=names)


@contextmanager
def _as_sqlalchemy() -> Iterator[None]:
    """Raise what the driver raises as the rest of the program knows it."""
    from asyncpg import InterfaceError, PostgresError

    try:
        yield
    except (PostgresError, InterfaceError) as error:
        raise DBAPIError("COPY receipts", None, error) from error
