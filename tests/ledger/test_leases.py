"""Leases: exact limits and balances without a question for every call."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.credit_leases import EXPIRY_S
from gpuproxy.ledger.leases import Leases, journaled_epochs, node_id
from gpuproxy.ledger.peers import Peers
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.verify import verify
from gpuproxy.ledger.windows import Windows
from gpuproxy.link.messages import HeldCredit, Lease, LeaseKind, Recall, Return
from gpuproxy.link.wallet import Wallet
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import holds as table

Writing = AbstractAsyncContextManager[AsyncConnection]


class Site:
    """Leases of a node, and the workers it can reach."""

    def __init__(
        self, store: Store, node: str = "here", windows: Windows | None = None, peers: Peers | None = None
    ) -> None:
        self.limit = 10
        self.passes = 0
        self.workers: dict[str, Worker] = {}
        self.leases = Leases(store, node, self._limit_of, self._push, lambda: self.passes, windows, peers)

    async def ask(self, epoch: str, user_id: str, least: int, wanted: int = 0, kind: LeaseKind = "nanousd") -> int:
        return (await self.leases.grant(epoch, Lease(1, user_id, "", kind, least, wanted))).amount

    def give(self, epoch: str, user_id: str, amount: int, kind: LeaseKind = "nanousd") -> None:
        self.leases.take_back(epoch, Return(user_id, "", kind, amount, 1))

    async def _limit_of(self, user_id: str, key_id: str) -> int:
        return self.limit

    def _push(self, epoch: str, recall: Recall) -> bool:
        if epoch in self.workers:
            asyncio.get_running_loop().call_soon(self.workers[epoch].recalled, recall)
        return epoch in self.workers


class Worker:
    """A worker with one wallet of a user."""

    def __init__(self, site: Site, epoch: str, user_id: str, kind: LeaseKind = "nanousd") -> None:
        self.wallet = Wallet(self._ask, self._give)
        self._site, self._epoch, self._user_id, self._kind = site, epoch, user_id, kind
        self._ids = 0
        self._questions: deque[asyncio.Task[None]] = deque()
        site.workers[epoch] = self

    async def call(self, amount: int) -> bool:
        """Take an amount, wherever it comes from, and use all of it."""
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if not self.wallet.take(amount, self._site.leases.now_ns(), answered.set_result):
            return await answered == "taken"
        return True

    def recalled(self, recall: Recall) -> None:
        self.wallet.recall(self._site.leases.now_ns())
        self._site.leases.take_back(self._epoch, Return(self._user_id, "", self._kind, 0, 0, recall.id))

    def _ask(self, least: int, wanted: int) -> None:
        self._questions.append(asyncio.get_running_loop().create_task(self._question(least, wanted)))

    async def _question(self, least: int, wanted: int) -> None:
        self._ids += 1
        ask = Lease(self._ids, self._user_id, "", self._kind, least, wanted)
        leased = await self._site.leases.grant(self._epoch, ask)
        self.wallet.refill(leased.id, leased.amount, leased.until_ns, self._site.leases.now_ns())

    def _give(self, lease_id: int, amount: int) -> None:
        self._site.leases.take_back(self._epoch, Return(self._user_id, "", self._kind, amount, lease_id))


@pytest.fixture
def site(store: Store) -> Site:
    return Site(store)


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 800 nanodollars."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 800, "start")
    return made


async def held(store: Store, epoch: str) -> int:
    """Return what the ledger holds for a worker."""
    async with store.reading() as connection:
        return sum(
            hold.remaining_nanousd for hold in await connection.run_sync(holds.pending_of, lease_owner("here", epoch))
        )


@asynccontextmanager
async def committed_unheard(writing: Callable[[], Writing]) -> AsyncIterator[AsyncConnection]:
    """Write, but lose the answer to the commit."""
    async with writing() as connection:
        yield connection
    raise ConnectionResetError("the answer to COMMIT was lost")


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


@pytest.mark.parametrize("kind", ["nanousd", "requests"])
async def test_enough_for_ten_lets_exactly_ten_of_a_hundred_pass(
    store: Store, site: Site, user_id: str, kind: LeaseKind
) -> None:
    workers = [Worker(site, epoch, user_id, kind) for epoch in "abc"]
    amount = 80 if kind == "nanousd" else 1
    done = await asyncio.gather(*(workers[number % 3].call(amount) for number in range(100)))
    assert sum(done) == 10
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
    site.leases.credit.expiry_s = 0.3
    await site.ask("w", user_id, 700)
    ends_s = time.monotonic() + 3 * site.leases.credit.expiry_s
    while time.monotonic() < ends_s:
        await site.leases.sweep(["w"], [])
        await asyncio.sleep(0.02)
    assert await balance(store, user_id) == 100


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
