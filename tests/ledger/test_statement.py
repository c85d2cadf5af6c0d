"""What customers see of their account."""

import pytest
from sqlalchemy import event

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.statement import Credits, credits_of, credits_of_all, transactions_of
from gpuproxy.store.engine import Store


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer who got 100, then 20, was charged 30 of a hold and has 5 held; and another one."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 100, "one")
    await credit(store, made, 20, "two")
    other = (await create_user(store, "bob@example.com")).id
    await credit(store, other, 7, "other")
    async with store.writing() as connection:
        hold = await connection.run_sync(holds.place, made, 50, "h")
        await connection.run_sync(holds.settle, hold.id, 30, "usage")
        await connection.run_sync(holds.place, made, 5, "h2")
    return made


async def test_credits_are_what_came_in_what_is_held_and_what_is_left(store: Store, user_id: str) -> None:
    assert await credits_of(store, user_id) == Credits(85, 120, 5, 0)


async def test_credits_of_many_are_those_of_each_in_one_statement(store: Store, user_id: str) -> None:
    other = (await create_user(store, "eve@example.com")).id
    statements: list[str] = []
    event.listen(store.engine.sync_engine, "before_cursor_execute", lambda *words: statements.append(words[2]))
    found = await credits_of_all(store, [user_id, other])
    assert found == {user_id: Credits(85, 120, 5, 0), other: Credits()}
    assert len([each for each in statements if each.startswith("SELECT")]) == 1  # of two PostgreSQL shows two states


async def test_who_never_had_credit_has_nothing(store: Store) -> None:
    assert await credits_of(store, "nobody") == Credits()
    assert await transactions_of(store, "nobody") == []


async def test_transactions_are_signed_and_newest_first(store: Store, user_id: str) -> None:
    found = await transactions_of(store, user_id)
    assert [(each.kind, each.amount_nanousd) for each in found] == [
        ("usage", -30),
        ("adjustment", 20),
        ("adjustment", 100),
    ]


async def test_transactions_come_in_pages(store: Store, user_id: str) -> None:
    whole = await transactions_of(store, user_id)
    pages, cursor = [], ""
    while page := await transactions_of(store, user_id, 1, cursor):
        pages += page
        cursor = page[-1].id
    assert pages == whole
