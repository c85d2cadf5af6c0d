"""Money for ten calls lets ten calls pass, however many come at once, on both databases, over all workers.

GPUPROXY_TEST_ROUNDS sets how often; the default keeps the run short.
"""

import asyncio
import os
from collections import Counter

import pytest
from callers import CHAT, Caller
from clients.gateway import toml_table
from conftest import MakePlace
from gateways import Gateway, running
from sqlalchemy import select

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.transfers import credit_account
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts

ROUNDS = int(os.environ.get("GPUPROXY_TEST_ROUNDS", "2"))
CALLS, AFFORDED = 100, 10
USD = 10**9
PRICE = toml_table("[[prices]]", {"model": "mock-model", "per_request_usd": "0.10"})


@pytest.mark.parametrize("workers", [1, 2])
async def test_of_many_calls_at_once_exactly_those_pass_that_can_be_paid(
    place: MakePlace, store: Store, store_url: str, workers: int
) -> None:
    here = place(server={"workers": workers}, store={"url": store_url})
    here.configure(tail=PRICE)
    customers = []
    with running(here) as gateway:
        for number in range(ROUNDS):
            user_id, key = await _customer(store, f"customer{number}@example.com")
            statuses = await _at_once(gateway, key)
            assert statuses == {200: AFFORDED, 402: CALLS - AFFORDED}, f"round {number}"
            customers.append(user_id)
        assert gateway.stop() == 0
    async with store.reading() as connection:
        left = select(accounts.c.posted_nanousd).where(accounts.c.id.in_(map(credit_account, customers)))
        assert set((await connection.scalars(left)).all()) == {0}
    assert here.command("ledger", "verify") == "no fault"


async def _customer(store: Store, email: str) -> tuple[str, str]:
    user = await create_user(store, email)
    await credit(store, user.id, USD, f"start:{user.id}")
    secret, _ = await create_key(store, email, rpm=0)
    return user.id, secret


async def _at_once(gateway: Gateway, key: str) -> Counter[int]:
    callers = [Caller(gateway.port, key) for _ in range(CALLS)]
    try:
        await asyncio.gather(*(caller.connect() for caller in callers))
        return Counter(answer.status for answer in await asyncio.gather(*(caller.post(CHAT) for caller in callers)))
    finally:
        for caller in callers:
            await caller.close()
