"""Renting: the intent first, once, whatever the provider's answer is."""

import asyncio
from datetime import timedelta

import pytest
from postgres import who_waits
from sqlalchemy import text
from structlog.testing import capture_logs

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.care import IN_FLIGHT_S
from gpuproxy.fleet.moves import begin_destroy
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import _forget_group, rent, reserve_all, wait_until_running
from gpuproxy.fleet.rentals import Rental, find, in_states, locked, of_group
from gpuproxy.ledger.book import NANOUSD, balance
from gpuproxy.ledger.history import use_pages
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, Offer, OfferQuery, ProviderInstance, RateLimited

from .conftest import Books, Clock, Rounds, wish_for
from .market import Market


async def now(fleet: Fleet, rental: Rental) -> Rental:
    found: Rental | None = await fleet.read(find, rental.id)
    assert found is not None
    return found


async def test_a_rental_holds_its_first_hour_and_runs(fleet: Fleet, books: Books, market: Market, clock: Clock) -> None:
    await books.give(10)
    wish = await wish_for(fleet, books.user_id)
    rental, is_new = await rent(fleet, wish)
    assert (is_new, rental.state) == (True, "provisioning")
    assert rental.price_nanousd_per_hour == -(-wish.offer.price_nanousd_per_hour * 6 // 5)
    assert await balance(books.store, books.user_id) == 10 * NANOUSD - rental.price_nanousd_per_hour
    rental = await wait_until_running(fleet, rental, 60)
    assert (rental.state, rental.ip, list(rental.ports)) == ("running", (await market.there())[0].ip, ["8000"])
    assert [instance.tag for instance in await market.there()] == [rental.id]


async def test_what_becomes_of_a_machine_is_logged_as_the_guide_prints_it(fleet: Fleet, books: Books) -> None:
    await books.give(10)
    with capture_logs() as lines:
        rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
        rental = await wait_until_running(fleet, rental, 60)
        await care.destroy(fleet, rental, "enough")
    told = {line["event"]: line for line in lines if line["event"].startswith("Instance ")}
    assert list(told) == ["Instance created", "Instance running", "Instance destroyed"]
    printed = {"user_id": books.user_id, "instance_id": rental.instance_id, "provider": "simulated"}
    assert told["Instance created"].items() >= {"log_level": "info", **printed}.items()
    assert told["Instance destroyed"]["reason"] == "enough"


async def test_the_use_of_a_rental_names_its_key(fleet: Fleet, books: Books) -> None:
    await books.give(10)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, key_id="k1"))
    rental = await wait_until_running(fleet, rental, 60)
    async with books.store.reading() as connection:
        shown = (await connection.execute(text("SELECT id, kind, key_id FROM gpu_usage"))).all()
    assert [tuple(row) for row in shown] == [(rental.id, "rental", "k1")]
    [[use]] = [page async for page in use_pages(books.store, books.user_id)]
    assert (use.id, use.key_id) == (rental.id, "k1")


async def test_what_was_paid_beforehand_and_given_up_before_it_ran_is_in_the_use(fleet: Fleet, books: Books) -> None:
    await books.give(10)
    rental = await books.rental(state="provisioning", native_id="1", basis="prepaid", committed_hours=1)
    await fleet.write(begin_destroy, rental, books.clock(), "asked")
    async with books.store.reading() as connection:
        [shown] = (await connection.execute(text("SELECT id, duration, cost_nanousd FROM gpu_usage"))).all()
    assert tuple(shown) == (rental.id, 0, NANOUSD)
    [[use]] = [page async for page in use_pages(books.store, books.user_id)]
    assert (use.id, use.start_time, use.cost_nanousd) == (rental.id, rental.created_at, NANOUSD)


