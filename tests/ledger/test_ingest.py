"""From the journal into the store: every receipt, once, whatever happens."""

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from journals import Hire, frame, frames, hiring, ids, open_files, receipt, stored
from sqlalchemy import delete, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from structlog.testing import capture_logs

from gpuproxy import config
from gpuproxy.ledger.ingest import BATCH_RECEIPTS, ORPHAN_S, Ingest
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import journal_segments, receipts
from gpuproxy.types import NOT_STORED, Attempt, Receipt, Trace


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.mkdir()
    return path


@pytest.fixture
def hire(directory: Path) -> Iterator[Hire]:
    """Return a function that starts a worker on a segment."""
    with hiring(directory) as start:
        yield start


@pytest.fixture
async def ingest(store: Store, directory: Path) -> AsyncIterator[Ingest]:
    made = Ingest(store, directory)
    yield made
    made.close()


async def offsets(store: Store) -> dict[str, int]:
    async with store.reading() as connection:
        rows = await connection.execute(select(journal_segments))
        return {row.name: row.offset for row in rows}


async def test_what_a_worker_wrote_is_stored_with_every_field(store: Store, ingest: Ingest, hire: Hire) -> None:
    shown: list[Receipt] = []
    ingest.watchers = (shown.extend,)
    written = receipt(1, trace_id="ab" * 16, trace=Trace(2**64 - 1, "", "chat", [Attempt(0, 1, "host", 80)]))
    hire().write(frame([written]))
    assert await ingest.ingest_once() == 1
    async with store.reading() as connection:
        row = (await connection.execute(select(receipts))).one()
    stored_of_it = {name: value for name, value in row._asdict().items() if name in written.__struct_fields__}
    kept = [name for name in written.__struct_fields__ if name not in NOT_STORED]
    assert {name: getattr(written, name) for name in kept} == stored_of_it
    assert shown == [written]


async def test_what_only_some_calls_tell_is_stored_of_those(store: Store, ingest: Ingest, hire: Hire) -> None:
    told = {"markup_bps": 5, "rpc_method": "tools/call", "rpc_name": "add", "rpc_outcome": "ok", "trace_id": "t"}
    written = [receipt(0), receipt(1, **told), receipt(2, rpc_name="x")]
    hire().write(frame(written))
    assert await ingest.ingest_once() == 3
    async with store.reading() as connection:
        rows = (await connection.execute(select(receipts).order_by(receipts.c.id))).all()
    for call, row in zip(written, rows, strict=True):
        assert {name: getattr(row, name) for name in told} == {name: getattr(call, name) for name in told}
        assert (row.cost_nanousd, row.charge_id) == (0, "")


async def test_a_live_segment_is_read_on_where_it_was_left(store: Store, ingest: Ingest, hire: Hire) -> None:
    worker = hire()
    worker.write(frames(0, 3))
    assert await ingest.ingest_once() == 3
    worker.write(frames(3, 5))
    assert await ingest.ingest_once() == 2
    assert await stored(store) == ids(0, 5)
    assert await offsets(store) == {"000-1.log": worker.path.stat().st_size}


async def test_an_unfinished_frame_of_a_live_worker_waits(store: Store, ingest: Ingest, hire: Hire) -> None:
    worker, data = hire(), frames(0, 2)
    for byte in data:
        worker.write(bytes([byte]))
        if byte % 7 == 0:
            await ingest.ingest_once()
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 2)
    assert ingest.damaged_count == ingest.torn_count == 0


async def test_the_segment_of_a_worker_that_left_goes_when_all_is_stored(
    store: Store, ingest: Ingest, hire: Hire
) -> None:
    worker = hire()
    worker.write(frames(0, 3))
    await ingest.ingest_once()
    worker.write(frames(3, 4))
    worker.leaves()
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 4)
    assert not worker.path.exists()
    assert await offsets(store) == {}


@pytest.mark.parametrize("content", [b"", frames(0, 2)], ids=["empty", "written"])
async def test_a_segment_whose_worker_died_before_naming_it_is_read_and_goes(
    store: Store, ingest: Ingest, directory: Path, content: bytes
) -> None:
    orphan = directory / "000-1.new"
    orphan.write_bytes(content)
    await ingest.ingest_once()
    assert orphan.exists()
    os.utime(orphan, (time.time() - 2 * ORPHAN_S,) * 2)
    for _ in range(2):  # one names it, the next reads it
        await ingest.ingest_once()
    assert await stored(store) == (ids(0, 2) if content else [])
    assert list(directory.iterdir()) == []


