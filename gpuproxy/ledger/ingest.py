"""Carries receipts from the workers' journal into the store, each exactly once.

Receipts and the offset behind them commit in one transaction, so whatever is killed when, the next pass goes
on where the last commit ended. A segment goes only after its last receipt is committed: first the file, then
its offset; the other way round a kill in between would read the file again from its start. Between passes the
files are synced, so a power cut costs what was written in the last `sync_s` seconds.
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Table, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy import config
from gpuproxy.ledger.segment import Row, Segment
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import journal_segments, receipts

BATCH_RECEIPTS = 5_000  # a transaction this long keeps other writers waiting about 25 ms
BACKOFF_S_MAX = 5.0
INT64_MAX = 2**63 - 1
INSERT_SQLITE = str(sqlite.insert(receipts).on_conflict_do_nothing().compile(dialect=sqlite.dialect()))

logger = get_logger(__name__)


class Ingest:
    """Reads the journal of one data directory into one store. One pass at a time, one per directory."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.ingested_count = 0
        self.torn_count = 0
        self.damaged_count = 0
        self._store = store
        self._directory = directory
        self._segments: dict[str, Segment] = {}
        self._offsets: dict[str, int] | None = None  # as committed; None until the store was read
        self._listed_ns = -1
        self._retired: list[Segment] = []
        self._stopping = asyncio.Event()

    async def ingest_once(self) -> int:
        """Commit every whole frame that is in the journal now; return how many receipts that were.

        Raises what the store or the disk raises; nothing is lost then, the next pass does the same again.
        """
        await self._load_offsets()
        self._discover()
        total = 0
        while taken := await asyncio.to_thread(_read_batch, list(self._segments.values())):
            total += await self._commit(taken)
        await self._finish()
        return total

    async def sync_once(self) -> int:
        """Bring segments that grew since the last call to disk; return how many did. One call at a time."""
        while self._retired:
            self._retired.pop().close()
        if self._offsets is not None and self._directory_ns() != self._listed_ns:
            self._discover()
        grown = [segment for segment in self._segments.values() if segment.size() != segment.synced_bytes]
        if grown:
            await asyncio.to_thread(_sync, self._directory, grown)
        return len(grown)

    async def run(self, journal: config.Journal) -> None:
        """Ingest and sync in turn until `stop`; go on through outages of the store."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ingest_forever(journal.ingest_s))
            group.create_task(self._sync_forever(journal.sync_s))

    def stop(self) -> None:
        """Let `run` end after the pass it is in."""
        self._stopping.set()

    def close(self) -> None:
        """Close all files. Not while a pass runs."""
        for segment in (*self._segments.values(), *self._retired):
            segment.close()
        self._segments.clear()
        self._retired.clear()

    async def _ingest_forever(self, interval_s: float) -> None:
        wait_s = interval_s
        while not self._stopping.is_set():
            try:
                await self.ingest_once()
                wait_s = interval_s
            except Exception as error:
                wait_s = min(max(wait_s * 2, interval_s), BACKOFF_S_MAX)
                logger.error("ingest failed, will go on", error=_short(error), wait_s=wait_s)
            await self._pause(wait_s)

    async def _sync_forever(self, interval_s: float) -> None:
        while not self._stopping.is_set():
            wait_s = interval_s
            try:
                await self.sync_once()
            except OSError as error:
                wait_s = BACKOFF_S_MAX
                logger.error("journal cannot be synced", error=_short(error))
            await (asyncio.sleep(wait_s) if wait_s == interval_s else self._pause(wait_s))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _load_offsets(self) -> None:
        """Read the offsets at the first pass and forget those whose file is gone."""
        if self._offsets is not None:
            return
        table = journal_segments
        async with self._store.writing() as connection:
            rows = (await connection.execute(select(table.c.name, table.c.offset))).all()
            offsets = {row.name: row.offset for row in rows if (self._directory / row.name).exists()}
            gone = [row.name for row in rows if row.name not in offsets]
            await _forget(connection, gone)
        self._offsets = offsets

    def _discover(self) -> None:
        """Open segments that are new in the directory."""
        self._listed_ns = self._directory_ns()
        with suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self._directory)):
                if entry.endswith(".log") and entry not in self._segments:
                    self._segments[entry] = self._opened(self._directory / entry)

    def _opened(self, path: Path) -> Segment:
        segment = Segment(path, (self._offsets or {}).get(path.name, 0))
        if segment.offset > segment.size():
            logger.error("segment is shorter than what was read of it, reading it anew", segment=segment.name)
            segment.offset = 0  # receipts that are there already are passed over
        return segment

    def _directory_ns(self) -> int:
        try:
            return os.stat(self._directory).st_mtime_ns
        except FileNotFoundError:
            return -1

    async def _commit(self, taken: list["Taken"]) -> int:
        """Store receipts and offsets in one transaction, then believe it. Return how many receipts."""
        rows = [row for part in taken for row in part.rows]
        offsets = {part.segment.name: part.end for part in taken}
        try:
            await _store(self._store, rows, offsets)
        except (OverflowError, DBAPIError) as error:
            clipped = [storable(row) for row in rows]
            if clipped == rows:
                raise
            logger.error("receipts hold values no database takes, clipped", error=_short(error))
            await _store(self._store, clipped, offsets)
        for part in taken:
            part.segment.offset = part.end
        self.ingested_count += len(rows)
        return len(rows)

    async def _finish(self) -> None:
        """Put away segments that were read to their end, and those that cannot be read on."""
        done = [segment for segment in self._segments.values() if segment.is_abandoned or segment.damage]
        for segment in done:
            self._put_away(segment)
        if done:
            async with self._store.writing() as connection:
                await _forget(connection, [segment.name for segment in done])

    def _put_away(self, segment: Segment) -> None:
        size = segment.size()
        if segment.damage:
            self.damaged_count += 1
            kept = segment.path.rename(segment.path.with_suffix(".damaged"))
            logger.error(
                "journal segment is damaged, kept for repair; receipts after the offset are not counted",
                segment=str(kept), offset=segment.offset, size=size, damage=segment.damage,
            )  # fmt: skip
        else:
            if size > segment.offset:
                self.torn_count += 1
                logger.warning(
                    "last frame of a journal segment is torn, skipped",
                    segment=segment.name, offset=segment.offset, size=size,
                )  # fmt: skip
            segment.path.unlink()
        self._retired.append(self._segments.pop(segment.name))


class Taken(NamedTuple):
    """Receipts read off a segment and the offset behind them."""

    segment: Segment
    end: int
    rows: list[Row]


def storable(row: Row) -> Row:
    """Return the receipt with what no database column takes made fit.

    An upstream may claim any number of tokens, a client any text: one such receipt must not stop all others.
    """
    return tuple(_storable(value) for value in row)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")  # PostgreSQL takes no NUL in text
    return max(-INT64_MAX, min(value, INT64_MAX)) if type(value) is int else value


def _read_batch(segments: list[Segment]) -> list[Taken]:
    """Read about BATCH_RECEIPTS rows off the segments, [] at the end of all. Runs in a thread."""
    taken: list[Taken] = []
    room = BATCH_RECEIPTS
    for segment in segments:
        if room <= 0:
            break
        found = segment.read(room)
        room -= len(found.rows)
        if found.bytes_used:
            taken.append(Taken(segment, segment.offset + found.bytes_used, found.rows))
    return taken


def _sync(directory: Path, segments: list[Segment]) -> None:
    if any(not segment.synced_bytes for segment in segments):
        _sync_directory(directory)  # a new file is on disk only when its name is
    for segment in segments:
        segment.sync()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _store(store: Store, rows: list[Row], offsets: dict[str, int]) -> None:
    async with store.writing() as connection:
        await _insert_receipts(store, connection, rows)
        await _move_offsets(store, connection, offsets)


async def _insert_receipts(store: Store, connection: AsyncConnection, rows: list[Row]) -> None:
    """Add the receipts that are not there yet. On SQLite past SQLAlchemy, whose rows cost 3 times as much."""
    if store.is_sqlite:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.executemany(INSERT_SQLITE, rows)
        return
    names = receipts.c.keys()
    await connection.execute(store.insert_new(receipts), [dict(zip(names, row, strict=True)) for row in rows])


async def _move_offsets(store: Store, connection: AsyncConnection, offsets: dict[str, int]) -> None:
    rows = [{"name": name, "offset": offset} for name, offset in offsets.items()]
    await connection.execute(_upsert(store, journal_segments), rows)


def _upsert(store: Store, table: Table) -> Any:
    insert = (sqlite if store.is_sqlite else postgresql).insert(table)
    return insert.on_conflict_do_update(index_elements=["name"], set_={"offset": insert.excluded.offset})


async def _forget(connection: AsyncConnection, names: list[str]) -> None:
    if names:
        await connection.execute(delete(journal_segments).where(journal_segments.c.name.in_(names)))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
