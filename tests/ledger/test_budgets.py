"""Budgets: never exceeded, whoever asks for how much when, told once at 80 and at 100 %."""

import asyncio
import random
from typing import Any

import pytest
from postgres import who_waits
from sqlalchemy import Connection, func, select, update

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.errors import GatewayError
from gpuproxy.ledger import budgets
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.budgets import BUDGETS_MAX, budgets_of, refused, remove_budget, room, set_budget, spend
from gpuproxy.ledger.leases import Leases
from gpuproxy.ledger.settle import Payer, lease_owner, settle
from gpuproxy.ledger.verify import verify
from gpuproxy.link.messages import Lease, Leased, Return
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, events

HOUR = 3_600
NODE = "here"


class Ann:
    """A customer with 1,000 nanodollars and two keys."""

    def __init__(self, store: Store, user_id: str, key_ids: list[str]) -> None:
        self.store = store
        self.id = user_id
        self.one, self.two = key_ids
        self.leases = Leases(store, NODE, self._no_limit, lambda epoch, recall: False)

    async def run(self, work: Any, *arguments: Any) -> Any:
        async with self.store.writing() as connection:
            return await connection.run_sync(work, *arguments)

    async def budget(self, limit: int, key_id: str = "", window_s: int = HOUR, is_admins: bool = False) -> Any:
        return await self.run(set_budget, self.id, key_id, window_s, limit, is_admins)

    async def ask(self, least: int, wanted: int = 0, key_id: str = "", epoch: str = "w1") -> Leased:
        return await self.leases.grant(epoch, Lease(1, self.id, key_id, "nanousd", least, wanted))

    async def charge(self, cost: int, key_id: str, epoch: str = "w1") -> None:
        await self.run(settle, {Payer(lease_owner(NODE, epoch), self.id, key_id): cost})

    async def give_back(self, amount: int, key_id: str = "", epoch: str = "w1") -> None:
        self.leases.take_back(epoch, Return(self.id, key_id, "nanousd", amount))
        await self.leases.flush()

    async def events(self) -> list[tuple[str, int]]:
        query = select(events.c.name, events.c.data).where(events.c.name.startswith("budget.")).order_by(events.c.seq)
        async with self.store.reading() as connection:
            return [(row.name, row.data["spent_nanousd"]) for row in await connection.execute(query)]

    async def _no_limit(self, user_id: str, key_id: str) -> int:
        return 0


@pytest.fixture
async def ann(store: Store, monkeypatch: pytest.MonkeyPatch) -> Ann:
    monkeypatch.setattr(budgets.time, "time", lambda: 10_000.0 * HOUR)
    user_id = (await create_user(store, "ann@example.com")).id
    keys = [(await create_key(store, "ann@example.com"))[1].id for _ in range(2)]
    await credit(store, user_id, 1_000, "start")
    return Ann(store, user_id, keys)


async def test_what_is_held_and_what_was_charged_never_exceed_it_together(ann: Ann) -> None:
    await ann.budget(100)
    assert (await ann.ask(60)).amount == 60
    refused = await ann.ask(41, epoch="w2")
    assert (refused.amount, refused.budget_ends_ns) == (0, 10_001 * HOUR * 10**9)
    await ann.charge(50, ann.one)
    assert (await ann.ask(41, epoch="w2")).amount == 0
    await ann.give_back(10)
    assert (await ann.ask(41, epoch="w2")).amount == 41
    assert (await ann.ask(10, epoch="w2")).amount == 0


async def test_a_lease_gets_smaller_the_less_a_budget_leaves(ann: Ann) -> None:
    await ann.budget(80)
    assert (await ann.ask(1, 500)).amount == 10


async def test_want_of_credit_is_not_taken_for_a_budget(ann: Ann) -> None:
    await ann.budget(2_000)
    refused = await ann.ask(1_001)
    assert (refused.amount, refused.budget_ends_ns) == (0, 0)


