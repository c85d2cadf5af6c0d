"""What is amiss with providers is kept until it is over or somebody has seen it."""

from pathlib import Path

import pytest
from gpuproxy_plugins.vast import Vast
from msgspec import structs
from simulators.vast import KEY, VastSimulator

from gpuproxy import config
from gpuproxy.access.paging import Page
from gpuproxy.fleet import care, findings
from gpuproxy.fleet.charges import DAY, LAG, TOLERANCE_NANOUSD, report
from gpuproxy.fleet.findings import Finding, acknowledge
from gpuproxy.fleet.meter import owe_traffic
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import Wish, rent, wait_until_running
from gpuproxy.fleet.rentals import find
from gpuproxy.fleet.sight import miss
from gpuproxy.ledger.book import NANOUSD
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, OfferQuery, ProviderCharge, ProviderSettings

from .conftest import Books, Clock, Rounds, wish_for
from .market import Market


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
def reconciler(fleet: Fleet) -> Rounds:
    return Rounds(fleet)


async def found(fleet: Fleet, is_all: bool = False) -> list[Finding]:
    return await fleet.read(findings.page, Page(), "", "", is_all)


async def test_a_foreign_instance_is_noted_once_and_over_when_it_is_gone(
    fleet: Fleet, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    id = await market.stranger("theirs")
    for _ in range(3):
        clock.advance(60)
        await reconciler.cycle()
    [one] = await found(fleet)
    assert (one.kind, one.subject_id, one.detail["tag"]) == ("foreign", id, "theirs")
    await market.vanish(id)
    await reconciler.cycle()
    assert await found(fleet) == []
    [one] = await found(fleet, is_all=True)
    assert one.resolved_at == clock.now


async def test_a_stray_is_noted_until_it_is_destroyed(fleet: Fleet, reconciler: Rounds, market: Market) -> None:
    await market.stranger(f"{fleet.prefix}0000")
    await reconciler.cycle()
    assert [each.kind for each in await found(fleet)] == ["stray"]
    for _ in range(2):
        await reconciler.cycle()
    assert await found(fleet) == []


async def test_a_list_that_fails_is_noted_and_resolves_nothing(
    fleet: Fleet, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    await market.stranger()
    await reconciler.cycle()
    listed_at = clock.now
    clock.advance(60)
    market.faults["list"] = "down"
    await reconciler.cycle()
    look = (await fleet.read(findings.looks))["simulated"]
    assert (look.listed_at, look.looked_at, look.error) == (listed_at, clock.now, "simulated: no answer in time")
    assert len(await found(fleet)) == 1
    await reconciler.cycle()
    assert (await fleet.read(findings.looks))["simulated"].error == ""


async def test_what_is_acknowledged_stays_closed_while_it_lasts(
    fleet: Fleet, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    await market.stranger()
    await reconciler.cycle()
    [one] = await found(fleet)
    first = await fleet.write(acknowledge, one.id, clock.now)
    assert await fleet.write(acknowledge, one.id, clock.advance(9)) == first
    await reconciler.cycle()
    assert await found(fleet) == []
    assert await fleet.read(findings.open_counts) == {}


async def lived(fleet: Fleet, books: Books, clock: Clock, **more: object) -> str:
    """Rent, run for an hour, destroy; return the contract."""
    wish = await wish_for(fleet, books.user_id, spec=InstanceSpec(image="x", disk_gb=60), **more)
    rental, _ = await rent(fleet, wish)
    rental = await wait_until_running(fleet, rental, 60)
    clock.advance(3_600)
    await care.destroy(fleet, rental)
    return rental.id


async def test_a_rental_that_cost_other_than_counted_is_noted_once_a_day(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(100)
    right = await lived(fleet, books, clock)
    wrong = await lived(fleet, books, clock)
    rental = await fleet.read(find, wrong)
    assert rental is not None
    market._all()[rental.native_id].price_nanousd_per_hour *= 2
    clock.advance(LAG.total_seconds() + 1)
    [compared] = await report(fleet)
    assert (compared.rental_count, compared.is_off) == (2, True)
    [one] = await found(fleet)
    assert (one.kind, one.subject_id) == ("difference", wrong != right and wrong)
    assert one.detail["told_nanousd"] > one.detail["counted_nanousd"] > 0
    assert await report(fleet) == []
    clock.advance(DAY.total_seconds())
    [compared] = await report(fleet)
    assert compared.rental_count == 0


async def test_no_difference_is_noted_of_parts_of_a_cent_nor_of_a_providers_clock_that_is_behind(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(100)
    rental = await fleet.read(find, await lived(fleet, books, clock))
    assert rental is not None
    machine = market._all()[rental.native_id]
    machine.steps = [structs.replace(step, since_ns=step.since_ns - 1_800 * 10**9) for step in machine.steps]
    clock.advance(LAG.total_seconds() + 1)
    [compared] = await report(fleet)
    assert (compared.rental_count, compared.differing) == (1, ())
    assert abs(compared.told_nanousd - compared.counted_nanousd) <= TOLERANCE_NANOUSD


async def test_what_is_found_lost_after_a_comparison_is_in_the_next_one(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    rental = await wait_until_running(fleet, rental, 60)
    seen_at = clock.now
    clock.advance(DAY.total_seconds())
    await market.vanish(rental.native_id)  # it ran all the time, unseen
    [compared] = await report(fleet)
    assert compared.rental_count == 0
    for _ in range(2):
        await books.do(miss, rental.id, clock.advance(60))
    lost = await _now(fleet, rental.id)
    assert (lost.state, lost.ended_at, lost.charged_nanousd) == ("destroyed", seen_at, 0)
    clock.advance(DAY.total_seconds())
    [compared] = await report(fleet)
    assert [each.contract_id for each in compared.differing] == [rental.id]


async def test_traffic_is_booked_as_the_provider_tells_it_and_is_no_difference(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(100)
    id = await lived(fleet, books, clock)
    before = await _now(fleet, id)
    keep = market.charges

    async def charges(since_ns: int, until_ns: int) -> list[ProviderCharge]:
        told = list(await keep(since_ns, until_ns))
        return [*told, *(structs.replace(each, kind="traffic", amount_nanousd=NANOUSD) for each in told[:2])]

    market.charges = charges  # type: ignore[method-assign]
    clock.advance(LAG.total_seconds() + 1)
    [compared] = await report(fleet)
    assert (compared.differing, compared.traffic_nanousd) == ((), 2 * NANOUSD)
    after = await _now(fleet, id)
    assert after.cost_posted_nanousd == before.cost_posted_nanousd + 2 * NANOUSD
    assert after.charged_nanousd == before.charged_nanousd
    await books.do(owe_traffic, after, 2 * NANOUSD)  # as a second leader would
    assert await _now(fleet, id) == after
    assert await verify(books.store) == []


async def test_a_provider_that_does_not_tell_is_asked_again(fleet: Fleet, market: Market) -> None:
    market.faults = {"charges": "down"}
    assert await report(fleet) == []
    look = (await fleet.read(findings.looks))["simulated"]
    assert (look.compared_until, look.compare_error) == (None, "simulated: no answer in time")
    assert len(await report(fleet)) == 1


async def test_our_count_is_what_vast_ai_says_it_took(books: Books, clock: Clock) -> None:
    """Over HTTP, against its charges: loading is free there, the disk is charged from the first byte on."""
    simulator = VastSimulator(lambda: clock.now.timestamp())
    url = await simulator.start()
    settings = ProviderSettings(api_key=KEY, base_url=url, spacing_s=0.0)
    adapter = Vast(settings, lambda: clock.now.timestamp())
    fleet = Fleet(books.store, {"vast.ai": adapter}, config.Fleet(), (config.Provider("vast.ai"),))
    fleet.now = clock
    await fleet.open()
    try:
        await books.give(100)
        for spec in (InstanceSpec(image="x", disk_gb=10), InstanceSpec(image="x", disk_gb=200)):
            offer = (await adapter.offers(OfferQuery(limit=1)))[0]
            rental, _ = await rent(fleet, Wish(user_id=books.user_id, offer=offer, spec=spec))
            reconciler = Rounds(fleet)
            for seconds in (23, 1_800, 1_800):
                clock.advance(seconds)
                await reconciler.tend()
                await reconciler.cycle()
            stopped = await care.stop(fleet, await _now(fleet, rental.id))
            clock.advance(3)
            await reconciler.tend()
            clock.advance(7_200)
            await reconciler.cycle()
            await care.destroy(fleet, await _now(fleet, stopped.id))
        clock.advance(LAG.total_seconds() + 1)
        [compared] = await report(fleet)
        assert (compared.rental_count, compared.differing) == (2, ())
        assert compared.told_nanousd == pytest.approx(compared.counted_nanousd, rel=0.005)
        assert compared.counted_nanousd > 10**8
    finally:
        await fleet.close()
        await simulator.close()


async def _now(fleet: Fleet, id: str):  # type: ignore[no-untyped-def]
    return await fleet.read(find, id)
