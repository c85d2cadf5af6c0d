"""Little credit left: told once, to whom it concerns, by the threshold that holds for them, until credit comes in."""

from typing import Any

import pytest
from sqlalchemy import select

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.low_credit import find_low, set_threshold, tell_low, threshold_of
from gpuproxy.ledger.terms import set_overdraft
from gpuproxy.ledger.transfers import REVENUE, Transfer, credit_account, post
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import events

LOW = 100


class Account:
    """One customer of a store, who had 1000 nanodollars and was told nothing yet."""

    def __init__(self, store: Store, user_id: str) -> None:
        self.store, self.user_id, self._count = store, user_id, 0

    async def do(self, work: Any, *arguments: Any) -> Any:
        async with self.store.writing() as connection:
            return await connection.run_sync(work, *arguments)

    async def spend(self, nanousd: int) -> None:
        self._count += 1
        await self.do(post, [Transfer(credit_account(self.user_id), REVENUE, nanousd, "usage", f"s{self._count}")])

    async def look(self) -> int:
        found = await self.do(find_low, LOW)
        return int(await self.do(tell_low, found, LOW)) if found else 0

    async def told(self) -> list[tuple[int, int]]:
        query = select(events.c.data).where(events.c.name == "credits.low").order_by(events.c.seq)
        async with self.store.reading() as connection:
            found = [row.data for row in await connection.execute(query)]
        return [(each["credits_remaining_nanousd"], each["threshold_nanousd"]) for each in found]


@pytest.fixture
async def account(store: Store) -> Account:
    user_id = (await create_user(store, "ann@example.com")).id
    await create_user(store, "bob@example.com")  # never had anything: there is nothing to tell
    await credit(store, user_id, 1_000, "start")
    return Account(store, user_id)


async def test_it_is_told_once_until_credit_is_added(account: Account) -> None:
    await account.spend(900)
    assert await account.look() == 0
    await account.spend(1)
    assert [await account.look() for _ in range(3)] == [1, 0, 0]
    await account.spend(9)
    assert await account.look() == 0
    await credit(account.store, account.user_id, 5, "a little")
    assert [await account.look() for _ in range(2)] == [1, 0]
    assert await account.told() == [(99, LOW), (95, LOW)]


async def test_what_is_held_is_not_left_and_an_overdraft_is(account: Account) -> None:
    await account.do(holds.place, account.user_id, 950, "h1")
    await account.do(set_overdraft, account.user_id, 60)
    assert await account.look() == 0
    await account.do(set_overdraft, account.user_id, 0)
    assert await account.look() == 1
    assert await account.told() == [(50, LOW)]


@pytest.mark.parametrize(("threshold", "count"), [(0, 0), (50, 0), (500, 1), (None, 0)])
async def test_a_customer_has_a_threshold_of_their_own(account: Account, threshold: int | None, count: int) -> None:
    await account.spend(800)
    await account.do(set_threshold, account.user_id, threshold)
    assert await account.do(threshold_of, account.user_id) == threshold
    assert await account.look() == count


async def test_two_nodes_that_look_at_once_tell_it_once(account: Account) -> None:
    await account.spend(950)
    found = await account.do(find_low, LOW)
    assert [await account.do(tell_low, found, LOW) for _ in range(2)] == [1, 0]
