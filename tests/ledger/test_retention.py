"""Receipts that are old go, a day at a time; what they add up to stays, to the nanodollar."""

import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from alembic import command
from alembic.config import Config
from journals import DAY_NS, START_NS, frame, receipt
from sqlalchemy import Connection, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.util import await_only

import gpuproxy.store
from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import days, history, retention
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.history import Use, use_pages
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.retention import Retention
from gpuproxy.ledger.usage import usage_summary
from gpuproxy.ledger.verify import verify
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade
from gpuproxy.store.schema import receipt_days, receipts
from gpuproxy.types import Receipt

TODAY = START_NS // DAY_NS
DAYS = 6  # with calls, of which the last is today
CALLS = 40  # of each day


class Kept:
    """A store of its own with calls of some days, and what takes old ones away."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        self.user_id = ""
        self.today = TODAY
        self._directory = directory

    async def fill(self, today: int) -> None:
        """Store calls of the days up to `today`, parts made as far as they are while that day passes."""
        self.today = today
        self.user_id = (await create_user(self.store, "ann@example.com")).id
        await credit(self.store, self.user_id, 10**9, "start")
        self._directory.mkdir()
        for day in range(today - DAYS + 1, today + 1):
            await self.retention(0, day).step()
            await self.ingest(day)

    async def ingest(self, day: int, count: int = CALLS) -> None:
        calls = [_call(day, number, self.user_id) for number in range(count)]
        path = self._directory / f"000-{day}-000001.log"
        path.write_bytes(b"".join(frame(calls[at : at + 7]) for at in range(0, count, 7)))
        ingest = Ingest(self.store, self._directory, Catalogue([Price("m1", request_nanousd=10)]))
        await ingest.ingest_once()
        ingest.close()

    def retention(self, kept_days: int, today: int) -> Retention:
        made = Retention(self.store, kept_days, _leads)
        made.now_s = lambda: today * 86_400 + 5.0
        return made

    async def run(self, query: Any) -> list[Any]:
        async with self.store.reading() as connection:
            return list(await connection.execute(query))

    async def shown(self) -> dict[str, Any]:
        """Return all that customers and programs see of sums."""
        view = "SELECT sum(cost_nanousd), sum(duration), provider, model, key_id FROM gpu_usage GROUP BY 3, 4, 5"
        uses = [use async for page in use_pages(self.store, self.user_id) for use in page]
        return {
            "view": {tuple(row[2:]): (row[0], round(float(row[1]), 9)) for row in await self.run(text(view))},
            "summary": await usage_summary(self.store, self.user_id),
            **{name: await usage_summary(self.store, self.user_id, group_by=name) for name in ("day", "key", "tool")},
            "uses": (sum(use.cost_nanousd for use in uses), sum(use.duration_us for use in uses)),
            "books": await verify(self.store),
        }

    async def days(self) -> list[int]:
        """Return the days of which receipts are left."""
        return [
            row[0] for row in await self.run(select(receipts.c.started_ns // DAY_NS).distinct().order_by(text("1")))
        ]


async def _leads() -> bool:
    return True


def _call(day: int, number: int, user_id: str) -> Receipt:
    kinds: list[dict[str, Any]] = [
        {"user_id": user_id},
        {"user_id": user_id, "outcome": "refused", "input_tokens": -1, "output_tokens": -1, "cached_tokens": -1},
        {"user_id": user_id, "key_id": "k2", "upstream": "tools", "rpc_method": "tools/call", "rpc_name": "add"},
        {"user_id": ""},
    ]
    started_ns = day * DAY_NS + number * DAY_NS // CALLS
    return receipt(number, id=f"r{day}-{number}", started_ns=started_ns, **kinds[number % len(kinds)])


@pytest.fixture
async def kept(store_url: str, tmp_path: Path) -> AsyncIterator[Kept]:
    store = open_store(store_url)
    await upgrade(store)
    yield Kept(store, tmp_path / "journal")
    await store.close()


@pytest.fixture(params=["parts", "before"])
async def filled(kept: Kept, request: pytest.FixtureRequest) -> Kept:
    """Fill the store with days that have parts on PostgreSQL, or lie before the first."""
    await kept.fill(int(time.time()) // 86_400 + DAYS + 1 if request.param == "parts" else TODAY)
    return kept


async def test_old_days_go_and_every_sum_stays(filled: Kept) -> None:
    before = await filled.shown()
    assert before["books"] == []
    tender = filled.retention(2, filled.today)
    while await tender.step():
        assert await filled.shown() == before  # in every moment
    assert await filled.days() == [filled.today - 2, filled.today - 1, filled.today]
    assert await filled.shown() == before
    gone = await filled.run(select(func.sum(receipt_days.c.requests)))
    assert gone[0][0] == (DAYS - 3) * CALLS
    assert await filled.run(select(func.count()).select_from(receipts)) == [(3 * CALLS,)]


async def test_without_a_limit_nothing_goes(filled: Kept) -> None:
    assert await filled.retention(0, filled.today + 10_000).step() is False
    assert len(await filled.days()) == DAYS


async def test_a_step_takes_no_more_than_its_bound(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    await kept.fill(TODAY)
    before = await kept.shown()
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 7)
    counts = [CALLS * DAYS]
    while await kept.retention(1, kept.today).step():
        counts.append((await kept.run(select(func.count()).select_from(receipts)))[0][0])
        assert await kept.shown() == before
    steps = [earlier - later for earlier, later in pairwise(counts)]
    assert max(steps) == 7
    assert sum(steps) == (DAYS - 2) * CALLS


async def test_a_summary_is_of_one_moment_while_receipts_go(kept: Kept, store_url: str) -> None:
    await kept.fill(TODAY)
    before = await usage_summary(kept.store, kept.user_id, group_by="day")
    other = Kept(open_store(store_url), Path())
    tender = other.retention(2, kept.today)
    went: list[bool] = []

    def after_each_statement(*_: object) -> None:
        went.append(await_only(tender.step()))

    event.listen(kept.store.engine.sync_engine, "after_cursor_execute", after_each_statement)
    for _ in range(DAYS):
        assert await usage_summary(kept.store, kept.user_id, group_by="day") == before
    event.remove(kept.store.engine.sync_engine, "after_cursor_execute", after_each_statement)
    await other.store.close()
    assert went.count(True) == DAYS - 3


@pytest.mark.parametrize("quiet_pages", [0, 4, 9])
async def test_an_export_is_whole_while_receipts_go(
    filled: Kept, monkeypatch: pytest.MonkeyPatch, quiet_pages: int
) -> None:
    before = (await filled.shown())["uses"]
    monkeypatch.setattr(history, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 11)
    tender = filled.retention(1, filled.today)
    uses: list[Use] = []
    async for page in use_pages(filled.store, filled.user_id):
        uses += page
        quiet_pages -= 1
        if quiet_pages < 0:
            await tender.step()
    assert (sum(use.cost_nanousd for use in uses), sum(use.duration_us for use in uses)) == before
    calls = [use.id for use in uses if use.id.startswith("r")]
    assert len(calls) == len(set(calls))
    assert await filled.run(select(func.count()).select_from(receipt_days)) != [(0,)], "something has gone meanwhile"


async def test_a_receipt_of_a_day_that_has_gone_is_taken_and_goes_too(filled: Kept) -> None:
    tender = filled.retention(2, filled.today)
    while await tender.step():
        pass
    late = msgspec.structs.replace(_call(filled.today - 4, 4, filled.user_id), id="late")
    (filled._directory / "000-9-000001.log").write_bytes(frame([late]))
    ingest = Ingest(filled.store, filled._directory, Catalogue([Price("m1", request_nanousd=10)]))
    assert await ingest.ingest_once() == 1
    ingest.close()
    before = await filled.shown()
    assert (await filled.days())[0] == filled.today - 4
    assert await tender.step() is True
    assert await tender.step() is False
    assert await filled.shown() == before


async def test_receipts_outlive_the_change_of_their_key(store_url: str) -> None:
    store = open_store(store_url)
    names = Receipt.__struct_fields__[: Receipt.__struct_fields__.index("markup_bps") + 1]  # as there were
    calls = [receipt(number, user_id="u", started_ns=number * DAY_NS) for number in (3, 20_000, 1, 90_000)]
    values = [msgspec.structs.astuple(call)[: len(names)] for call in calls]
    async with store.writing() as connection:
        await connection.run_sync(_migrate_to, "0020")
        for row in values:
            shown = ", ".join("false" if value is False else repr(value) for value in row)
            statement = f"INSERT INTO receipts ({', '.join(names)}, cost_nanousd, charge_id) VALUES ({shown}, 5, 'c')"
            await connection.execute(text(statement))
        usage = (await connection.execute(text("SELECT * FROM gpu_usage ORDER BY id"))).all()
    assert await upgrade(store) is True
    async with store.reading() as connection:
        rows = [row._asdict() for row in await connection.execute(select(receipts).order_by(receipts.c.started_ns))]
        assert (await connection.execute(text("SELECT * FROM gpu_usage ORDER BY id"))).all() == usage
    assert [tuple(row[name] for name in names) for row in rows] == sorted(values, key=lambda row: row[2])
    assert {(row["rpc_method"], row["cost_nanousd"], row["charge_id"]) for row in rows} == {("", 5, "c")}
    with pytest.raises(IntegrityError):
        async with store.writing() as connection:
            await connection.execute(insert(receipts), rows[0])
    await store.close()


def _migrate_to(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", f"{gpuproxy.store.__path__[0]}/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


async def parts(store: Store) -> list[str]:
    query = "SELECT relname FROM pg_class WHERE relname LIKE 'receipts\\_%' AND relkind = 'r' ORDER BY 1"
    async with store.reading() as connection:
        return list(await connection.scalars(text(query)))


async def test_each_day_has_a_part_of_its_own_on_postgresql(postgres_url: str, tmp_path: Path) -> None:
    store = open_store(postgres_url)
    await upgrade(store)
    kept, first = Kept(store, tmp_path), int(time.time()) // 86_400 + 1
    assert await parts(store) == ["receipts_before", "receipts_later"]
    for today in (first - 1, first, first + 2):
        await kept.retention(0, today).step()
    made = [days.part_of(day) for day in range(first, first + 2 + days.DAYS_AHEAD + 1)]
    assert await parts(store) == [*made, "receipts_before", "receipts_later"]
    await kept.ingest(first + 1)
    await kept.ingest(first + 9)
    counts = [await kept.run(text(f"SELECT count(*) FROM {name}")) for name in (made[1], "receipts_later")]
    assert counts == [[(CALLS,)], [(CALLS,)]]
    await kept.retention(0, first + 7).step()
    assert days.part_of(first + 9) not in await parts(store), "its receipts would have to move"
    assert days.part_of(first + 10) in await parts(store)
    await kept.retention(1, first + 3).step()
    await kept.retention(1, first + 3).step()
    assert made[0] not in await parts(store)
    assert made[1] not in await parts(store)
    assert made[2] in await parts(store)
    await store.close()


async def test_who_reads_for_long_keeps_a_day_from_going_but_nobody_from_reading(
    postgres_url: str, tmp_path: Path
) -> None:
    store = open_store(postgres_url)
    await upgrade(store)
    kept = Kept(store, tmp_path / "journal")
    await kept.fill(int(time.time()) // 86_400 + DAYS + 1)
    async with store.reading() as connection:
        await connection.execute(select(func.count()).select_from(receipts))
        with pytest.raises(DBAPIError, match="lock timeout"):
            await kept.retention(1, kept.today).step()
        assert await kept.run(select(func.count()).select_from(receipts)) == [(DAYS * CALLS,)]
    assert await kept.retention(1, kept.today).step() is True
    await store.close()
