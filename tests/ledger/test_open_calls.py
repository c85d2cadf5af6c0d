"""Calls of a worker that was killed are settled from their last checkpoint, once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from journals import frame, receipt
from sqlalchemy import func, select

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import open_calls
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.verify import verify
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import open_calls as table
from gpuproxy.store.schema import receipts
from gpuproxy.types import Receipt

CATALOGUE = Catalogue([Price("m1", output_nanousd_per_million=10**6, request_nanousd=100)])


@pytest.fixture
async def user_id(store: Store) -> str:
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 1_000, "start")
    return made


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a worker for gone as soon as its journal is."""
    monkeypatch.setattr(open_calls, "LOST_S", 0.0)


def checkpoint(user_id: str, tokens: int, number: int = 1) -> Receipt:
    return receipt(number, user_id=user_id, outcome="open", output_tokens=tokens)


def segment(directory: Path, *batches: Receipt, number: int = 1) -> Path:
    path = directory / f"000-7-{number:06}.log"
    path.write_bytes(b"".join(frame([each]) for each in batches))
    return path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Let the worker that writes this segment live."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def stored(store: Store) -> list[tuple[str, str, int, int]]:
    columns = (receipts.c.outcome, receipts.c.error, receipts.c.output_tokens, receipts.c.cost_nanousd)
    async with store.reading() as connection:
        return [tuple(row) for row in await connection.execute(select(*columns).order_by(receipts.c.id))]


async def count_open(store: Store) -> int:
    async with store.reading() as connection:
        return await connection.scalar(select(func.count()).select_from(table)) or 0


async def test_the_last_checkpoint_of_a_dead_worker_becomes_the_receipt(
    store: Store, tmp_path: Path, user_id: str
) -> None:
    segment(tmp_path, checkpoint(user_id, 5), checkpoint(user_id, 8), checkpoint(user_id, 3, 2))
    ingest = Ingest(store, tmp_path, CATALOGUE)
    for _ in range(3):
        await ingest.ingest_once()
    ingest.close()
    lost = ("upstream_failed", open_calls.WORKER_LOST)
    assert await stored(store) == [(*lost, 8, 8), (*lost, 3, 3)]
    assert await balance(store, user_id) == 1_000 - 8 - 3
    assert await count_open(store) == 0
    assert await verify(store) == []


async def test_a_receipt_supersedes_its_checkpoints(store: Store, tmp_path: Path, user_id: str) -> None:
    path = segment(tmp_path, checkpoint(user_id, 5))
    ingest = Ingest(store, tmp_path, CATALOGUE)
    with held(path):
        await ingest.ingest_once()
        assert (await stored(store), await count_open(store)) == ([], 1)
        with path.open("ab") as file:
            file.write(frame([checkpoint(user_id, 6)]) + frame([receipt(1, user_id=user_id, output_tokens=9)]))
        await ingest.ingest_once()
    for _ in range(3):
        await ingest.ingest_once()
    ingest.close()
    assert await stored(store) == [("ok", "", 9, 109)]
    assert await count_open(store) == 0
    assert await balance(store, user_id) == 1_000 - 109


async def test_a_control_that_is_replaced_settles_what_the_last_one_knew(
    store: Store, tmp_path: Path, user_id: str
) -> None:
    path = segment(tmp_path, checkpoint(user_id, 5))
    first = Ingest(store, tmp_path, CATALOGUE)
    with held(path):
        await first.ingest_once()
    first.close()
    second = Ingest(store, tmp_path, CATALOGUE)
    for _ in range(3):
        await second.ingest_once()
    second.close()
    assert [row[2:] for row in await stored(store)] == [(5, 5)]


async def test_a_checkpoint_that_comes_after_its_receipt_is_not_charged(
    store: Store, tmp_path: Path, user_id: str
) -> None:
    segment(tmp_path, receipt(1, user_id=user_id, output_tokens=9))
    ingest = Ingest(store, tmp_path, CATALOGUE)
    await ingest.ingest_once()
    segment(tmp_path, checkpoint(user_id, 5), number=2)
    for _ in range(3):
        await ingest.ingest_once()
    ingest.close()
    assert await stored(store) == [("ok", "", 9, 109)]
    assert await count_open(store) == 0
    assert await balance(store, user_id) == 1_000 - 109


async def test_calls_of_a_living_worker_stay_open(store: Store, tmp_path: Path, user_id: str) -> None:
    path = segment(tmp_path, checkpoint(user_id, 5))
    ingest = Ingest(store, tmp_path, CATALOGUE)
    with held(path):
        for _ in range(3):
            await ingest.ingest_once()
        assert (await stored(store), await count_open(store)) == ([], 1)
    ingest.close()
