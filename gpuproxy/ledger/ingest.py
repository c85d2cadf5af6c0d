"""Carries receipts from the workers' journal into the store, each exactly once.

Receipts and the offset behind them commit in one transaction, so whatever is killed when, the next pass goes
on where the last commit ended. A segment goes only after its last receipt is committed: first the file, then
its offset; the other way round a kill in between would read the file again from its start.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy import config
from gpuproxy.ledger import open_calls
from gpuproxy.ledger.batch import Batch, priced
from gpuproxy.ledger.segment import Row, Segment, epoch_of
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.syncer import Syncer
from gpuproxy.ledger.writer import open_writer, write_storable
from gpuproxy.observe.logs import get_logger
from gpuproxy.pricing import Catalogue
from gpuproxy.store.engine import Store, fault_of
from gpuproxy.store.rounds import pause
from gpuproxy.store.schema import journal_segments
from gpuproxy.types import Receipt

BATCH_RECEIPTS = 5_000  # a transaction this long keeps other writers waiting about 25 ms
BACKOFF_S_MAX = 5.0
ORPHAN_S = 60.0  # a worker names its new segment within microseconds; one without a name for so long has no worker
COMPLAINT_S = 60.0  # between two log lines about the same file

logger = get_logger(__name__)


class Ingest:
    """Reads the journal of one data directory into one store, one pass at a time.

    Holds a lock on the directory from its first pass until `close`, so that a successor that is started before
    this one has stopped waits for its turn. Calls are charged by the `catalogue`, which may be exchanged while it
    runs; `node` names the data directory among those that share a store.
    """

    def __init__(self, store: Store, directory: Path, catalogue: Catalogue | None = None, node: str = "") -> None:
        self.catalogue = catalogue or Catalogue()
        self.ingested_count = 0
        self.watchers: tuple[Callable[[list[Receipt]], None], ...] = ()
        self.pass_count = 0  # complete ones
        self.is_failing = False  # the last one, of `run`
        self.torn_count = 0
        self.damaged_count = 0
        self._store = store
        self._writer = open_writer(store)
        self._directory = directory
        self._node = node
        self._lock_fd = -1
        self._is_waiting = False
        self._segments: dict[str, Segment] = {}
        self._offsets: dict[str, int] | None = None  # as committed; None until the store was read
        self._complained: dict[str, float] = {}  # file name to monotonic seconds
        self._open: dict[str, str] = {}  # calls with a checkpoint in the store, to their owner
        self._missing: dict[str, float] = {}  # owners of open calls without a journal, since when
        self._stopping = asyncio.Event()

    async def ingest_once(self) -> int:
        """Commit every whole frame that is in the journal now; return how many receipts that were.

        While another process reads this journal there is nothing to do. Raises what the store or the disk
        raises; nothing is lost then, the next pass does the same again.
        """
        if not self._has_journal():
            return 0
        await self._load_offsets()
        self._discover()
        total = 0
        while any(segment.has_more() for segment in self._segments.values()):
            taken = await asyncio.to_thread(_read_batch, list(self._segments.values()))
            if not taken:
                break
            total += await self._commit(taken)
        await self._finish()
        total += await self._settle_lost()
        self.pass_count += 1
        return total

    async def run(self, journal: config.Journal) -> None:
        """Ingest, and sync beside it, until `stop`; go on through outages of the store."""
        syncer = Syncer(self._directory)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(syncer.run, journal.sync_s))
            try:
                await self._ingest_forever(journal.ingest_s)
            finally:
                syncer.stop()

    def is_on_disk(self) -> bool:
        """Tell whether no sync has failed of a segment that is not yet all in the store."""
        return all(segment.is_on_disk() for segment in self._segments.values())

    def stop(self) -> None:
        """Let `run` end after the pass it is in."""
        self._stopping.set()

    def close(self) -> None:
        """Close all files and let a successor read. Not while a pass runs."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._writer.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1

    async def _ingest_forever(self, interval_s: float) -> None:
        wait_s = interval_s
        while not self._stopping.is_set():
            try:
                await self.ingest_once()
                wait_s, self.is_failing = interval_s, False
            except Exception as error:
                self.is_failing = True
                if wait_s < BACKOFF_S_MAX:  # then it has been told often enough, however long it lasts
                    wait_s = min(max(wait_s * 2, interval_s), BACKOFF_S_MAX)
                    logger.error("ingest failed, will go on", error=_told(error), wait_s=wait_s)
            await pause(wait_s, self._stopping)

    async def _load_offsets(self) -> None:
        """Read the offsets at the first pass and forget those of this node whose file is gone."""
        if self._offsets is not None:
            return
        here, offsets, gone = set(_names(self._directory)), dict[str, int](), list[str]()
        async with self._store.writing() as connection:
            for key, offset in await connection.execute(select(journal_segments.c.name, journal_segments.c.offset)):
                node, _, name = key.rpartition("/")
                if name in here and node in (self._node, ""):  # "": written before nodes were told apart
                    offsets[name] = max(offset, offsets.get(name, 0))
                elif node == self._node:
                    gone.append(key)
            await _forget(connection, gone)
            self._open = await connection.run_sync(open_calls.load, lease_owner(self._node, ""))
        self._offsets = offsets

    def _key(self, name: str) -> str:
        """Return what a segment is called in the store, which other nodes may share."""
        return f"{self._node}/{name}" if self._node else name

    def _has_journal(self) -> bool:
        """Take the lock on the directory if nobody has it; False while somebody has, or there is no directory."""
        if self._lock_fd >= 0:
            return True
        try:
            self._lock_fd = _locked(self._directory, os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            if not self._is_waiting:
                logger.info("another process reads the journal, waiting for it to stop")
            self._is_waiting = True
            return False
        self._is_waiting = False
        return True

    def _discover(self) -> None:
        """Open segments that are new in the directory; one that cannot be opened keeps no other waiting."""
        for name in _names(self._directory):
            try:
                if name.endswith(".new"):
                    _name_orphan(self._directory / name)
                elif name.endswith(".log") and name not in self._segments:
                    self._segments[name] = self._opened(self._directory / name)
            except OSError as error:
                self._complain(name, "journal file cannot be opened", error=_told(error))

    def _opened(self, path: Path) -> Segment:
        segment = Segment(path, (self._offsets or {}).get(path.name, 0))
        if segment.offset > segment.size():
            logger.error("segment is shorter than what was read of it, reading it anew", segment=segment.name)
            segment.offset = 0  # receipts that are there already are passed over
        return segment

    def _complain(self, name: str, message: str, **fields: object) -> None:
        now_s = time.monotonic()
        if now_s - self._complained.get(name, -COMPLAINT_S) >= COMPLAINT_S:
            self._complained[name] = now_s
            logger.error(message, segment=name, **fields)

    async def _commit(self, taken: list["Taken"]) -> int:
        """Store receipts and offsets in one transaction, then believe it. Return how many receipts."""
        parts = [(lease_owner(self._node, epoch_of(part.segment.name)), part.rows) for part in taken]
        offsets = {self._key(part.segment.name): part.end for part in taken}
        batch = await asyncio.to_thread(self._batch, parts, offsets)
        await write_storable(self._writer, batch)
        for part in taken:
            part.segment.offset = part.end
        self._note_open(batch.notes)
        self.ingested_count += len(batch.rows)
        await asyncio.to_thread(self._show, batch.rows)
        return len(batch.rows)

    def _batch(self, parts: Sequence[tuple[str, Sequence[Row]]], offsets: Mapping[str, int]) -> Batch:
        receipts, notes = open_calls.sort_out(parts, self._open)
        return priced(self.catalogue, receipts, offsets, notes)

    def _note_open(self, notes: open_calls.Notes) -> None:
        for call_id in notes.ended:
            self._open.pop(call_id, None)
        self._open.update({call_id: owner for call_id, (owner, _) in notes.opened.items()})

    async def _settle_lost(self) -> int:
        """Store the last checkpoints of workers that are gone as receipts; return how many."""
        total = 0
        for owner in self._lost_owners() if self._open else ():
            async with self._store.reading() as connection:
                rows = await connection.run_sync(open_calls.lost, owner, BATCH_RECEIPTS)
            notes = open_calls.Notes(ended=[row[0] for row in rows])
            await write_storable(self._writer, priced(self.catalogue, [(owner, rows)], {}, notes))
            self._note_open(notes)
            await asyncio.to_thread(self._show, rows)
            total += len(rows)
            logger.info("calls of a worker that is gone were settled", owner=owner, call_count=len(rows))
        return total

    def _lost_owners(self) -> list[str]:
        living = {
            lease_owner(self._node, epoch_of(name)) for name in _names(self._directory) if not name.endswith(".damaged")
        }
        now_s = time.monotonic()
        gone = set(self._open.values()) - living
        self._missing = {owner: self._missing.get(owner, now_s) for owner in gone}
        return [owner for owner, since_s in self._missing.items() if now_s - since_s >= open_calls.LOST_S]

    def _show(self, rows: Sequence[Row]) -> None:
        """Show stored receipts to who wants to see them; their failure is not ours."""
        stored = [Receipt(*row) for row in rows] if self.watchers else []
        for watch in self.watchers:
            try:
                watch(stored)
            except Exception:
                logger.exception("receipts cannot be shown")

    async def _finish(self) -> None:
        """Put away segments that were read to their end, or cannot be read on, if nobody writes them any more."""
        for segment in self._segments.values():
            if segment.damage and not segment.is_abandoned:
                self._complain(
                    segment.name,
                    "journal segment in use is damaged; receipts after the offset wait for repair or its end",
                    offset=segment.offset, damage=segment.damage,
                )  # fmt: skip
        done = [segment for segment in self._segments.values() if segment.is_abandoned]
        for segment in done:
            self._put_away(segment)
        if done:
            async with self._store.writing() as connection:
                names = [segment.name for segment in done]
                await _forget(connection, [*names, *map(self._key, names)])

    def _put_away(self, segment: Segment) -> None:
        size = segment.size()
        if segment.damage:
            self.damaged_count += 1
            kept = segment.path.with_suffix(".damaged")
            with suppress(FileNotFoundError):
                segment.path.rename(kept)
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
            segment.path.unlink(missing_ok=True)
        self._complained.pop(segment.name, None)
        self._segments.pop(segment.name).close()


class Taken(NamedTuple):
    """Receipts read off a segment and the offset behind them."""

    segment: Segment
    end: int
    rows: list[Row]


def _names(directory: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return sorted(os.listdir(directory))
    return []


def _locked(path: Path, flags: int = 0) -> int:
    """Open and lock; return the descriptor that holds the lock. Raises BlockingIOError if somebody has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _name_orphan(path: Path) -> None:
    """Make a segment of a file whose worker died between locking and naming it. Raises OSError."""
    if path.with_suffix(".log").exists() or time.time() - path.stat().st_mtime < ORPHAN_S:
        return
    with suppress(BlockingIOError):
        descriptor = _locked(path)
        try:
            path.rename(path.with_suffix(".log"))
        finally:
            os.close(descriptor)


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


async def _forget(connection: AsyncConnection, names: list[str]) -> None:
    if names:
        await connection.execute(delete(journal_segments).where(journal_segments.c.name.in_(names)))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {fault_of(error)}"
