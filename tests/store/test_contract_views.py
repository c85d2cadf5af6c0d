"""What other programs read with SQL: the guide's query, and the same names on both databases."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from clients.guide import sample
from sqlalchemy import insert, text

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.holds import place, settle
from gpuproxy.ledger.usage import unix_ns
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipts
from gpuproxy.types import Receipt

HOUR_US = 3_600_000_000
GUIDE = sample("Schema Access")
ON_SQLITE = GUIDE.replace("NOW() - INTERVAL '30 days'", "datetime('now', '-30 days')")
NOW = datetime.now(UTC).replace(microsecond=123_456)


def receipt(number: int, user_id: str, at: datetime, duration_us: int, outcome: str = "ok") -> dict[str, Any]:
    fields = dict.fromkeys(Receipt.__struct_fields__, "")
    counts = {name: 0 for name, kind in Receipt.__annotations__.items() if kind in ("int", int)}
    told = {"id": f"r{number}", "user_id": user_id, "started_ns": unix_ns(at), "duration_us": duration_us}
    return {**fields, **counts, "is_stream": False, "upstream": "llm", "model": "m", "outcome": outcome, **told}


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with three calls: of an hour, of two and a half, of long ago; and one that was refused."""
    made = (await create_user(store, "ann@example.com")).id
    calls = [
        receipt(1, made, NOW - timedelta(days=1), HOUR_US) | {"cost_nanousd": 1},
        receipt(2, made, NOW, 5 * HOUR_US // 2) | {"cost_nanousd": 2_500_000_000},
        receipt(3, made, NOW - timedelta(days=31), HOUR_US) | {"cost_nanousd": 10**9},
        receipt(4, made, NOW, 0, "refused") | {"cost_nanousd": 0},
    ]
    async with store.writing() as connection:
        await connection.execute(insert(receipts), calls)
    return made


async def rows(store: Store, query: str) -> Sequence[Any]:
    async with store.reading() as connection:
        return (await connection.execute(text(query))).all()


async def test_the_guides_query_sums_hours_and_dollars_of_a_month(store: Store, user_id: str) -> None:
    ((email, hours, cost),) = await rows(store, ON_SQLITE if store.is_sqlite else GUIDE)
    assert (email, float(hours)) == ("ann@example.com", 3.5)
    if store.is_sqlite:
        assert cost == pytest.approx(2.500000001)
    else:
        assert cost == Decimal("2.500000001")


async def test_times_are_exact_to_the_microsecond(store: Store, user_id: str) -> None:
    ((start, end),) = await rows(store, "SELECT start_time, end_time FROM gpu_usage WHERE id = 'r2'")
    times = [datetime.fromisoformat(f"{each}+00:00") if isinstance(each, str) else each for each in (start, end)]
    assert times == [NOW, NOW + timedelta(hours=2.5)]


async def test_refused_calls_are_no_usage(store: Store, user_id: str) -> None:
    found = await rows(store, "SELECT id, kind, provider, model FROM gpu_usage ORDER BY id")
    assert [tuple(row) for row in found] == [(f"r{n}", "inference", "llm", "m") for n in (1, 2, 3)]


async def test_transactions_are_signed_and_credits_add_up(store: Store, user_id: str) -> None:
    await create_user(store, "bob@example.com")
    await credit(store, user_id, 5_000_000_001, "one")
    async with store.writing() as connection:
        hold = await connection.run_sync(place, user_id, 3_000_000_000, "h")
        await connection.run_sync(settle, hold.id, 2_000_000_000, "usage")
        await connection.run_sync(place, user_id, 7, "h2")
    found = await rows(store, "SELECT user_id, kind, amount, amount_nanousd FROM billing_transactions ORDER BY amount")
    assert [(row[0], row[1], float(row[2]), row[3]) for row in found] == [
        (user_id, "usage", -2.0, -2_000_000_000),
        (user_id, "adjustment", 5.000000001, 5_000_000_001),
    ]
    names = "credits_remaining_nanousd, credits_total_nanousd, held_nanousd, cap_nanousd, credits_remaining"
    found = await rows(store, f"SELECT {names} FROM credits ORDER BY credits_total_nanousd")
    assert tuple(found[0]) == (0, 0, 0, 0, 0)
    assert (*found[1][:4], float(found[1][4])) == (2_999_999_994, 5_000_000_001, 7, 0, 2.999999994)


def test_the_guides_query_is_the_readmes_too() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert GUIDE.strip() in readme
    assert re.search(r"`gpu_usage`", readme)