async def test_a_segment_whose_worker_is_about_to_name_it_is_left_alone(ingest: Ingest, directory: Path) -> None:
    path = directory / "000-1.new"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (time.time() - 2 * ORPHAN_S,) * 2)
        await ingest.ingest_once()
        assert path.exists()


async def test_a_receipt_met_again_is_stored_once(store: Store, directory: Path) -> None:
    for name in ("a", "b"):
        (directory / f"{name}.log").write_bytes(frames(0, 3))
        ingest = Ingest(store, directory)
        await ingest.ingest_once()
        ingest.close()
    assert await stored(store) == ids(0, 3)


async def test_another_process_goes_on_where_the_last_one_committed_when_that_has_stopped(
    store: Store, ingest: Ingest, hire: Hire, directory: Path
) -> None:
    worker = hire()
    worker.write(frames(0, 3))
    await ingest.ingest_once()
    worker.write(frames(3, 4))
    worker.leaves()
    successor = Ingest(store, directory)
    with capture_logs() as lines:
        assert [await successor.ingest_once() for _ in range(2)] == [0, 0]
    assert [line["event"] for line in lines] == ["another process reads the journal, waiting for it to stop"]
    assert worker.path.exists()
    ingest.close()
    assert await successor.ingest_once() == 1
    successor.close()
    assert await stored(store) == ids(0, 4)


async def test_a_segment_that_somebody_took_away_stops_nothing(store: Store, ingest: Ingest, hire: Hire) -> None:
    gone, here = hire("a"), hire("b")
    gone.write(frames(0, 1))
    await ingest.ingest_once()
    gone.path.unlink()
    gone.leaves()
    here.write(frames(1, 2))
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 2)
    assert list(await offsets(store)) == ["b.log"]


async def test_a_kill_between_commit_and_delete_loses_and_doubles_nothing(store: Store, directory: Path) -> None:
    path = directory / "a.log"
    path.write_bytes(frames(0, 3))
    async with store.writing() as connection:
        await connection.execute(text(f"INSERT INTO journal_segments VALUES ('a.log', {path.stat().st_size})"))
    ingest = Ingest(store, directory)
    assert await ingest.ingest_once() == 0
    assert not path.exists()
    assert await offsets(store) == {}
    ingest.close()


async def test_a_kill_between_delete_and_forgetting_is_tidied_at_the_next_start(store: Store, ingest: Ingest) -> None:
    async with store.writing() as connection:
        await connection.execute(text("INSERT INTO journal_segments VALUES ('gone.log', 7)"))
    await ingest.ingest_once()
    assert await offsets(store) == {}


async def test_the_start_of_another_node_lets_nothing_be_read_anew(
    store: Store, directory: Path, hire: Hire, tmp_path: Path
) -> None:
    hire().write(frames(0, 3))
    (tmp_path / "there").mkdir()
    for place, node in ((directory, "here"), (tmp_path / "there", "there")):
        ingest = Ingest(store, place, node=node)
        await ingest.ingest_once()
        ingest.close()
    async with store.writing() as connection:
        await connection.execute(delete(receipts))  # they have become old meanwhile, while their worker lives on
    again = Ingest(store, directory, node="here")
    assert await again.ingest_once() == 0
    again.close()


async def test_offsets_from_before_nodes_were_told_apart_hold(store: Store, directory: Path, hire: Hire) -> None:
    worker = hire()
    worker.write(frames(0, 3))
    for node in ("", "here", "here"):
        ingest = Ingest(store, directory, node=node)
        assert await ingest.ingest_once() == (3 if node == "" else 0)
        ingest.close()
    worker.leaves()
    last = Ingest(store, directory, node="here")
    await last.ingest_once()
    last.close()
    assert await offsets(store) == {}


