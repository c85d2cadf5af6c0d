"""Leases: exact limits and balances without a question for every call."""

import asyncio
from pathlib import Path

import pytest
from lessors import Site, Worker

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.leases import journaled_epochs, node_id
from gpuproxy.ledger.verify import verify
from gpuproxy.link.messages import Lease, LeaseKind, Return
from gpuproxy.store.engine import Store


@pytest.fixture
def site(store: Store) -> Site:
    return Site(store)


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 800 nanodollars."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 800, "start")
    return made


async def test_before_a_call_is_refused_the_others_give_back(store: Store, site: Site, user_id: str) -> None:
    first, second = Worker(site, "a", user_id), Worker(site, "b", user_id)
    assert await first.call(10)
    site.leases.take_back("a", Return(user_id, "", "nanousd", 0))
    assert await site.ask("a", user_id, 790) == 790
    first.wallet.refill(0, 790, 0, 0)
    assert await second.call(790)
    assert not await second.call(1)
    assert (first.wallet.rest, first.wallet.reserved) == (0, 10)


async def test_a_worker_that_does_not_answer_a_recall_is_not_waited_for_long(site: Site, user_id: str) -> None:
    await site.ask("silent", user_id, 800)
    site.workers["silent"] = Worker(site, "silent", user_id)
    site.workers["silent"].recalled = lambda recall: None  # type: ignore[method-assign]
    assert await site.ask("w", user_id, 1) == 0


async def test_a_control_that_has_just_started_refuses_nobody_before_all_are_linked(store: Store, user_id: str) -> None:
    assert await Site(store).ask("holder", user_id, 800) == 800
    site = Site(store, grace_s=0.2)  # which knows of the holder by the ledger alone
    asking = asyncio.create_task(Worker(site, "asker", user_id).call(500))
    await asyncio.sleep(0.05)
    holder = Worker(site, "holder", user_id)
    holder.wallet._put(0, 800, 1 << 62)
    assert await asking
    assert (holder.wallet.rest, await verify(store)) == (0, [])


@pytest.mark.parametrize("kind", ["nanousd", "requests"])
async def test_enough_for_ten_lets_exactly_ten_of_a_hundred_pass(
    store: Store, site: Site, user_id: str, kind: LeaseKind
) -> None:
    workers = [Worker(site, epoch, user_id, kind) for epoch in "abc"]
    amount = 80 if kind == "nanousd" else 1
    done = await asyncio.gather(*(workers[number % 3].call(amount) for number in range(100)))
    assert sum(done) == 10
    assert await verify(store) == []


async def test_a_limit_of_nothing_is_no_limit(site: Site) -> None:
    site.limit = 0
    assert await site.ask("w", "u", 1, 10**6, "requests") == 10**6


async def test_an_answer_about_requests_tells_the_limit(site: Site) -> None:
    now_ns = site.leases.now_ns()
    site.leases.now_ns = lambda: now_ns
    leased = await site.leases.grant("w", Lease(5, "u", "", "requests", 1, 2))
    assert (leased.id, leased.amount, leased.limit, leased.remaining) == (5, 2, 10, 8)
    assert leased.until_ns == now_ns + 10**9
    assert leased.reset_ns == now_ns + 61 * 10**9


async def test_a_key_of_its_own_limit_does_not_touch_its_users(site: Site) -> None:
    await site.leases.grant("w", Lease(1, "u", "k", "requests", 10, 10))
    assert await site.ask("w", "u", 10, 10, "requests") == 10
    assert (await site.leases.grant("w", Lease(2, "u", "k", "requests", 1, 1))).amount == 0


def test_a_data_directory_keeps_its_name(tmp_path: Path) -> None:
    name = node_id(tmp_path / "data")
    assert len(name) == 32
    assert node_id(tmp_path / "data") == name != node_id(tmp_path / "other")


def test_workers_are_known_by_their_segments(tmp_path: Path) -> None:
    for name in ("000-1-22-000001.log", "000-1-22-000002.new", "001-1-23-000001.log", "002-1-24-000001.damaged"):
        (tmp_path / name).touch()
    assert journaled_epochs(tmp_path) == {"000-1-22", "001-1-23"}
    assert journaled_epochs(tmp_path / "nowhere") == set()
