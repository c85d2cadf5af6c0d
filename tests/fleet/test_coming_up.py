"""A machine has a bounded time to come up; one that is out of sight says so, and costs nothing meanwhile."""

from pathlib import Path
from typing import Any

import pytest

from gpuproxy.fleet import care
from gpuproxy.fleet.care import IN_FLIGHT_S
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import rent, reserve_all, wait_until_running
from gpuproxy.fleet.rentals import Rental, of_group
from gpuproxy.fleet.sight import BOOTS_AGAIN, OFF, SILENT, UNSEEN, UNSEEN_S, unreachable_counts, unseen_since
from gpuproxy.ledger.book import NANOUSD, balance
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import OfferQuery

from .conftest import Books, Clock, Rounds, names, now, price_of, wish_for
from .market import Market, unavailable


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


async def pass_by(reconciler: Rounds, clock: Clock, seconds: float, step_s: float = 60) -> None:
    """Let time pass, and the keeper do what it does."""
    for _ in range(round(seconds / step_s)):
        clock.advance(step_s)
        await reconciler.tend()
        await reconciler.cycle()


async def silent(*_: Any) -> Any:
    raise unavailable("read", False)


async def test_a_machine_that_boots_again_is_not_charged_as_one_that_runs_and_runs_again(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await pass_by(reconciler, clock, 60)
    market.shown[running.native_id] = "pending"
    await pass_by(reconciler, clock, 600)
    boots = await now(fleet, running)
    assert (boots.state, boots.reason, boots.running_us) == ("provisioning", BOOTS_AGAIN, 60_000_000)
    assert boots.stopped_us == 600_000_000
    assert "start" not in market.asked
    market.shown.clear()
    await pass_by(reconciler, clock, 120)
    again = await now(fleet, running)
    assert (again.state, again.reason) == ("running", "")
    assert again.running_us == 180_000_000 - 60_000_000  # from when it was seen to run again
    assert (await names(fleet)).count("instance.running") == 2


async def test_one_that_does_not_come_up_again_is_stopped_and_keeps_its_disk(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    market.shown[running.native_id] = "pending"
    await pass_by(reconciler, clock, fleet.settings.provision_s + 120)
    market.shown.clear()
    await pass_by(reconciler, clock, 60)
    stopped = await now(fleet, running)
    assert (stopped.state, stopped.reason) == ("stopped", "did not run again within 1800 s")
    assert [each.state for each in await market.there()] == ["stopped"]
    assert (await names(fleet))[-1] == "instance.stopped"


async def test_one_that_is_stopped_by_others_while_it_boots_again_is_stopped(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    market.shown[running.native_id] = "pending"
    await pass_by(reconciler, clock, 60)
    market.shown[running.native_id] = "stopped"
    await pass_by(reconciler, clock, 60)
    assert (await now(fleet, running)).state == "stopped"
    assert "start" not in market.asked


async def test_a_start_that_finds_no_gpu_may_be_taken_back_and_ends_stopped(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    for is_patient in (False, True):
        stopped = await care.stop(fleet, await now(fleet, running))
        market.shown[running.native_id] = "pending"
        waiting = await care.start(fleet, stopped)
        assert waiting.state == "provisioning"
        if is_patient:
            await pass_by(reconciler, clock, fleet.settings.provision_s + 60)
            market.shown.clear()
            await pass_by(reconciler, clock, 60)
        else:
            market.shown.clear()
            await care.stop(fleet, waiting)
        assert (await now(fleet, running)).state == "stopped"
        assert [each.state for each in await market.there()] == ["stopped"]


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_machine_that_never_comes_up_ends_in_time_and_gives_the_money_back(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market, is_silent: bool
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    market.shown[rental.native_id] = "pending"
    if is_silent:
        market.get = market.destroy = silent  # type: ignore[method-assign]
    await pass_by(reconciler, clock, fleet.settings.provision_s + 60)
    given_up = await now(fleet, rental)
    assert given_up.state == ("destroying" if is_silent else "failed")
    assert given_up.reason == "did not run within 1800 s"
    assert await balance(books.store, books.user_id) == 100 * NANOUSD  # although it may not be gone yet
    if is_silent:
        del market.get, market.destroy
        await pass_by(reconciler, clock, 60)
    ended = await now(fleet, rental)
    assert (ended.state, ended.charged_nanousd, await market.there()) == ("failed", 0, [])
    assert ended.cost_posted_nanousd > 0  # its storage, from the first byte on
    assert (await names(fleet))[-1] == "instance.failed"
    assert await verify(books.store) == []


async def test_money_is_given_back_for_a_machine_whose_provider_is_switched_off_before_it_runs(
    fleet: Fleet, books: Books, clock: Clock, market: Market
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    fleet.providers = {}
    await pass_by(Rounds(fleet), clock, fleet.settings.provision_s + 60)
    assert (await now(fleet, rental)).state == "destroying"
    assert await balance(books.store, books.user_id) == 100 * NANOUSD
    fleet.providers = {"simulated": market}
    await pass_by(Rounds(fleet), clock, 60)
    assert ((await now(fleet, rental)).state, await market.there()) == ("failed", [])


async def test_a_new_machine_that_its_provider_does_not_show_at_once_is_not_lost(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await books.give(100)

    async def none(id: str) -> None:
        return None

    market.get = none  # type: ignore[method-assign]
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    for _ in range(20):
        clock.advance(5)
        await reconciler.tend()
    assert (await now(fleet, rental)).state == "provisioning"
    del market.get
    await pass_by(reconciler, clock, 60)
    assert (await now(fleet, rental)).state == "running"


async def test_a_create_nobody_can_be_asked_about_is_given_up_in_time_with_its_reservation(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await books.give(100)
    offers = await market.offers(OfferQuery())
    market.faults = {"create": "lost_answer"}
    market.find = silent  # type: ignore[method-assign]
    rented, _ = await reserve_all(fleet, [await wish_for(fleet, books.user_id, offer=offer) for offer in offers[:2]])
    assert sorted(each.state for each in rented) == ["pending", "provisioning"]
    await pass_by(reconciler, clock, max(IN_FLIGHT_S, fleet.settings.provision_s) + 60)
    states = {each.state for each in await fleet.read(of_group, rented[0].group_id)}
    assert states == {"destroying", "destroyed"}
    await pass_by(reconciler, clock, 60)
    del market.find
    await pass_by(reconciler, clock, 60)
    assert {each.state for each in await fleet.read(of_group, rented[0].group_id)} == {"failed", "destroyed"}
    assert await market.there() == []
    assert await verify(books.store) == []


async def test_one_that_is_out_of_sight_says_so_and_is_told_once(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await pass_by(reconciler, clock, 60)
    seen_at = clock.now
    assert unseen_since(await now(fleet, running)) is None
    market.shown[running.native_id] = "lost"
    await pass_by(reconciler, clock, UNSEEN_S - 60)
    unseen = await now(fleet, running)
    assert (unseen_since(unseen), unseen.reason) == (seen_at, "")
    await pass_by(reconciler, clock, 6 * 3_600, 600)
    unseen = await now(fleet, running)
    assert (unseen.state, unseen_since(unseen), unseen.reason) == ("running", seen_at, UNSEEN)
    assert (await names(fleet)).count("instance.unreachable") == 1
    assert unseen.charged_nanousd == price_of(running, 60)
    market.shown.clear()
    await pass_by(reconciler, clock, 120)
    again = await now(fleet, running)
    assert (unseen_since(again), again.reason, again.charged_nanousd) == (None, "", price_of(running, 120))
    assert (await names(fleet))[-2:] == ["instance.unreachable", "instance.running"]


async def test_one_look_that_does_not_see_it_tells_nothing_however_late_it_comes(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await pass_by(reconciler, clock, 60)
    market.shown[running.native_id] = "lost"
    await pass_by(reconciler, clock, 2 * UNSEEN_S, 2 * UNSEEN_S)
    market.shown.clear()
    await pass_by(reconciler, clock, 60)
    assert "instance.unreachable" not in await names(fleet)


async def test_an_interrupted_machine_does_not_run_again_while_it_is_out_of_sight(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    market.shown[running.native_id] = "stopped"
    await pass_by(reconciler, clock, 60)
    market.shown[running.native_id] = "lost"
    await pass_by(reconciler, clock, 120)
    assert (await now(fleet, running)).state == "stopped"
    market.shown.clear()
    await pass_by(reconciler, clock, 60)
    assert (await now(fleet, running)).state == "running"


async def test_a_stopped_machine_that_is_out_of_sight_costs_nothing(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    stopped = await care.stop(fleet, running)
    market.shown[running.native_id] = "lost stopped"
    await pass_by(reconciler, clock, 600)
    market.shown.clear()
    await pass_by(reconciler, clock, 120)
    assert (await now(fleet, running)).stopped_us - stopped.stopped_us == 60_000_000


async def test_a_machine_is_not_taken_to_run_while_it_is_out_of_sight(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    market.shown[rental.native_id] = "lost"
    await pass_by(reconciler, clock, 60)
    assert (await now(fleet, rental)).state == "provisioning"


async def test_a_machine_is_charged_no_longer_than_it_was_rented_for(
    fleet: Fleet, books: Books, reconciler: Rounds, clock: Clock
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, duration_hours=1))
    rental = await wait_until_running(fleet, rental, 60)
    while clock.now < rental.expires_at:  # type: ignore[operator]
        clock.advance(70)
        await reconciler.cycle()
    ended = await now(fleet, rental)
    assert ended.state == "destroyed"
    assert ended.running_us == (rental.expires_at - rental.running_at).total_seconds() * 1e6  # type: ignore[operator]
    assert ended.cost_posted_nanousd > ended.cost_nanousd_per_hour * ended.running_us // 3_600_000_000


async def test_the_owner_is_told_when_a_provider_does_not_answer_about_a_machine(
    fleet: Fleet, running: Rental, reconciler: Rounds, clock: Clock, market: Market
) -> None:
    """One answer that fails is no news; the time is charged as soon as it is proven to have run."""
    market.get = silent  # type: ignore[method-assign]
    await pass_by(reconciler, clock, UNSEEN_S - 60)
    assert (await now(fleet, running)).reason == ""
    await pass_by(reconciler, clock, 180)
    told = await now(fleet, running)
    assert (told.state, told.reason, told.charged_nanousd) == ("running", SILENT, running.charged_nanousd)
    assert (await names(fleet)).count("instance.unreachable") == 1
    assert await fleet.read(unreachable_counts) == {"simulated": 1}
    del market.get
    await pass_by(reconciler, clock, 60)
    seen = await now(fleet, running)
    assert (seen.reason, seen.running_us - running.running_us) == ("", (UNSEEN_S + 180) * 1e6)
    assert (await names(fleet))[-2:] == ["instance.unreachable", "instance.running"]
    assert await fleet.read(unreachable_counts) == {}


async def test_the_owner_is_told_when_the_provider_of_a_machine_is_switched_off(
    fleet: Fleet, running: Rental, clock: Clock
) -> None:
    fleet.providers = {}
    reconciler = Rounds(fleet)
    await pass_by(reconciler, clock, UNSEEN_S + 60)
    assert (await now(fleet, running)).reason == OFF
