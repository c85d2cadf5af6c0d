"""Our rows against the provider's list: nothing is lost, nothing of others touched, nothing believed without proof."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.charges import compare
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import PROOFS_MIN
from gpuproxy.fleet.rent import rent, wait_until_running
from gpuproxy.fleet.rentals import Rental
from gpuproxy.fleet.states import ENDED
from gpuproxy.ledger.book import NANOUSD, balance
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, OfferQuery
from gpuproxy.store.schema import events

from .conftest import Books, Clock, Rounds, names, now, price_of, wish_for
from .market import Market


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: what moves does not depend on the kind, which the meter's tests try both of."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


async def warnings(fleet: Fleet) -> list[Any]:
    def work(connection):  # type: ignore[no-untyped-def]
        chosen = events.c.name == "instance.warning"
        return connection.scalars(select(events.c.data).where(chosen).order_by(events.c.seq)).all()

    return await fleet.read(work)


async def test_what_runs_is_charged_every_cycle(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock
) -> None:
    for minutes in range(1, 4):
        clock.advance(60)
        await reconciler.cycle()
        assert (await now(fleet, running)).charged_nanousd == price_of(running, 60 * minutes)


@pytest.mark.parametrize("fault", ["empty", "down"])
async def test_a_list_that_shows_nothing_ends_nothing(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market, fault: str
) -> None:
    for _ in range(5):
        clock.advance(60)
        market.faults["list"] = fault
        await reconciler.cycle()
    assert (await now(fleet, running)).state == "running"


async def test_nobody_pays_on_the_word_of_a_list(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    clock.advance(60)
    await reconciler.cycle()
    await market.vanish(running.native_id)
    for _ in range(3):
        clock.advance(60)
        market.faults["list"] = "frozen"
        await reconciler.cycle()
    assert (await now(fleet, running)).charged_nanousd == price_of(running, 60)


async def test_time_between_two_proofs_is_charged_only_if_it_ran_at_both(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    for states in (("running", "pending", "running"), ("running", "lost", "running")):
        before = (await now(fleet, running)).running_us
        for state in states:
            clock.advance(60)
            market.shown[running.native_id] = state
            await reconciler.cycle()
        assert (await now(fleet, running)).running_us - before == 60_000_000
    clock.advance(60)
    await reconciler.cycle()
    assert (await now(fleet, running)).running_us == 180_000_000


async def test_of_many_machines_each_is_proven_in_turn(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await books.give(1_000)
    rented = []
    for offer in (await market.offers(OfferQuery()))[: PROOFS_MIN + 5]:
        rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, offer=offer))
        rented.append(rental)
    clock.advance(10)
    await reconciler.tend()
    for _ in range(2):
        market.asked.clear()
        clock.advance(60)
        await reconciler.cycle()
        assert market.asked.count("get") == PROOFS_MIN
    assert {(await now(fleet, each)).running_us for each in rented} == {60_000_000, 120_000_000}


async def test_a_lost_machine_is_closed_and_billed_to_when_it_was_seen(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    clock.advance(60)
    await reconciler.cycle()
    clock.advance(20)
    await market.vanish(running.native_id)
    for _ in range(2):
        clock.advance(60)
        await reconciler.cycle()
    lost = await now(fleet, running)
    assert (lost.state, lost.reason) == ("destroyed", "lost: the provider has it no more")
    assert lost.charged_nanousd == price_of(running, 60)
    assert (await names(fleet))[-1] == "instance.destroyed"


async def test_a_doubled_create_leaves_one_machine(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market
) -> None:
    await books.give(10)
    market.faults = {"create": "doubled"}
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    assert len(await market.there()) == 2
    await reconciler.cycle()
    assert [instance.id for instance in await market.there()] == [rental.native_id]


async def test_a_machine_that_comes_up_after_its_rental_failed_is_destroyed(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    await books.give(10)
    market.faults = {"create": "never"}
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    clock.advance(fleet.settings.pending_s)
    await reconciler.tend()
    await market.stranger(rental.id)
    await reconciler.cycle()
    assert await market.there() == []


async def test_a_machine_with_our_tag_and_no_row_is_destroyed_when_seen_again(
    fleet: Fleet, reconciler: Rounds, market: Market
) -> None:
    await market.stranger(f"{fleet.prefix}0000")
    await reconciler.cycle()
    assert len(await market.there()) == 1
    await reconciler.cycle()
    assert await market.there() == []


@pytest.mark.parametrize("tag", ["", "somebody-else", "gpxffffffff-0000"])
async def test_what_is_not_ours_is_never_touched(fleet: Fleet, reconciler: Rounds, market: Market, tag: str) -> None:
    id = await market.stranger(tag)
    for _ in range(4):
        await reconciler.cycle()
    assert [instance.id for instance in await market.there()] == [id]
    assert "destroy" not in market.asked


@pytest.mark.parametrize("fault", ["down", "lost_answer", "forgotten"])
async def test_a_destroy_lasts_until_the_machine_is_gone(
    fleet: Fleet, running: Rental, reconciler: Rounds, market: Market, clock: Clock, fault: str
) -> None:
    clock.advance(30)
    market.faults = {"destroy": fault}
    rental = await care.destroy(fleet, running)
    assert rental.state == "destroying"
    clock.advance(5)
    await reconciler.tend()
    ended = await now(fleet, running)
    assert (ended.state, await market.there()) == ("destroyed", [])
    assert ended.charged_nanousd == price_of(running, 30)
    assert await care.destroy(fleet, ended) == ended


async def test_stopped_costs_storage_and_started_runs_again(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock
) -> None:
    clock.advance(60)
    stopped = await care.stop(fleet, running)
    assert (stopped.state, stopped.charged_nanousd) == ("stopped", price_of(running, 60))
    assert await care.stop(fleet, stopped) == stopped
    clock.advance(600)
    await reconciler.cycle()
    stopped = await now(fleet, running)
    storage_us = running.storage_price_nanousd_per_hour * 600_000_000
    exact = running.price_nanousd_per_hour * 60_000_000 + storage_us
    assert stopped.charged_nanousd == -(-exact // 3_600_000_000)
    again = await care.start(fleet, stopped)
    assert again.state == "provisioning"
    clock.advance(15)
    await reconciler.tend()
    assert (await now(fleet, running)).state == "running"


async def test_a_stopped_machine_that_runs_is_stopped_again_and_costs_us_what_it_did(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    clock.advance(60)
    stopped = await care.stop(fleet, running)
    await market.start(running.native_id)  # by whoever may, at the provider's console
    clock.advance(70)
    await reconciler.cycle()
    again = await now(fleet, running)
    assert again.state == "stopped"
    assert again.running_us == stopped.running_us
    assert (await market.get(running.native_id)).state == "stopped"  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["down", "lost_answer", "forgotten"])
async def test_a_stop_is_repeated_until_it_is_seen(
    fleet: Fleet, running: Rental, reconciler: Rounds, market: Market, clock: Clock, fault: str
) -> None:
    market.faults = {"stop": fault}
    assert (await care.stop(fleet, running)).state == "stopping"
    clock.advance(5)
    await reconciler.tend()
    assert (await now(fleet, running)).state == "stopped"


async def test_who_runs_out_of_money_is_warned_and_then_destroyed(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    wish = await wish_for(fleet, books.user_id)
    price = -(-wish.offer.price_nanousd_per_hour * 6 // 5)
    await books.give(price * 1.5 / NANOUSD)
    rental, _ = await rent(fleet, wish)
    rental = await wait_until_running(fleet, rental, 60)
    began = clock.now
    while (await now(fleet, rental)).state not in ENDED:
        clock.advance(60)
        await reconciler.cycle()
    assert [each["seconds_left"] // 60 for each in await warnings(fleet)] == [14, 4]
    ended = await now(fleet, rental)
    assert ended.written_off_nanousd == 0
    assert 88 <= (clock.now - began).total_seconds() / 60 <= 90
    assert ended.reason == "the account's credit is used up"
    assert await market.there() == []
    assert await balance(books.store, books.user_id) >= 0
    assert await verify(books.store) == []


async def test_what_was_rented_for_an_hour_ends_after_it(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, duration_hours=1))
    await wait_until_running(fleet, rental, 60)
    clock.advance(3_600)
    await reconciler.cycle()
    assert (await now(fleet, rental)).state == "destroyed"


async def test_a_machine_that_fails_is_destroyed_and_costs_nothing(books: Books, clock: Clock) -> None:
    from .conftest import fleet_over

    market = Market(clock, failures="1")
    fleet = await fleet_over(books.store, market, clock)
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    clock.advance(20)
    await Rounds(fleet).tend()
    ended = await now(fleet, rental)
    assert (ended.state, ended.charged_nanousd, await market.there()) == ("failed", 0, [])
    assert await balance(books.store, books.user_id) == 100 * NANOUSD


async def test_a_machine_that_is_outbid_stops_and_is_told(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    await books.give(100)
    offer = (await market.offers(OfferQuery(is_spot=True)))[0]
    bid = -(-offer.price_nanousd_per_hour * 6 // 5)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, offer=offer, bid_nanousd_per_hour=bid))
    rental = await wait_until_running(fleet, rental, 60)
    for _ in range(300):
        clock.advance(60)
        await reconciler.cycle()
        if (await now(fleet, rental)).state != "running":
            break
    outbid = await now(fleet, rental)
    assert (outbid.state, outbid.reason) == ("stopped", "interrupted by the provider")
    assert (await names(fleet))[-1] == "instance.stopped"
    with pytest.raises(GatewayError, match="outbid"):
        await care.start(fleet, outbid)
    assert (await now(fleet, rental)).state == "stopped"


async def test_our_count_is_compared_with_the_providers_charges(
    fleet: Fleet, books: Books, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    since = clock.now
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, spec=InstanceSpec(image="x", disk_gb=60)))
    await market.stranger()
    for _ in range(60):
        clock.advance(60)
        await reconciler.tend()
        await reconciler.cycle()
    await care.destroy(fleet, rental)
    clock.advance(1)
    found = await compare(fleet, "simulated", since, clock.now)
    assert (found.rental_count, found.is_off, found.differing) == (1, False, ())
    assert found.unknown_nanousd > 0


async def test_another_price_of_the_provider_is_noted_and_the_customers_stays(
    fleet: Fleet, running: Rental, reconciler: Rounds, market: Market, clock: Clock
) -> None:
    market._all()[running.native_id].price_nanousd_per_hour += 1_000_000
    clock.advance(60)
    await reconciler.cycle()
    after = await now(fleet, running)
    assert after.cost_nanousd_per_hour == running.cost_nanousd_per_hour + 1_000_000
    assert after.cost_rate_nanousd_per_hour == after.cost_nanousd_per_hour
    assert after.price_nanousd_per_hour == running.price_nanousd_per_hour
