"""Budgets bound rentals as they bound calls: what is charged and held in a window never exceeds one."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select

from gpuproxy.access.accounts import create_key
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care, purse
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import rent, reserve_all, wait_until_running
from gpuproxy.fleet.rentals import Rental, find, in_states
from gpuproxy.fleet.states import ENDED
from gpuproxy.ledger import budgets
from gpuproxy.ledger.budgets import Budget, budgets_of, room, set_budget
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import OfferQuery
from gpuproxy.store.schema import events

from .conftest import Books, Clock, Rounds, wish_for
from .market import Market

DAY_S = 86_400


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture(autouse=True)
def one_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let budgets' windows go by the test's clock."""
    for module in (budgets, purse):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.now.timestamp()))


@pytest.fixture
async def price(books: Books, fleet: Fleet) -> int:
    """Give the customer much money; return what the cheapest offer costs them an hour."""
    await books.give(1_000)
    offer = (await wish_for(fleet, books.user_id)).offer
    return -(-offer.price_nanousd_per_hour * 6 // 5)


async def limit(books: Books, nanousd: int, key_id: str = "", window_s: int = DAY_S) -> Budget:
    return await books.do(set_budget, books.user_id, key_id, window_s, nanousd, False)


async def now(fleet: Fleet, rental: Rental) -> Rental:
    found: Rental | None = await fleet.read(find, rental.id)
    assert found is not None
    return found


async def budget(books: Books) -> Budget:
    return (await books.do(budgets_of, books.user_id))[0]


async def told(fleet: Fleet) -> list[tuple[str, dict[str, Any]]]:
    def work(connection: Any) -> list[tuple[str, dict[str, Any]]]:
        shown = events.c.name.like("instance.%") | events.c.name.like("budget.%")
        rows = connection.execute(select(events.c.name, events.c.data).where(shown).order_by(events.c.seq))
        return [(row.name, row.data) for row in rows]

    return await fleet.read(work)


async def test_who_has_no_budget_for_the_first_hour_rents_nothing(
    fleet: Fleet, books: Books, market: Market, price: int
) -> None:
    await limit(books, price - 1)
    with pytest.raises(GatewayError, match="a budget of this account") as caught:
        await rent(fleet, await wish_for(fleet, books.user_id))
    assert (caught.value.code, caught.value.status) == ("BUDGET_EXCEEDED", 402)
    assert caught.value.retry_after_s == 12 * 3_600  # from noon to midnight
    assert "create" not in market.asked
    assert await fleet.read(in_states) == []
    assert [name for name, _ in await told(fleet)] == ["budget.exceeded"]
    await limit(books, price)
    await rent(fleet, await wish_for(fleet, books.user_id))


async def test_a_reservation_needs_budget_for_all(fleet: Fleet, books: Books, market: Market, price: int) -> None:
    await limit(books, price * 3 // 2)
    offers = (await market.offers(OfferQuery()))[:2]
    with pytest.raises(GatewayError, match="budget"):
        await reserve_all(fleet, [await wish_for(fleet, books.user_id, offer=offer) for offer in offers])
    assert await fleet.read(in_states) == []


async def test_what_a_rental_holds_is_no_room_for_calls(fleet: Fleet, books: Books, price: int) -> None:
    await limit(books, 3 * price)
    await rent(fleet, await wish_for(fleet, books.user_id))
    assert (await books.do(room, books.user_id, "")).nanousd == 2 * price


async def test_a_keys_budget_bounds_what_was_rented_with_it(fleet: Fleet, books: Books, price: int) -> None:
    _, key = await create_key(books.store, "renter@example.com")
    await limit(books, price, key.id)
    await rent(fleet, await wish_for(fleet, books.user_id, key_id=key.id))
    with pytest.raises(GatewayError, match="a budget of this key"):
        await rent(fleet, await wish_for(fleet, books.user_id, key_id=key.id))
    await rent(fleet, await wish_for(fleet, books.user_id))


async def test_a_budget_that_ends_warns_and_destroys_before_it_is_exceeded(
    fleet: Fleet, books: Books, clock: Clock, price: int, market: Market
) -> None:
    made = await limit(books, price * 3 // 2)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    rental = await wait_until_running(fleet, rental, 60)
    reconciler, began = Rounds(fleet), clock.now
    while (await now(fleet, rental)).state not in ENDED:
        clock.advance(60)
        await reconciler.cycle()
        assert (await budget(books)).spent(clock.now.timestamp()) <= made.limit_nanousd
    ended = await now(fleet, rental)
    assert (ended.reason, ended.written_off_nanousd, await market.there()) == ("a budget is used up", 0, [])
    assert 88 <= (clock.now - began).total_seconds() / 60 <= 90
    assert (await budget(books)).spent(clock.now.timestamp()) == ended.charged_nanousd
    names = [name for name, _ in await told(fleet)]
    assert names == [
        "instance.created", "instance.running", "budget.warning", "instance.warning", "instance.warning",
        "budget.exceeded", "instance.destroyed",
    ]  # fmt: skip
    warnings = [data for name, data in await told(fleet) if name == "instance.warning"]
    assert [data["budget_id"] for data in warnings] == [made.id, made.id]
    assert [data["seconds_left"] // 60 for data in warnings] == [14, 4]
    assert await verify(books.store) == []


async def test_a_window_that_ends_in_time_gives_new_budget(
    fleet: Fleet, books: Books, clock: Clock, price: int
) -> None:
    clock.now = datetime(2026, 1, 12, 23, tzinfo=UTC)
    await limit(books, price * 3 // 2)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    rental = await wait_until_running(fleet, rental, 60)
    reconciler = Rounds(fleet)
    for _ in range(120):
        clock.advance(60)
        await reconciler.cycle()
    assert (await now(fleet, rental)).state == "running"
    assert "instance.warning" not in [name for name, _ in await told(fleet)]


async def test_a_stopped_machine_is_started_only_with_budget(
    fleet: Fleet, books: Books, clock: Clock, price: int
) -> None:
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    rental = await wait_until_running(fleet, rental, 60)
    clock.advance(3_600)
    await care.stop(fleet, rental)
    await limit(books, 1)
    with pytest.raises(GatewayError) as caught:
        await care.start(fleet, await now(fleet, rental))
    assert caught.value.code == "BUDGET_EXCEEDED"
    assert (await now(fleet, rental)).state == "stopped"
