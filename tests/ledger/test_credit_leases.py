"""Leases of credit: never less held than workers have, and nothing that nobody has."""

import asyncio
import random
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from lessors import Site, committed_unheard, held
from postgres import who_waits
from sqlalchemy import select, update

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.credit_leases import EXPIRY_S
from gpuproxy.ledger.holds import place
from gpuproxy.ledger.settle import Payer, lease_owner, settle
from gpuproxy.ledger.transfers import credit_account, lock
from gpuproxy.ledger.verify import verify
from gpuproxy.link.messages import HeldCredit
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import holds as table


@pytest.fixture
def site(store: Store) -> Site:
    return Site(store)


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 800 nanodollars."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 800, "start")
    return made


async def test_a_lease_is_held_in_the_ledger(store: Store, site: Site, user_id: str) -> None:
    assert await site.ask("w", user_id, 10, 1_000) == 100
    assert await site.ask("w", user_id, 10) == 10
    assert await balance(store, user_id) == 690
    assert await held(store, "w") == 110
    assert await verify(store) == []


async def test_a_lease_shrinks_with_what_is_left_down_to_one_call(store: Store, site: Site, user_id: str) -> None:
    sizes = []
    while size := await site.ask("w", user_id, 7, 1_000):
        sizes.append(size)
    assert sizes[:2] == [100, 87]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 7
    assert await balance(store, user_id) == 800 - sum(sizes) < 7


async def test_what_comes_back_is_free_again(store: Store, site: Site, user_id: str) -> None:
    await site.ask("w", user_id, 800)
    site.give("w", user_id, 300)
    assert await site.ask("v", user_id, 250) == 250
    assert await balance(store, user_id) == 50
    site.give("w", user_id, 100)
    site.give("w", user_id, 10_000)
    await site.leases.flush()
    assert await balance(store, user_id) == 550
    assert await verify(store) == []


async def test_the_leases_of_a_dead_worker_are_given_back(store: Store, site: Site, user_id: str) -> None:
    for epoch in ("linked", "journaled", "dead"):
        await site.ask(epoch, user_id, 10)
    assert await site.leases.sweep(["linked"], ["journaled"]) == 0
    assert await site.leases.sweep(["linked"], ["journaled"]) == 1
    assert await balance(store, user_id) == 780
    assert await Site(store, "another").leases.sweep([], []) == 0
    assert await verify(store) == []


async def test_a_node_that_stops_gives_back_at_once_what_its_dead_workers_had(
    store: Store, site: Site, user_id: str
) -> None:
    for epoch in ("journaled", "dead"):
        await site.ask(epoch, user_id, 10)
    await site.ask("between", user_id, 10)
    looks = iter([{"journaled"}, {"journaled", "between"}, {"journaled", "between"}])
    assert await site.leases.close(lambda: next(looks)) == 1
    assert await balance(store, user_id) == 780
    assert await verify(store) == []


async def test_what_a_lost_node_had_is_free_after_its_time_and_not_before(
    store: Store, site: Site, user_id: str
) -> None:
    lost, other = Site(store, "lost"), site
    other.leases.credit.expiry_s = 0
    await lost.ask("w", user_id, 700)
    assert await other.ask("v", user_id, 200) == 0
    await other.leases.sweep(["v"], [])
    assert await balance(store, user_id) == 100
    async with store.writing() as connection:
        await connection.execute(update(table).values(expires_at=datetime.now(UTC)))
    await other.leases.sweep(["v"], [])
    assert await balance(store, user_id) == 800
    other.leases.credit.expiry_s = EXPIRY_S
    assert await other.ask("v", user_id, 700) == 700
    assert await verify(store) == []