async def test_a_key_with_a_budget_leaves_the_others_alone(ann: Ann) -> None:
    await ann.budget(50, ann.one)
    assert (await ann.ask(50, key_id=ann.one)).amount == 50
    assert (await ann.ask(1, key_id=ann.one, epoch="w2")).amount == 0
    assert (await ann.ask(300, epoch="w2")).amount == 300
    await ann.charge(20, ann.one)
    await ann.charge(300, ann.two, "w2")
    assert (await ann.ask(1, key_id=ann.one)).amount == 0
    await ann.give_back(30, ann.one)
    assert (await ann.ask(30, key_id=ann.one, epoch="w2")).amount == 30
    assert await verify(ann.store) == []


async def test_of_two_budgets_the_tighter_one_holds(ann: Ann) -> None:
    await ann.budget(100)
    await ann.budget(50, ann.one)
    await ann.budget(20, ann.one, 300, is_admins=True)
    assert (await ann.ask(21, key_id=ann.one)).amount == 0
    assert (await ann.ask(20, key_id=ann.one)).amount == 20
    assert (await ann.ask(81)).amount == 0
    assert (await ann.ask(80)).amount == 80


async def test_a_new_window_begins_with_nothing_spent_but_what_is_held(
    ann: Ann, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ann.budget(100)
    await ann.ask(100)
    await ann.charge(70, ann.one)
    monkeypatch.setattr(budgets.time, "time", lambda: 10_001.0 * HOUR)
    assert (await ann.ask(71, epoch="w2")).amount == 0
    assert (await ann.ask(70, epoch="w2")).amount == 70
    await ann.charge(30, ann.one)
    (budget,) = await ann.run(budgets_of, ann.id)
    assert budget.spent(10_001.0 * HOUR) == 30
    assert budget.spent(10_002.0 * HOUR) == 0


async def test_a_clock_that_is_behind_begins_no_window_anew(ann: Ann, monkeypatch: pytest.MonkeyPatch) -> None:
    await ann.budget(100)
    now_s = 10_001.0 * HOUR
    for seconds, cost, spent in ((-1, 60, 60), (0, 70, 70), (-1, 20, 90), (1, 5, 95), (-1, 0, 95)):
        monkeypatch.setattr(budgets.time, "time", lambda at_s=now_s + seconds: at_s)
        await ann.run(spend, {(ann.id, ann.one): cost})
        (room_left,) = await ann.run(budgets.rooms, ann.id, "")
        assert room_left.nanousd == 100 - spent
    assert await ann.events() == [("budget.warning", 90)]


async def test_a_clock_that_was_far_ahead_for_a_moment_stops_no_budget(
    ann: Ann, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ann.budget(100)
    for hours, left in ((10_003, 20), (10_000, 20), (10_001, 20)):
        monkeypatch.setattr(budgets.time, "time", lambda hours=hours: hours * HOUR)
        await ann.run(spend, {(ann.id, ann.one): 80})
        (room_left,) = await ann.run(budgets.rooms, ann.id, "")
        assert room_left.nanousd == left


async def test_80_and_100_percent_are_told_once_in_a_window(ann: Ann, monkeypatch: pytest.MonkeyPatch) -> None:
    await ann.budget(100)
    for cost in (79, 1, 1, 18, 1, 5):
        await ann.run(spend, {(ann.id, ann.one): cost})
    assert await ann.events() == [("budget.warning", 80), ("budget.exceeded", 100)]
    monkeypatch.setattr(budgets.time, "time", lambda: 10_001.0 * HOUR)
    await ann.run(spend, {(ann.id, ann.one): 150})
    assert (await ann.events())[2:] == [("budget.exceeded", 150)]


async def test_the_first_call_refused_is_told_as_exceeded(ann: Ann) -> None:
    await ann.budget(100)
    await ann.charge(70, ann.one)
    for _ in range(3):
        assert (await ann.ask(31)).amount == 0
    assert await ann.events() == [("budget.exceeded", 70)]
    assert (await ann.ask(0, 31)).amount == 3


async def test_what_is_charged_before_a_refusal_is_noted_counts(ann: Ann) -> None:
    budget = await ann.budget(100)
    await ann.charge(60, ann.one)
    await ann.run(refused, budget)
    assert (await ann.ask(41)).amount == 0
    assert await ann.events() == [("budget.exceeded", 60)]


async def test_keys_that_came_from_one_another_share_a_budget(ann: Ann) -> None:
    await ann.budget(50, ann.one)
    async with ann.store.writing() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.id == ann.two).values(root_id=ann.one))
    await ann.charge(30, ann.one)
    await ann.ask(20, key_id=ann.one)
    await ann.charge(20, ann.two)
    (budget,) = await ann.run(budgets_of, ann.id)
    assert budget.spent_nanousd == 50
    again = await ann.budget(60, ann.two)
    assert (again.id, again.key_id, again.limit_nanousd) == (budget.id, ann.one, 60)


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_of_two_that_set_a_budget_at_once_the_later_sets_the_limit(ann: Ann) -> None:
    async with ann.store.writing() as connection:
        await connection.run_sync(set_budget, ann.id, "", HOUR, 100, False)
        later = asyncio.create_task(ann.budget(70))
        await who_waits(ann.store)
    assert (await later).limit_nanousd == 70


