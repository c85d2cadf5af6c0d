"""A budget for ten calls lets ten calls pass, of all keys of a user or of one, over all workers."""

import asyncio
from collections import Counter

import pytest
from callers import CHAT, Caller
from clients.gateway import toml_table
from conftest import MakePlace
from gateways import running

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.budgets import budgets_of, set_budget
from gpuproxy.store.engine import Store

CALLS, AFFORDED = 40, 10
USD = 10**9
WINDOW_S = 2_592_000  # so long that the test runs in one
PRICE = toml_table("[[prices]]", {"model": "mock-model", "per_request_usd": "0.10"})


@pytest.mark.parametrize("is_of_key", [False, True])
async def test_of_many_calls_at_once_exactly_those_pass_that_a_budget_leaves(
    place: MakePlace, store: Store, store_url: str, is_of_key: bool
) -> None:
    here = place(server={"workers": 2}, store={"url": store_url})
    here.configure(tail=PRICE)
    user = await create_user(store, "ann@example.com")
    await credit(store, user.id, 100 * USD, "start")
    bound, other = [await create_key(store, user.email, rpm=0) for _ in range(2)]
    async with store.writing() as connection:
        key_id = bound[1].id if is_of_key else ""
        await connection.run_sync(set_budget, user.id, key_id, WINDOW_S, USD, False)
    with running(here) as gateway:
        told = await _at_once(gateway.port, bound[0], CALLS)
        assert told == {(200, False): AFFORDED, (402, True): CALLS - AFFORDED}
        assert await _at_once(gateway.port, other[0], 3) == {(200, False) if is_of_key else (402, True): 3}
        assert gateway.stop() == 0
    async with store.reading() as connection:
        (budget,) = await connection.run_sync(budgets_of, user.id)
    assert (budget.spent_nanousd, budget.told_percent) == (USD, 100)
    assert here.command("ledger", "verify") == "no fault"


async def _at_once(port: int, key: str, count: int) -> Counter[tuple[int, bool]]:
    """Return how many calls got which status, and whether it was for want of budget."""
    callers = [Caller(port, key) for _ in range(count)]
    try:
        await asyncio.gather(*(caller.connect() for caller in callers))
        answers = await asyncio.gather(*(caller.post(CHAT) for caller in callers))
        return Counter((answer.status, b"more than a budget has left" in answer.body) for answer in answers)
    finally:
        for caller in callers:
            await caller.close()