async def test_receipts_and_offset_commit_together_or_not_at_all(store: Store, ingest: Ingest, hire: Hire) -> None:
    hire().write(frames(0, 3))
    async with store.writing() as connection:
        await connection.execute(text("ALTER TABLE journal_segments RENAME TO away"))
    for _ in range(2):
        with pytest.raises(SQLAlchemyError):
            await ingest.ingest_once()
    assert await stored(store) == []
    async with store.writing() as connection:
        await connection.execute(text("ALTER TABLE away RENAME TO journal_segments"))
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 3)


async def test_the_loop_goes_on_after_an_outage_of_the_store(store: Store, ingest: Ingest, hire: Hire) -> None:
    hire().write(frames(0, 3))
    async with store.writing() as connection:
        await connection.execute(text("ALTER TABLE receipts RENAME TO away"))
    running = asyncio.create_task(ingest.run(config.Journal(ingest_s=0.001, sync_s=0.001)))
    async with asyncio.timeout(10):
        while not ingest.is_failing:
            await asyncio.sleep(0)
    async with store.writing() as connection:
        await connection.execute(text("ALTER TABLE away RENAME TO receipts"))
    async with asyncio.timeout(10):
        while ingest.ingested_count < 3:
            await asyncio.sleep(0.001)
    ingest.stop()
    await running
    assert not ingest.is_failing
    assert await stored(store) == ids(0, 3)


async def test_more_receipts_than_one_transaction_takes_are_all_stored(
    store: Store, ingest: Ingest, hire: Hire
) -> None:
    count = BATCH_RECEIPTS * 2 + 7
    hire("a").write(frames(0, count, size=100))
    hire("b").write(frames(count, count + 50))
    assert await ingest.ingest_once() == count + 50
    async with store.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(receipts)) == count + 50


async def test_a_frame_larger_than_a_read_is_stored(store: Store, ingest: Ingest, hire: Hire) -> None:
    hire().write(frames(0, 9_000, size=9_000))
    assert await ingest.ingest_once() == 9_000


async def test_values_no_database_takes_do_not_stop_the_others(store: Store, ingest: Ingest, hire: Hire) -> None:
    hire().write(frame([receipt(0), receipt(1, output_tokens=2**64 - 1), receipt(2)]))
    await ingest.ingest_once()
    async with store.reading() as connection:
        tokens = list(await connection.scalars(select(receipts.c.output_tokens).order_by(receipts.c.id)))
    assert tokens == [20, 2**63 - 1, 20]


async def test_an_empty_segment_goes_with_its_worker(ingest: Ingest, hire: Hire) -> None:
    worker = hire()
    await ingest.ingest_once()
    assert worker.path.exists()
    worker.leaves()
    await ingest.ingest_once()
    assert not worker.path.exists()
    assert ingest.torn_count == 0


async def test_other_files_are_left_alone(ingest: Ingest, directory: Path) -> None:
    for name in ("a.new", "a.damaged", "notes.txt"):
        (directory / name).write_bytes(frames(0, 1))
    assert await ingest.ingest_once() == 0
    assert len(list(directory.iterdir())) == 3


async def test_a_missing_directory_is_an_empty_journal(store: Store, tmp_path: Path) -> None:
    ingest = Ingest(store, tmp_path / "none")
    assert await ingest.ingest_once() == 0


async def test_a_segment_put_away_is_closed(ingest: Ingest, hire: Hire) -> None:
    worker = hire()
    worker.write(frames(0, 1))
    worker.leaves()
    await ingest.ingest_once()
    assert str(worker.path) not in open_files()


async def test_the_loop_syncs_what_it_reads_and_ends(store: Store, ingest: Ingest, hire: Hire) -> None:
    hire().write(frames(0, 1))
    running = asyncio.create_task(ingest.run(config.Journal(ingest_s=0.001, sync_s=0.001)))
    async with asyncio.timeout(10):
        while ingest.ingested_count < 1 or threading.active_count() < 2:
            await asyncio.sleep(0.001)
        ingest.stop()
        await running


async def test_what_could_not_be_synced_is_unsafe_until_it_is_stored(store: Store, ingest: Ingest, hire: Hire) -> None:
    worker = hire()
    worker.write(frames(0, 2))
    worker.path.chmod(0o400)  # as `Syncer` does
    await ingest.ingest_once()
    assert not ingest.is_on_disk()
    worker.leaves()
    await ingest.ingest_once()
    assert ingest.is_on_disk()
    assert await stored(store) == ids(0, 2)