async def test_who_has_not_the_first_hour_rents_nothing(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(0.01)
    with pytest.raises(GatewayError, match="not enough credit") as caught:
        await rent(fleet, await wish_for(fleet, books.user_id))
    assert caught.value.code == "INSUFFICIENT_CREDITS"
    assert "create" not in market.asked
    assert await fleet.read(in_states) == []


async def test_a_create_whose_answer_was_lost_is_found_and_not_made_again(
    fleet: Fleet, books: Books, market: Market
) -> None:
    await books.give(10)
    market.faults = {"create": "lost_answer"}
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    assert rental.state == "provisioning"
    assert market.asked.count("create") == 1
    assert len(await market.there()) == 1


async def test_a_create_in_doubt_stays_pending_until_it_shows(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(10)
    market.faults = {"create": "lost_answer"}
    market.chance, keep = 0.0, market.find
    market.find = nothing_found  # type: ignore[method-assign]
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    assert rental.state == "pending"
    market.find = keep  # type: ignore[method-assign]
    await Rounds(fleet).tend()
    assert (await now(fleet, rental)).state == "pending"  # its call may still be at it
    clock.advance(IN_FLIGHT_S)
    await Rounds(fleet).tend()
    assert (await now(fleet, rental)).native_id == (await market.there())[0].id
    assert market.asked.count("create") == 1


async def nothing_found(tag: str) -> list[object]:
    return []


async def test_a_create_that_never_was_fails_in_time_and_gives_the_money_back(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(10)
    market.faults = {"create": "never"}
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    clock.advance(fleet.settings.pending_s)
    await Rounds(fleet).tend()
    assert (await now(fleet, rental)).state == "failed"
    assert await balance(books.store, books.user_id) == 10 * NANOUSD


async def test_a_plain_no_gives_the_money_back_and_says_so(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(10)
    market.faults = {"create": "taken"}
    with pytest.raises(GatewayError) as caught:
        await rent(fleet, await wish_for(fleet, books.user_id))
    assert caught.value.code == "CAPACITY_GONE"
    assert await balance(books.store, books.user_id) == 10 * NANOUSD
    assert [each.state for each in await fleet.read(in_states, ("failed",))] == ["failed"]


async def test_the_next_best_offer_is_taken_if_the_caller_allows(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(100)
    shelves = Offers(fleet)
    choices = [(offer, await shelves.like(offer, 100 * NANOUSD)) for offer in await market.offers(OfferQuery())]
    offer, others = next(each for each in choices if each[1])
    market.faults = {"create": "taken"}
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, offer=offer, others=others))
    assert rental.offer_id == others[0].id != offer.id
    assert (rental.gpu_model, rental.gpu_count) == (offer.gpu_model, offer.gpu_count)
    assert [instance.tag for instance in await market.there()] == [rental.id]


async def test_a_repeated_request_gives_the_same_rental(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(10)
    wish = await wish_for(fleet, books.user_id, request_key="k", request_hash="a")
    answers = await asyncio.gather(*(rent(fleet, wish) for _ in range(5)))
    assert len({rental.id for rental, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1
    assert len(await market.there()) == 1
    other = await wish_for(fleet, books.user_id, request_key="k", request_hash="b")
    with pytest.raises(GatewayError, match="another request"):
        await rent(fleet, other)


async def test_nobody_rents_more_than_allowed_however_many_calls_there_are_at_once(
    fleet: Fleet, books: Books, market: Market
) -> None:
    await books.give(1_000)
    fleet.settings = config.Fleet(rentals_max=2)
    wishes = [await wish_for(fleet, books.user_id, offer=offer) for offer in (await market.offers(OfferQuery()))[:6]]
    results = await asyncio.gather(*(rent(fleet, wish) for wish in wishes), return_exceptions=True)
    refused = [each for each in results if isinstance(each, GatewayError)]
    assert (len(refused), {each.code for each in refused}) == (4, {"CONFLICT"})
    assert len(await market.there()) == 2
    assert await verify(books.store) == []


async def test_many_who_wait_ask_for_no_more_than_the_keeper_does(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    market.shown[rental.native_id] = "pending"
    for is_kept in (False, True):
        market.asked.clear()

        async def sleep(seconds: float) -> None:
            clock.advance(seconds)
            if is_kept:  # noqa: B023
                await Rounds(fleet).tend()

        fleet.sleep = sleep
        await wait_until_running(fleet, rental, 60)
        assert market.asked.count("get") == (60 if is_kept else 12)
    assert (await now(fleet, rental)).state == "provisioning"


async def test_who_must_wait_for_a_turn_at_the_provider_waits(
    fleet: Fleet, books: Books, market: Market, clock: Clock
) -> None:
    """Calls are spaced, and those whose turn comes too late are refused before anything is sent."""
    await books.give(1_000)
    turns, keep = [clock.now], market.create

    async def spaced(offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        turn = max(clock.now, turns[0])
        wait_s = (turn - clock.now).total_seconds()
        if wait_s > 30:
            raise RateLimited("simulated", "search", "calls are spaced", retry_after_s=wait_s)
        turns[0] = turn + timedelta(seconds=6)
        return await keep(offer_id, spec, tag)

    market.create = spaced  # type: ignore[method-assign]
    found = (await market.offers(OfferQuery()))[:12]
    rented, _ = await reserve_all(fleet, [await wish_for(fleet, books.user_id, offer=offer) for offer in found])
    assert {each.state for each in rented} == {"provisioning"}
    turns[0] = clock.now + timedelta(days=1)
    before = clock.now
    with pytest.raises(GatewayError, match="takes no more calls"):
        await rent(fleet, await wish_for(fleet, books.user_id))
    assert clock.now == before


@pytest.mark.parametrize("is_made", [False, True])
async def test_a_create_that_the_provider_limits_is_made_again_if_a_look_finds_nothing(
    fleet: Fleet, books: Books, market: Market, clock: Clock, is_made: bool
) -> None:
    """It is refused all the same if that takes too long, and its customer need not wait for what never comes."""
    await books.give(1_000)
    waits_s, keep = [4.5], market.create

    async def limited(offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        if not waits_s:
            return await keep(offer_id, spec, tag)
        if is_made:
            await keep(offer_id, spec, tag)
        raise RateLimited("simulated", "create", "too many", may_have_worked=True, retry_after_s=waits_s.pop())

    market.create = limited  # type: ignore[method-assign]
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    assert rental.state == "provisioning"
    assert [each.id for each in await market.there()] == [rental.native_id]
    waits_s, is_made = [3_600.0], False
    with pytest.raises(GatewayError, match="takes no more calls"):
        await rent(fleet, await wish_for(fleet, books.user_id))
    assert {each.id for each in await market.there()} == {rental.native_id}
    waits_s, market.faults["find"] = [4.5], "down"  # who cannot look does not know
    doubtful, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    assert doubtful.state == "pending"


async def test_a_reservation_gets_all_or_nothing(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(100)
    found = await market.offers(OfferQuery())
    wishes = [await wish_for(fleet, books.user_id, offer=offer) for offer in found[:3]]
    rented, is_new = await reserve_all(fleet, wishes)
    assert is_new
    assert len(await market.there()) == 3
    assert {each.id for each in await fleet.read(of_group, rented[0].group_id)} == {each.id for each in rented}
    left = [await wish_for(fleet, books.user_id, offer=offer) for offer in found[3:6]]
    market.faults = {"create": "taken"}
    with pytest.raises(GatewayError):
        await reserve_all(fleet, left)
    assert len(await market.there()) == 3
    assert await verify(books.store) == []


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_the_rentals_of_a_reservation_are_locked_in_one_order(fleet: Fleet, books: Books) -> None:
    await books.give(100)
    later, first = [await books.rental(id=id, group_id="g") for id in ("z", "a")]  # in the table the other way round
    async with books.store.writing() as connection:
        await connection.run_sync(locked, first.id)
        forgetting = asyncio.create_task(books.do(_forget_group, "g"))
        await who_waits(books.store)
        await connection.run_sync(locked, later.id)
    await forgetting


async def test_many_at_once_do_not_disturb_each_other(fleet: Fleet, books: Books, market: Market) -> None:
    await books.give(1_000)
    offers = (await market.offers(OfferQuery()))[:8]
    reconciler = Rounds(fleet)

    async def life(offer: Offer) -> None:
        rental, _ = await rent(fleet, await wish_for(fleet, books.user_id, offer=offer))
        rental = await wait_until_running(fleet, rental, 600)
        await asyncio.gather(care.destroy(fleet, rental), care.destroy(fleet, rental), reconciler.tend())

    await asyncio.gather(*(life(offer) for offer in offers), *(reconciler.cycle() for _ in range(6)))
    await reconciler.tend()
    assert await market.there() == []
    ended = await fleet.read(in_states, ("destroyed",))
    assert len(ended) == len(offers)
    assert all(each.written_off_nanousd == 0 for each in ended)
    assert await verify(books.store) == []