async def test_a_budget_that_is_removed_holds_no_more(ann: Ann) -> None:
    budget = await ann.budget(10, is_admins=True)
    with pytest.raises(GatewayError, match="an admin has set this budget"):
        await ann.run(remove_budget, budget.id, ann.id, False)
    with pytest.raises(GatewayError, match="no budget"):
        await ann.run(remove_budget, budget.id, "somebody", True)
    await ann.run(remove_budget, budget.id, None, True)
    assert (await ann.ask(11)).amount == 11


async def test_a_budget_out_of_range_is_refused(ann: Ann) -> None:
    for window_s in (299, 2_592_001):
        with pytest.raises(GatewayError, match=r"window_s=\d+ is out of range"):
            await ann.budget(10, window_s=window_s)
    with pytest.raises(GatewayError, match="no key 'x' in this account"):
        await ann.budget(10, "x")
    for number in range(BUDGETS_MAX):
        await ann.budget(10, window_s=300 + number)
    with pytest.raises(GatewayError, match="100 budgets already"):
        await ann.budget(10, window_s=1_000)
    await ann.budget(11, window_s=300)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_in_whatever_order_a_budget_holds(
    ann: Ann, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    limits = {"": 120, ann.one: 60}
    for key_id, limit in limits.items():
        await ann.budget(limit, key_id)
    held = {(key_id, epoch): 0 for key_id in ("", ann.one) for epoch in ("w1", "w2")}
    hour, spent = 10_000, {"": 0, ann.one: 0}
    for _ in range(80):
        key_id, epoch = chance.choice(list(held))
        match chance.randrange(8):
            case 0 | 1 | 2:
                least = chance.randint(1, 30)
                held[key_id, epoch] += (await ann.ask(least, chance.randint(0, 400), key_id, epoch)).amount
            case 3 | 4 | 5 if held[key_id, epoch]:
                cost = chance.randint(1, held[key_id, epoch])
                held[key_id, epoch] -= cost
                await ann.charge(cost, key_id or ann.two, epoch)
                for subject in {"", key_id}:
                    spent[subject] += cost
            case 6 if held[key_id, epoch]:
                amount = chance.randint(1, held[key_id, epoch])
                held[key_id, epoch] -= amount
                await ann.give_back(amount, key_id, epoch)
            case 7 if chance.random() < 0.3:
                hour += 1
                monkeypatch.setattr(budgets.time, "time", lambda hour=hour: float(hour * HOUR))
                spent = {"": 0, ann.one: 0}
        assert spent[""] + sum(held.values()) <= limits[""]
        assert spent[ann.one] + sum(held[ann.one, each] for each in ("w1", "w2")) <= limits[ann.one]
    assert await verify(ann.store) == []


async def test_who_has_no_budget_has_all_the_room(ann: Ann) -> None:
    assert (await ann.run(room, ann.id, "")).tightest is None

    def count(connection: Connection) -> int:
        return connection.scalar(select(func.count()).where(events.c.name.startswith("budget."))) or 0

    await ann.charge(1, ann.one)
    assert await ann.run(count) == 0
