"""What a running gateway does with its ledger beside charging: old receipts go, a stopped node keeps nothing back."""

import json
import time

from callers import CHAT
from clients.gateway import toml_table
from conftest import MakeCaller, MakePlace
from gateways import Gateway, running
from sqlalchemy import func, select, text

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.ledger.book import credit
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, holds, receipt_days, receipts

USD = 10**9
DAY_NS = 86_400 * 10**9
CALLS = 5
PRICE = toml_table("[[prices]]", {"model": "mock-model", "per_request_usd": "0.001"})


async def new_key(store: Store) -> str:
    user = await create_user(store, "payer@example.com")
    await credit(store, user.id, USD, "start")
    secret, _ = await create_key(store, user.email, rpm=0)
    return secret


async def count(store: Store, query: object) -> int:
    async with store.reading() as connection:
        return await connection.scalar(query) or 0  # type: ignore[call-overload]


async def usage(new_caller: MakeCaller, gateway: Gateway, key: str) -> dict[str, object]:
    caller = new_caller(gateway)
    caller.key = key
    told: dict[str, object] = json.loads((await caller.get("/api/v1/user/usage?group_by=model")).body)["data"]
    return told


async def test_a_node_that_is_stopped_keeps_no_credit_back_and_old_receipts_go_at_its_next_start(
    place: MakePlace, new_caller: MakeCaller, store: Store, store_url: str
) -> None:
    key = await new_key(store)
    here = place(store={"url": store_url}, server={"workers": 2})
    here.configure(tail=PRICE)
    with running(here) as gateway:
        caller = new_caller(gateway)
        caller.key = key
        assert {(await caller.post(CHAT)).status for _ in range(CALLS)} == {200}
        assert gateway.stop() == 0
    assert await count(store, select(func.count()).where(holds.c.state == "pending")) == 0
    spent = select(accounts.c.posted_nanousd).where(accounts.c.id.like("credit:%"))
    assert await count(store, spent) == USD - CALLS * USD // 1_000
    async with store.writing() as connection:  # as if they were of the day before yesterday
        await connection.execute(text(f"UPDATE receipts SET started_ns = {time.time_ns() - 3 * DAY_NS}"))
    here.configure(tail=PRICE, ledger={"retention_days": 2})
    with running(here) as gateway:
        before = {"requests": CALLS, "model": "mock-model"}
        while await count(store, select(func.count()).select_from(receipts)):
            assert (await usage(new_caller, gateway, key))["requests"] == CALLS
        told = await usage(new_caller, gateway, key)
        assert told["requests"] == CALLS
        assert before.items() <= told["groups"][0].items()  # type: ignore[index]
        assert gateway.stop() == 0
    assert await count(store, select(func.sum(receipt_days.c.requests))) == CALLS
    assert here.command("ledger", "verify") == "no fault"
