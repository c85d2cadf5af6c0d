"""Holds: set aside once, resolved once, never charged beyond what is held."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from gpuproxy.access.accounts import create_user
from gpuproxy.errors import GatewayError
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.holds import Hold
from gpuproxy.ledger.verify import verify
from gpuproxy.store.engine import Store

T = TypeVar("T")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 100 nanodollars."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 100, "start")
    return made


async def do(store: Store, work: Callable[..., T], *words: Any) -> T:
    """Do `work` in a transaction of its own."""
    async with store.writing() as connection:
        return await connection.run_sync(work, *words)


async def place(store: Store, user_id: str, amount: int, key: str = "h", *words: Any) -> Hold:
    return await do(store, holds.place, user_id, amount, key, *words)


async def found(store: Store, hold: Hold) -> Hold:
    again = await do(store, holds.get, hold.id)
    assert again is not None
    return again


async def test_what_is_held_cannot_be_spent_again(store: Store, user_id: str) -> None:
    await place(store, user_id, 70)
    assert await balance(store, user_id) == 30
    with pytest.raises(GatewayError, match="not enough credit"):
        await place(store, user_id, 31, "other")
    assert await balance(store, user_id) == 30
    assert await verify(store) == []


async def test_a_settled_hold_charges_what_was_used_and_gives_back_the_rest(store: Store, user_id: str) -> None:
    hold = await place(store, user_id, 70)
    done = await do(store, holds.settle, hold.id, 25, "usage")
    assert (done.state, done.posted_nanousd, done.remaining_nanousd) == ("posted", 25, 0)
    assert await balance(store, user_id) == 75
    assert await verify(store) == []


async def test_a_voided_hold_charges_nothing(store: Store, user_id: str) -> None:
    hold = await place(store, user_id, 70)
    assert (await do(store, holds.void, hold.id)).state == "voided"
    assert await balance(store, user_id) == 100


@pytest.mark.parametrize("first", ["settle", "void", "expire"])
@pytest.mark.parametrize("second", ["settle", "void", "draw", "extend", "give_back"])
async def test_a_hold_is_resolved_once(store: Store, user_id: str, first: str, second: str) -> None:
    hold = await place(store, user_id, 70, "h", "", LONG_AGO)
    words = {"settle": (10, "usage"), "draw": (10, "usage", "k"), "extend": (10,), "give_back": (10,), "void": ()}
    if first == "expire":
        assert await do(store, holds.expire, datetime.now(UTC)) == 1
    else:
        await do(store, getattr(holds, first), hold.id, *words[first])
    left = await balance(store, user_id)
    with pytest.raises(GatewayError, match="already"):
        await do(store, getattr(holds, second), hold.id, *words[second])
    assert await balance(store, user_id) == left
    assert await verify(store) == []


async def test_a_hold_is_never_charged_more_than_was_held(store: Store, user_id: str) -> None:
    hold = await place(store, user_id, 70)
    for work, words in ((holds.settle, (71, "usage")), (holds.draw, (71, "usage", "k")), (holds.settle, (-1, "usage"))):
        with pytest.raises(GatewayError, match="more than the 70 that remain"):
            await do(store, work, hold.id, *words)
    assert await balance(store, user_id) == 30


async def test_a_hold_can_be_drawn_on_extended_and_given_back_in_part(store: Store, user_id: str) -> None:
    hold = await place(store, user_id, 50)
    assert await do(store, holds.draw, hold.id, 20, "usage", "k1") is True
    assert await do(store, holds.draw, hold.id, 20, "usage", "k1") is False
    assert await do(store, holds.extend, hold.id, 50) is True
    assert await do(store, holds.extend, hold.id, 1) is False
    assert await do(store, holds.give_back, hold.id, 30) == 30
    now = await found(store, hold)
    assert (now.amount_nanousd, now.posted_nanousd, now.remaining_nanousd) == (100, 20, 50)
    assert await do(store, holds.give_back, hold.id, 99) == 50
    assert await balance(store, user_id) == 80
    assert await verify(store) == []


async def test_a_hold_that_expires_is_given_back_and_others_stay(store: Store, user_id: str) -> None:
    now = datetime.now(UTC)
    old = await place(store, user_id, 10, "old", "", now - timedelta(seconds=1))
    new = await place(store, user_id, 10, "new", "", now + timedelta(hours=1))
    endless = await place(store, user_id, 10, "endless")
    assert await do(store, holds.expire, now) == 1
    assert [(await found(store, each)).state for each in (old, new, endless)] == ["expired", "pending", "pending"]
    assert await balance(store, user_id) == 80


async def test_the_same_idempotency_key_holds_once(store: Store, user_id: str) -> None:
    first = await place(store, user_id, 70)
    assert (await place(store, user_id, 70)).id == first.id
    assert await balance(store, user_id) == 30
    with pytest.raises(GatewayError, match="belongs to another hold"):
        await place(store, user_id, 70, "h", "somebody else")


async def test_racing_holds_of_one_key_hold_once(store: Store, user_id: str) -> None:
    made = await asyncio.gather(*(place(store, user_id, 10) for _ in range(8)))
    assert len({hold.id for hold in made}) == 1
    assert await balance(store, user_id) == 90


async def test_money_for_ten_pays_for_exactly_ten_of_a_hundred_at_once(store: Store, user_id: str) -> None:
    async def call(number: int) -> bool:
        try:
            hold = await place(store, user_id, 10, str(number))
        except GatewayError:
            return False
        await do(store, holds.settle, hold.id, 10, "usage")
        return True

    done = await asyncio.gather(*(call(number) for number in range(100)))
    assert (sum(done), await balance(store, user_id)) == (10, 0)
    assert await verify(store) == []


async def test_nobody_without_an_account_can_hold(store: Store) -> None:
    with pytest.raises(GatewayError, match="not enough credit"):
        await place(store, "nobody", 1)


@pytest.mark.parametrize("amount", [0, -1, 10**18 + 1])
async def test_an_amount_out_of_range_is_refused(store: Store, user_id: str, amount: int) -> None:
    with pytest.raises(GatewayError, match="out of range"):
        await place(store, user_id, amount)


async def test_a_hold_that_is_not_there_is_told(store: Store) -> None:
    with pytest.raises(GatewayError, match="no hold 'x'"):
        await do(store, holds.void, "x")


async def test_the_holds_of_an_owner_are_found(store: Store, user_id: str) -> None:
    mine = await place(store, user_id, 1, "a", "me")
    await place(store, user_id, 1, "b", "you")
    over = await place(store, user_id, 1, "c", "me")
    await do(store, holds.void, over.id)
    assert [hold.id for hold in await do(store, holds.pending_of, "me")] == [mine.id]
