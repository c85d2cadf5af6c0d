"""From the journal into the store, when a segment is torn or damaged: all that can be read, and the rest is kept."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from journals import Hire, frames, hiring, ids, stored
from structlog.testing import capture_logs

from gpuproxy.ledger.ingest import Ingest
from gpuproxy.store.engine import Store


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


async def test_a_torn_end_of_a_dead_worker_is_skipped_counted_and_logged(
    store: Store, ingest: Ingest, hire: Hire
) -> None:
    worker = hire()
    worker.write(frames(0, 2) + frames(2, 3)[:-5])
    worker.leaves()
    with capture_logs() as lines:
        await ingest.ingest_once()
    assert [(line["log_level"], line["segment"]) for line in lines] == [("warning", worker.path.name)]
    assert await stored(store) == ids(0, 2)
    assert (ingest.torn_count, ingest.damaged_count) == (1, 0)
    assert not worker.path.exists()


@pytest.mark.parametrize("end", [bytes(3), bytes(4_096), frames(9, 10)[:9] + bytes(30)])
async def test_what_a_power_cut_leaves_at_the_end_is_torn(store: Store, ingest: Ingest, hire: Hire, end: bytes) -> None:
    worker = hire()
    worker.write(frames(0, 2) + end)
    worker.leaves()
    await ingest.ingest_once()
    assert (await stored(store), ingest.torn_count, ingest.damaged_count) == (ids(0, 2), 1, 0)


@pytest.mark.parametrize("position", [0, 1, 4, 30])
async def test_damage_in_the_middle_keeps_the_file_and_all_receipts_before_it(
    store: Store, ingest: Ingest, hire: Hire, position: int
) -> None:
    bad = bytearray(frames(2, 3))
    bad[position] ^= 0x41
    worker = hire()
    worker.write(frames(0, 2) + bytes(bad) + frames(3, 5))
    content = worker.path.read_bytes()
    worker.leaves()
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 2)
    assert (ingest.torn_count, ingest.damaged_count) == (0, 1)
    assert worker.path.with_suffix(".damaged").read_bytes() == content
    assert not worker.path.exists()


async def test_a_damaged_segment_stays_while_its_worker_lives_and_is_kept_then(
    store: Store, ingest: Ingest, hire: Hire
) -> None:
    bad = bytearray(frames(2, 3))
    bad[20] ^= 1
    damaged, good = hire("a"), hire("b")
    damaged.write(frames(0, 2) + bytes(bad))
    with capture_logs() as lines:
        for number in range(3, 6):
            good.write(frames(number, number + 1))
            damaged.write(frames(number + 10, number + 11))
            await ingest.ingest_once()
    assert await stored(store) == ids(0, 2) + ids(3, 6)
    assert [(line["log_level"], line["segment"], line["offset"]) for line in lines] == [
        ("error", damaged.path.name, len(frames(0, 2)))
    ]
    content = damaged.path.read_bytes()
    damaged.leaves()
    await ingest.ingest_once()
    assert damaged.path.with_suffix(".damaged").read_bytes() == content
    assert ingest.damaged_count == 1


async def test_a_damaged_segment_that_is_repaired_is_read_on(store: Store, ingest: Ingest, hire: Hire) -> None:
    worker = hire()
    worker.write(frames(0, 1) + frames(1, 2) + frames(2, 3))
    whole = worker.path.read_bytes()
    worker.path.write_bytes(whole[: len(frames(0, 1)) + 20] + b"\xff" + whole[len(frames(0, 1)) + 21 :])
    for _ in range(3):
        await ingest.ingest_once()
    assert await stored(store) == ids(0, 1)
    worker.path.write_bytes(whole)
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 3)
    assert ingest.damaged_count == 0


async def test_a_file_that_cannot_be_opened_keeps_no_other_waiting(
    store: Store, ingest: Ingest, hire: Hire, directory: Path
) -> None:
    (directory / "000-0.log").symlink_to(directory / "nowhere")
    hire().write(frames(0, 2))
    with capture_logs() as lines:
        for _ in range(3):
            await ingest.ingest_once()
    assert await stored(store) == ids(0, 2)
    assert [(line["log_level"], line["segment"]) for line in lines] == [("error", "000-0.log")]


async def test_damage_in_one_segment_does_not_stop_another(store: Store, ingest: Ingest, hire: Hire) -> None:
    bad, good = hire("a"), hire("b")
    bad.write(b"\xff" * 50 + frames(8, 9))
    bad.leaves()
    good.write(frames(0, 2))
    await ingest.ingest_once()
    assert await stored(store) == ids(0, 2)