async def test_a_node_that_lives_keeps_its_leases_for_longer_than_one_is_kept_without_it(
    store: Store, site: Site, user_id: str
) -> None:
    site.leases.credit.expiry_s = 1.5  # of which a sweep on a busy machine may take a good part
    await site.ask("w", user_id, 700)
    ends_s = time.monotonic() + 1.5 * site.leases.credit.expiry_s
    while time.monotonic() < ends_s:
        await site.leases.sweep(["w"], [])
        await asyncio.sleep(0.02)
    assert await balance(store, user_id) == 100


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_leases_that_somebody_changes_now_hold_up_no_renewal(store: Store, site: Site, user_id: str) -> None:
    await site.ask("w", user_id, 10)
    other = (await create_user(store, "bob@example.com")).id
    await credit(store, other, 800, "another start")
    await site.ask("w", other, 10)
    soon = datetime.now(UTC) + timedelta(seconds=600)
    async with store.writing() as connection:
        await connection.execute(update(table).values(expires_at=soon))
    async with store.writing() as connection:
        await connection.execute(
            update(table).where(table.c.account_id == credit_account(user_id)).values(posted_nanousd=0)
        )
        await site.leases.sweep(["w"], [])
        renewed = await connection.scalars(select(table.c.account_id).where(table.c.expires_at > soon))
        assert renewed.all() == [credit_account(other)]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_what_is_renewed_is_not_kept_locked_while_others_expire(store: Store, site: Site, user_id: str) -> None:
    await site.ask("w", user_id, 10)
    other = (await create_user(store, "bob@example.com")).id
    await credit(store, other, 800, "another start")
    async with store.writing() as connection:
        await connection.run_sync(place, other, 10, "key", "x", datetime.now(UTC))
    async with store.writing() as connection:
        await connection.run_sync(lock, [credit_account(other)])
        sweeping = asyncio.create_task(site.leases.sweep(["w"], []))
        await who_waits(store)
        await connection.execute(update(table).where(table.c.owner != "x").values(posted_nanousd=0))
    await sweeping


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_dead_workers_leases_are_given_back_without_a_circle(store: Store, site: Site) -> None:
    first, second = sorted([(await create_user(store, f"{name}@example.com")).id for name in ("ann", "bob")])
    for epoch, user_id in (("w1", second), ("w2", first)):
        await credit(store, user_id, 800, user_id)
        await site.ask(epoch, user_id, 10)
    await site.leases.sweep([], [])
    async with store.writing() as connection:
        await connection.run_sync(lock, [credit_account(first)])
        ending = asyncio.create_task(site.leases.sweep([], []))
        await who_waits(store)
        await connection.run_sync(lock, [credit_account(second)])
    assert await ending == 2
    assert await verify(store) == []


async def test_a_worker_that_was_missed_once_keeps_its_leases(store: Store, site: Site, user_id: str) -> None:
    await site.ask("w", user_id, 10)
    for linked in ([], ["w"], [], ["w"]):
        await site.leases.sweep(linked, [])
    assert await balance(store, user_id) == 790


async def test_an_idle_worker_keeps_nothing_once_its_receipts_are_settled(
    store: Store, site: Site, user_id: str
) -> None:
    await site.ask("w", user_id, 10)
    site.give("w", user_id, -1)
    site.passes = 1
    await site.leases.flush()
    assert await balance(store, user_id) == 790
    site.passes = 2
    await site.leases.flush()
    assert await balance(store, user_id) == 800
    await site.ask("w", user_id, 10)
    await site.leases.flush()
    assert await balance(store, user_id) == 790


async def test_a_worker_that_goes_on_is_not_idle(store: Store, site: Site, user_id: str) -> None:
    site.give("w", user_id, -1)
    await site.ask("w", user_id, 10)
    site.passes = 9
    await site.leases.flush()
    assert await balance(store, user_id) == 790


async def test_a_worker_that_asks_again_as_it_is_found_idle_keeps_what_it_gets(
    store: Store, site: Site, user_id: str
) -> None:
    await site.ask("w", user_id, 10)
    site.give("w", user_id, -1)
    site.passes = 2
    await asyncio.gather(site.ask("w", user_id, 10), site.leases.flush())
    assert await held(store, "w") in (10, 20)
    site.passes = 9
    await site.leases.flush()
    assert await held(store, "w") in (10, 20)


