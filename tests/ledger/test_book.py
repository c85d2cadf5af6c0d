"""Transfers: every one balances, none happens twice, amounts are exact."""

import asyncio
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from gpuproxy.access.accounts import create_user
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import AMOUNT_NANOUSD_MAX, balance, credit, format_usd, parse_usd
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, transfers


@pytest.fixture
async def user_id(store: Store) -> str:
    return (await create_user(store, "ann@example.com")).id


async def test_credit_shows_in_the_balance(store: Store, user_id: str) -> None:
    assert await balance(store, user_id) == 0
    assert await credit(store, user_id, 12_500_000_000, "one") is True
    assert await credit(store, user_id, 1, "two") is True
    assert await balance(store, user_id) == 12_500_000_001


async def test_the_same_idempotency_key_pays_once(store: Store, user_id: str) -> None:
    await credit(store, user_id, 5, "one")
    assert await credit(store, user_id, 5, "one") is False
    assert await balance(store, user_id) == 5


async def test_racing_posts_of_one_key_pay_once(store: Store, user_id: str) -> None:
    await credit(store, user_id, 1, "zero")
    done = await asyncio.gather(*(credit(store, user_id, 5, "one") for _ in range(8)))
    assert (sum(done), await balance(store, user_id)) == (1, 6)


async def test_an_idempotency_key_is_for_one_transfer(store: Store, user_id: str) -> None:
    await credit(store, user_id, 5, "one")
    with pytest.raises(GatewayError, match="belongs to another transfer"):
        await credit(store, user_id, 6, "one")
    assert await balance(store, user_id) == 5


async def test_all_accounts_sum_to_nothing_and_equal_their_transfers(store: Store, user_id: str) -> None:
    other = (await create_user(store, "bob@example.com")).id
    for index, (owner, amount) in enumerate([(user_id, 3), (other, 4), (user_id, 50)]):
        await credit(store, owner, amount, str(index))
    async with store.reading() as connection:
        assert await connection.scalar(select(func.sum(accounts.c.posted_nanousd))) == 0
        for account in (await connection.execute(select(accounts))).all():
            credited = select(func.coalesce(func.sum(transfers.c.amount_nanousd), 0))
            gained = await connection.scalar(credited.where(transfers.c.credit_account_id == account.id))
            lost = await connection.scalar(credited.where(transfers.c.debit_account_id == account.id))
            assert account.posted_nanousd == gained - lost


@pytest.mark.parametrize("amount", [0, -1, AMOUNT_NANOUSD_MAX + 1])
async def test_an_amount_out_of_range_is_refused(store: Store, user_id: str, amount: int) -> None:
    with pytest.raises(GatewayError, match="out of range"):
        await credit(store, user_id, amount, "one")


@pytest.mark.parametrize(
    ("text", "nanousd"),
    [("12.50", 12_500_000_000), ("0.000000001", 1), ("1e3", 10**12), ("1000000000", AMOUNT_NANOUSD_MAX)],
)
def test_dollars_are_read_exactly(text: str, nanousd: int) -> None:
    assert parse_usd(text) == nanousd


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "-1",
        "1.0000000001",
        "nan",
        "inf",
        "1,5",
        "1000000000.000000001",
        "1e999999",
        "1e-999999",
        "1." + "0" * 40 + "1",
    ],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_usd(text)


@given(st.integers(1, AMOUNT_NANOUSD_MAX))
def test_an_amount_survives_writing_and_reading(nanousd: int) -> None:
    assert parse_usd(format_usd(nanousd)) == nanousd
    assert Decimal(format_usd(nanousd)) * 10**9 == nanousd


def test_dollars_are_shown_with_cents() -> None:
    assert [format_usd(n) for n in (0, 10**9, 1, -12_500_000_000)] == ["0.00", "1.00", "0.000000001", "-12.50"]
