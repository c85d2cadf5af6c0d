"""What the fleet does by itself: only on the node that leads, and through failures."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec import structs

from gpuproxy import config
from gpuproxy.fleet.keeper import Keeper
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import rent
from gpuproxy.fleet.rentals import in_states
from gpuproxy.plugin import Offer, OfferQuery, ProviderInstance

from .conftest import Books, Clock, names, now, wish_for
from .market import Market

QUICK = config.Fleet(reconcile_s=0.01, poll_s=0.01, offers_s=0.01)


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


class Node:
    """A node that leads or does not, as the test says."""

    def __init__(self, fleet: Fleet) -> None:
        fleet.settings = QUICK
        self.is_leader = False
        self.asked_count = 0
        self.offers = Offers(fleet)
        self.keeper = Keeper(fleet, self.offers, self.leads)

    async def leads(self) -> bool:
        self.asked_count += 1
        return self.is_leader

    @asynccontextmanager
    async def running(self):  # type: ignore[no-untyped-def]
        stopping = asyncio.Event()
        task = asyncio.create_task(self.keeper.run(stopping))
        try:
            yield
        finally:
            stopping.set()
            await task
            await self.offers.close()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0.005)


async def test_only_the_node_that_leads_looks_after_rentals(fleet: Fleet, market: Market) -> None:
    node = Node(fleet)
    async with node.running():
        await until(lambda: node.asked_count > 10)
        assert market.asked == []
        node.is_leader = True
        await until(lambda: {"list", "offers"} <= set(market.asked))


class Dear(Market):
    """A market whose prices are so many times as high."""

    factor = 1

    async def offers(self, query: OfferQuery) -> list[Offer]:
        found = await super().offers(query)
        return [
            structs.replace(each, price_nanousd_per_hour=self.factor * each.price_nanousd_per_hour) for each in found
        ]


async def test_news_that_cannot_be_stored_are_told_at_the_next_look(
    fleet: Fleet, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dear = Dear(clock)
    fleet.providers = {"simulated": dear}
    offers = Offers(fleet)
    await offers.refresh_all()
    dear.factor = 2

    async def away(*_: object) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(fleet, "write", away)
        with pytest.raises(OSError, match="away"):
            await offers.refresh_all()
    assert "gpu.price_changed" not in await names(fleet)
    await offers.refresh_all()
    told = (await names(fleet)).count("gpu.price_changed")
    await offers.refresh_all()
    assert told == (await names(fleet)).count("gpu.price_changed") > 0


async def test_who_leads_again_tells_nothing_of_what_another_has_told(fleet: Fleet, clock: Clock) -> None:
    market = Dear(clock)
    fleet.providers = {"simulated": market}
    node = Node(fleet)

    async def looked() -> None:
        asked_count = market.asked.count("offers")
        await until(lambda: market.asked.count("offers") > asked_count + 2)

    node.is_leader = True
    async with node.running():
        await looked()
        node.is_leader, passed_count = False, node.asked_count
        await until(lambda: node.asked_count > passed_count + 20)
        market.factor = 2
        node.is_leader = True
        await looked()
        assert "gpu.price_changed" not in await names(fleet)
        market.factor = 3
        await looked()
        assert "gpu.price_changed" in await names(fleet)


async def test_a_rental_is_brought_to_run_without_anybody_asking(fleet: Fleet, books: Books, clock: Clock) -> None:
    await books.give(10)
    await rent(fleet, await wish_for(fleet, books.user_id))
    clock.advance(20)
    node = Node(fleet)
    node.is_leader = True
    async with node.running(), asyncio.timeout(10):
        while [each.state for each in await fleet.read(in_states)] != ["running"]:
            await asyncio.sleep(0.01)


class Hanging(Market):
    """A market that does not say how a machine is."""

    name = "hanging"

    async def get(self, id: str) -> ProviderInstance | None:
        self.asked.append("get")
        await asyncio.Event().wait()
        return None


async def test_a_provider_that_does_not_answer_holds_up_no_rental_of_another(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    hanging = Hanging(clock)
    fleet.providers = {"hanging": hanging, "simulated": market}
    await books.give(100)
    wish = await wish_for(fleet, books.user_id)
    await books.rental(provider="hanging", native_id="1", state="provisioning")
    node = Node(fleet)
    node.is_leader = True
    working = asyncio.create_task(node.keeper.run(asyncio.Event()))
    try:
        await until(lambda: "get" in hanging.asked)
        rental, _ = await rent(fleet, wish)
        clock.advance(20)
        async with asyncio.timeout(10):
            while (await now(fleet, rental)).state != "running":
                await asyncio.sleep(0.01)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await node.offers.close()


async def test_what_was_rented_for_an_hour_ends_after_it_though_no_provider_is_switched_on_any_more(
    fleet: Fleet, books: Books, clock: Clock
) -> None:
    await books.give(100)
    rental = await books.rental(native_id="1", state="running", expires_at=clock())
    fleet.providers = {}
    node = Node(fleet)
    node.is_leader = True
    async with node.running(), asyncio.timeout(10):
        while (await now(fleet, rental)).state != "destroying":
            await asyncio.sleep(0.01)


async def test_a_fault_of_an_adapter_ends_nothing(fleet: Fleet, market: Market) -> None:
    calls = 0
    keep = market.list

    async def broken() -> Sequence[ProviderInstance]:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RuntimeError("a fault of the adapter")
        return await keep()

    market.list = broken  # type: ignore[method-assign]
    node = Node(fleet)
    node.is_leader = True
    async with node.running():
        await until(lambda: "list" in market.asked)
    assert calls >= 3