async def test_nothing_is_left_of_an_idle_worker_that_gave_back_at_the_same_time(
    store: Store, site: Site, user_id: str
) -> None:
    await site.ask("w", user_id, 10)
    site.give("w", user_id, -1)
    site.give("w", user_id, 3)
    site.passes = 2
    await site.leases.flush()
    assert await balance(store, user_id) == 800


@pytest.mark.parametrize("asks", [False, True])
async def test_what_came_back_is_freed_once_even_if_the_answer_to_the_commit_is_lost(
    store: Store, site: Site, user_id: str, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    await site.ask("w", user_id, 100)
    site.give("w", user_id, 30)
    with monkeypatch.context() as patched:
        patched.setattr(store, "writing", partial(committed_unheard, store.writing))
        with pytest.raises(ConnectionResetError):
            await (site.ask("v", user_id, 0) if asks else site.leases.flush())
    await site.leases.flush()
    assert await held(store, "w") == 70


async def test_a_new_control_frees_what_workers_no_longer_have(store: Store, site: Site, user_id: str) -> None:
    for epoch in ("w", "v", "silent"):
        await site.ask(epoch, user_id, 10)
    fresh = Site(store)
    fresh.leases.hold("w", HeldCredit((("someone", ""),), is_last=False))
    fresh.leases.hold("w", HeldCredit(((user_id, "k"),), is_first=False))
    fresh.leases.hold("v", HeldCredit(((user_id, ""),)))
    await fresh.leases.flush()
    assert await balance(store, user_id) == 770
    fresh.passes = 2
    await fresh.leases.flush()
    assert [await held(store, epoch) for epoch in ("w", "v", "silent")] == [0, 10, 10]


async def test_what_a_worker_asks_for_after_it_told_what_it_has_is_not_freed(
    store: Store, site: Site, user_id: str
) -> None:
    await site.ask("w", user_id, 10)
    fresh = Site(store)
    fresh.leases.hold("w", HeldCredit(()))
    await fresh.ask("w", user_id, 10)
    fresh.passes = 2
    await fresh.leases.flush()
    fresh.passes = 4
    await fresh.leases.flush()
    assert await held(store, "w") == 20


@pytest.mark.parametrize("seed", range(3))
async def test_no_less_is_held_than_workers_have_whatever_happens_at_once(
    store: Store, site: Site, user_id: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    site.passes = 1_000
    own = dict.fromkeys("abc", 0)
    charged = 0

    async def ask(epoch: str) -> None:
        with suppress(ConnectionResetError):
            own[epoch] += await site.ask(epoch, user_id, chance.randint(1, 60), 100)

    async def give(epoch: str) -> None:
        back = chance.randint(0, own[epoch])
        own[epoch] -= back
        site.give(epoch, user_id, back)
        if not own[epoch]:
            site.give(epoch, user_id, -1)

    async def spend(epoch: str) -> None:
        nonlocal charged
        cost = chance.randint(0, own[epoch])
        own[epoch] -= cost
        charged += cost
        async with store.writing() as connection:
            await connection.run_sync(settle, {Payer(lease_owner("here", epoch), user_id): cost} if cost else {})

    async def free(_epoch: str) -> None:
        site.passes += 2
        with suppress(ConnectionResetError):
            await site.leases.flush()

    for _ in range(15):
        with monkeypatch.context() as patched:
            if not chance.randrange(4):
                patched.setattr(store, "writing", partial(committed_unheard, store.writing))
            busy = {epoch: chance.choice([ask, give]) for epoch in own}  # a worker asks one question at a time
            await asyncio.gather(*(work(epoch) for epoch, work in busy.items()), free(""), free(""))
        await spend(chance.choice("abc"))
        for epoch, amount in own.items():
            assert await held(store, epoch) >= amount, epoch
        assert await verify(store) == []
    for epoch, amount in own.items():
        site.give(epoch, user_id, amount)
        site.give(epoch, user_id, -1)
    await free("")
    assert await balance(store, user_id) == 800 - charged
