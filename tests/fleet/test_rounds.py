"""A round of looks, however many machines there are: as much as fits into it, the needy ones first, money on time."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gpuproxy.fleet import money
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import PROOFS_MIN, Reconciler
from gpuproxy.fleet.rent import rent, wait_until_running
from gpuproxy.fleet.rentals import Rental, change
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import NANOUSD
from gpuproxy.plugin import OfferQuery

from .conftest import Books, Clock, Rounds, now, price_of, wish_for
from .market import Market


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


async def rented(fleet: Fleet, books: Books, market: Market, clock: Clock, count: int) -> list[Rental]:
    """Have so many machines run."""
    await books.give(1_000)
    found = [
        (await rent(fleet, await wish_for(fleet, books.user_id, offer=offer)))[0]
        for offer in (await market.offers(OfferQuery()))[:count]
    ]
    clock.advance(10)
    await Rounds(fleet).tend()
    return found


async def test_a_cycle_asks_for_no_more_than_fits_into_it_and_for_the_longest_unseen_first(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    machines = await rented(fleet, books, market, clock, 2 * PROOFS_MIN)
    keep = market.get

    async def spaced(id: str) -> Any:
        clock.advance(10)
        return await keep(id)

    market.get = spaced  # type: ignore[method-assign]
    seen_before = clock.now
    for _ in range(4):
        market.faults["list"] = "empty"  # so all of them are news
        began = clock.now
        await reconciler.cycle()
        assert (clock.now - began).total_seconds() <= 2 * fleet.settings.reconcile_s
    after = [await now(fleet, each) for each in machines]
    assert all(each.seen_at > seen_before for each in after)  # type: ignore[operator]
    assert {each.state for each in after} == {"running"}


async def test_what_runs_is_proven_though_no_list_comes(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    clock.advance(60)
    market.faults["list"] = "down"
    await reconciler.cycle()
    assert (await now(fleet, running)).charged_nanousd == price_of(running, 60)


async def test_a_machine_whose_money_or_time_ends_is_proven_every_cycle(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    poor, brief, *_ = await rented(fleet, books, market, clock, 2 * PROOFS_MIN)
    await books.do(lambda connection: change(connection, poor, warned_s=900))
    await books.do(lambda connection: change(connection, brief, expires_at=clock.now + timedelta(seconds=400)))
    for _ in range(3):
        clock.advance(60)
        await Reconciler.cycle(reconciler)
        assert (await now(fleet, poor)).seen_at == clock.now
    for _ in range(3):
        clock.advance(60)
        await Reconciler.cycle(reconciler)
    assert (await now(fleet, brief)).seen_at == clock.now


async def test_money_waits_for_no_provider(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    wish = await wish_for(fleet, books.user_id)
    await books.give(-(-wish.offer.price_nanousd_per_hour * 6 // 5) / NANOUSD)
    rental, _ = await rent(fleet, wish)
    rental = await wait_until_running(fleet, rental, 60)
    market.get = market.list = market.destroy = unanswered  # type: ignore[assignment,method-assign]
    clock.advance(3_590)
    async with asyncio.timeout(5):
        await reconciler.check_money()
    assert (await now(fleet, rental)).state == "destroying"


async def test_a_rental_with_money_for_long_is_not_looked_at_and_its_hold_is_filled_in_time(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[float] = []
    keep = money.check

    def check(*words: Any) -> Rental:
        checked.append((clock.now - began).total_seconds())
        return keep(*words)

    monkeypatch.setattr(money, "check", check)
    began = clock.now
    for _ in range(90):
        clock.advance(60)
        await reconciler.cycle()
        rental = await now(fleet, running)
        hold = await fleet.read(holds.get, rental.hold_id)
        assert hold.remaining_nanousd * 3_600 >= 900 * rental.price_nanousd_per_hour  # type: ignore[union-attr]
        assert rental.warned_s == 0
    assert min(checked) > 3_600 - money.CALM_S - 120  # the first hour is held from the beginning
    assert len(checked) < 20


async def unanswered(*_: Any) -> Any:
    await asyncio.Event().wait()
