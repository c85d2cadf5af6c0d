"""From receipts to money: every call is charged once, out of the lease of its worker, never beyond what is there."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from journals import DAY_NS, START_NS, frame, receipt
from postgres import who_waits
from sqlalchemy import select

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.transfers import REVENUE, WRITE_OFF, credit_account, lock, open_accounts
from gpuproxy.ledger.verify import verify
from gpuproxy.pricing import Catalogue, Price, cost_of
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, receipts, transfers
from gpuproxy.types import Receipt

Take = Callable[..., Awaitable[None]]
CATALOGUE = Catalogue([Price("m1", request_nanousd=10)])
OWNER = lease_owner("here", "000-7")


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 100 nanodollars."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 100, "start")
    return made


@pytest.fixture
async def ingest(store: Store, tmp_path: Path) -> AsyncIterator[Take]:
    """Return a function that journals receipts of worker 000-7 and ingests them."""
    made = Ingest(store, tmp_path / "journal", CATALOGUE, "here")
    (tmp_path / "journal").mkdir()
    numbers = iter(range(100))

    async def take(*written: Receipt) -> None:
        (tmp_path / "journal" / f"000-7-{next(numbers):06}.log").write_bytes(frame(written))
        await made.ingest_once()

    yield take
    made.close()


async def account(store: Store, account_id: str) -> tuple[int, int]:
    async with store.reading() as connection:
        query = select(accounts.c.posted_nanousd, accounts.c.held_nanousd).where(accounts.c.id == account_id)
        row = (await connection.execute(query)).one()
        return row.posted_nanousd, row.held_nanousd


async def lease(store: Store, user_id: str, amount: int, owner: str = OWNER) -> str:
    async with store.writing() as connection:
        return (await connection.run_sync(holds.place, user_id, amount, f"{owner}:{user_id}", owner)).id


async def test_a_batch_is_one_transfer_that_its_receipts_name(store: Store, ingest: Take, user_id: str) -> None:
    await ingest(*(receipt(number, user_id=user_id) for number in range(3)), receipt(3, user_id=user_id, model="free"))
    assert await balance(store, user_id) == 70
    async with store.reading() as connection:
        (posted,) = (await connection.execute(select(transfers).where(transfers.c.kind == "usage"))).all()
        rows = (await connection.execute(select(receipts).order_by(receipts.c.id))).all()
    assert (posted.amount_nanousd, posted.credit_account_id) == (30, "revenue")
    assert [(row.cost_nanousd, row.charge_id) for row in rows] == [(10, posted.charge_id)] * 3 + [(0, "")]
    assert await verify(store) == []


async def test_no_charge_is_for_calls_of_two_days(store: Store, ingest: Take, user_id: str) -> None:
    await lease(store, user_id, 25)
    started = [START_NS, START_NS + DAY_NS - 1, START_NS + DAY_NS]
    await ingest(*(receipt(number, user_id=user_id, started_ns=at) for number, at in enumerate(started)))
    async with store.reading() as connection:
        rows = (await connection.execute(select(receipts).order_by(receipts.c.id))).all()
        posted = (await connection.execute(select(transfers).where(transfers.c.kind == "usage"))).all()
    assert rows[0].charge_id == rows[1].charge_id != rows[2].charge_id
    amounts = {row.charge_id: row.amount_nanousd for row in posted}
    assert amounts == {rows[0].charge_id: 20, rows[2].charge_id: 10}
    assert await account(store, f"credit:{user_id}") == (70, 0)
    assert await verify(store) == []


async def test_what_is_not_covered_is_written_off_on_the_day_it_lacks(store: Store, ingest: Take, user_id: str) -> None:
    calls = [receipt(number, user_id=user_id, started_ns=START_NS + number % 2 * DAY_NS) for number in range(12)]
    await ingest(*calls)
    assert await balance(store, user_id) == 0
    assert (await account(store, "write_off"), await account(store, "revenue")) == ((-20, 0), (120, 0))
    assert await verify(store) == []


async def test_a_charge_comes_out_of_the_lease_of_its_worker_first(store: Store, ingest: Take, user_id: str) -> None:
    await lease(store, user_id, 25)
    await lease(store, user_id, 50, lease_owner("here", "001-8"))
    await ingest(receipt(1, user_id=user_id), receipt(2, user_id=user_id))
    assert await account(store, f"credit:{user_id}") == (80, 55)
    await ingest(receipt(3, user_id=user_id))
    assert await account(store, f"credit:{user_id}") == (70, 50)
    assert await balance(store, user_id) == 20
    assert await verify(store) == []


async def test_what_nothing_covers_is_written_off(store: Store, ingest: Take, user_id: str) -> None:
    await lease(store, user_id, 95, lease_owner("elsewhere", "000-7"))
    await ingest(receipt(1, user_id=user_id), receipt(2, user_id="nobody"))
    assert await balance(store, user_id) == 0
    assert (await account(store, "write_off"), await account(store, "revenue")) == ((-15, 0), (20, 0))
    assert await verify(store) == []


async def test_a_receipt_met_again_is_not_charged_again(store: Store, ingest: Take, user_id: str) -> None:
    await ingest(receipt(1, user_id=user_id), receipt(1, user_id=user_id))
    await ingest(receipt(1, user_id=user_id), receipt(2, user_id=user_id))
    assert await balance(store, user_id) == 80
    assert await verify(store) == []


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_the_first_charge_ever_waits_in_no_circle_with_the_first_refund(
    store: Store, ingest: Take, user_id: str
) -> None:
    async with store.writing() as refund:
        await refund.run_sync(open_accounts, {REVENUE, WRITE_OFF})
        charge = asyncio.create_task(ingest(receipt(1, user_id=user_id)))
        await who_waits(store)
        await refund.run_sync(lock, {credit_account(user_id)})
    await charge
    assert await balance(store, user_id) == 90


async def test_without_prices_nothing_is_charged(store: Store, tmp_path: Path, user_id: str) -> None:
    (tmp_path / "000-7-000001.log").write_bytes(frame([receipt(1, user_id=user_id)]))
    free = Ingest(store, tmp_path)
    await free.ingest_once()
    free.close()
    assert await balance(store, user_id) == 100


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        ({}, 10 + 30),
        ({"outcome": "refused"}, 0),
        ({"user_id": ""}, 0),
        ({"outcome": "upstream_failed"}, 30),
        ({"status": 500}, 30),
        ({"outcome": "client_gone"}, 10 + 30),
        ({"outcome": "client_gone", "first_byte_us": -1, "input_tokens": -1, "output_tokens": -1}, 0),
        ({"input_tokens": -1, "output_tokens": -1}, 10),
        ({"model": "m2"}, 0),
        ({"started_ns": 4}, 0),
    ],
)
def test_a_call_is_billed_for_what_was_delivered(changes: dict[str, object], cost: int) -> None:
    price = Price("m1", "", 10**6, 10**6, 10**6, 10, valid_from_ns=5)
    call = receipt(1, **changes)
    assert cost_of(call, Catalogue([price]).find(call.model, call.upstream, call.started_ns)) == cost
