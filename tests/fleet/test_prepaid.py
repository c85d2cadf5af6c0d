"""Hours paid beforehand, at the simulated io.net: the cost is committed at once, the customer has all of the time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpuproxy_plugins.ionet import IoNet
from simulators.ionet import BOOT_S, KEY, IoNetSimulator

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.care import IN_FLIGHT_S
from gpuproxy.fleet.charges import LAG, report
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import LOOKS_S, Wish, rent, reserve_all
from gpuproxy.fleet.rentals import Rental, find, in_states
from gpuproxy.ledger.book import NANOUSD, balance
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, OfferQuery, ProviderInstance, ProviderSettings

from .conftest import Books, Clock, Rounds


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def simulator(clock: Clock) -> AsyncIterator[IoNetSimulator]:
    made = IoNetSimulator(lambda: clock.now.timestamp())
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def fleet(books: Books, clock: Clock, simulator: IoNetSimulator) -> AsyncIterator[Fleet]:
    url = str(simulator.server.make_url("")).rstrip("/")
    adapter = IoNet(ProviderSettings(api_key=KEY, base_url=url, spacing_s=0.0))
    made = Fleet(books.store, {"io.net": adapter}, config.Fleet(), (config.Provider("io.net", markup_percent="20"),))
    made.now = clock
    await made.open()
    await books.give(100)
    yield made
    await made.close()


async def rented(fleet: Fleet, books: Books, hours: int | None) -> Rental:
    offer = (await fleet.providers["io.net"].offers(OfferQuery(limit=1)))[0]
    wish = Wish(user_id=books.user_id, offer=offer, spec=InstanceSpec(image="x"), duration_hours=hours)
    return (await rent(fleet, wish))[0]


async def pass_by(fleet: Fleet, clock: Clock, seconds: float) -> None:
    clock.advance(seconds)
    reconciler = Rounds(fleet)
    await reconciler.tend()
    await reconciler.cycle()


async def now(fleet: Fleet, rental: Rental) -> Rental:
    found: Rental | None = await fleet.read(find, rental.id)
    assert found is not None
    return found


@pytest.mark.parametrize("hours", [None, 3])
async def test_who_pays_beforehand_has_all_of_the_time_and_pays_for_no_more(
    fleet: Fleet, books: Books, clock: Clock, simulator: IoNetSimulator, hours: int | None
) -> None:
    rental = await rented(fleet, books, hours)
    paid = round((10_000 - simulator.credit) * NANOUSD)
    assert rental.cost_posted_nanousd == pytest.approx(paid, abs=3)
    whole = (hours or 1) * rental.price_nanousd_per_hour
    assert await balance(books.store, books.user_id) == 100 * NANOUSD - whole
    await pass_by(fleet, clock, BOOT_S + 10)
    seconds = (hours or 1) * 3_600
    for _ in range(seconds // 600 - 1):
        await pass_by(fleet, clock, 600)
        assert (await now(fleet, rental)).state == "running"
    before = await now(fleet, rental)
    assert before.charged_nanousd == -(-before.price_nanousd_per_hour * before.running_us // 3_600_000_000) < whole
    for _ in range(11):
        await pass_by(fleet, clock, 60)
    ended = await now(fleet, rental)
    assert (ended.state, ended.reason) == ("destroyed", "the time it was rented for is over")
    assert (ended.charged_nanousd, ended.written_off_nanousd) == (whole, 0)
    assert ended.cost_posted_nanousd == rental.cost_posted_nanousd
    assert await balance(books.store, books.user_id) == 100 * NANOUSD - whole
    clock.advance(LAG.total_seconds())
    [compared] = await report(fleet)
    assert (compared.rental_count, compared.is_off) == (1, False)
    assert await verify(books.store) == []


async def test_who_gives_up_early_has_paid_for_the_rest(fleet: Fleet, books: Books, clock: Clock) -> None:
    rental = await rented(fleet, books, 3)
    await pass_by(fleet, clock, BOOT_S + 10)
    await care.destroy(fleet, await now(fleet, rental))
    await pass_by(fleet, clock, 20)
    ended = await now(fleet, rental)
    assert (ended.state, ended.charged_nanousd) == ("destroyed", 3 * rental.price_nanousd_per_hour)


async def test_a_machine_that_fails_costs_only_what_it_ran(
    fleet: Fleet, books: Books, clock: Clock, simulator: IoNetSimulator
) -> None:
    rental = await rented(fleet, books, 3)
    simulator.lives[rental.native_id].is_broken = True
    await pass_by(fleet, clock, BOOT_S + 10)
    await pass_by(fleet, clock, 20)
    ended = await now(fleet, rental)
    assert (ended.state, ended.charged_nanousd) == ("failed", 0)
    assert ended.cost_posted_nanousd == rental.cost_posted_nanousd > 0
    assert await balance(books.store, books.user_id) == 100 * NANOUSD


async def test_who_gives_up_before_it_is_known_pays_nothing_and_the_provider_is_owed_all_the_same(
    fleet: Fleet, books: Books, clock: Clock, simulator: IoNetSimulator
) -> None:
    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    fleet.sleep = sleep
    simulator.faults.add("deploy", "drop_after")
    simulator.faults.add("list", "html_503", len(LOOKS_S) + 1)  # the looks of the call, and the one of the owner's end
    rental = await rented(fleet, books, 3)
    assert rental.state == "pending"
    clock.advance(IN_FLIGHT_S)
    await care.destroy(fleet, rental)
    await pass_by(fleet, clock, 20)
    await pass_by(fleet, clock, 20)
    ended = await now(fleet, rental)
    assert (ended.state, ended.charged_nanousd) == ("destroyed", 0)
    assert ended.cost_posted_nanousd == pytest.approx(round((10_000 - simulator.credit) * NANOUSD), abs=3) != 0
    assert await verify(books.store) == []


async def test_an_order_on_its_way_cannot_be_taken_back(
    fleet: Fleet, books: Books, clock: Clock, simulator: IoNetSimulator
) -> None:
    """Else whoever destroys while the provider is paid has hours for nothing, and the operator owes them."""

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    fleet.sleep = sleep
    simulator.faults.add("deploy", "html_503")
    rental = await rented(fleet, books, 3)
    with pytest.raises(GatewayError, match="is being ordered") as refused:
        await care.destroy(fleet, rental)
    assert (refused.value.code, (await now(fleet, rental)).state) == ("CONFLICT", "pending")
    clock.advance(IN_FLIGHT_S)
    assert (await care.destroy(fleet, rental)).state == "destroying"
    assert await balance(books.store, books.user_id) == 100 * NANOUSD


@pytest.mark.parametrize("operation", ["hardware", "deploy"])
async def test_a_reservation_that_is_not_had_whole_costs_its_customer_nothing(
    fleet: Fleet, books: Books, simulator: IoNetSimulator, operation: str
) -> None:
    offers = await fleet.providers["io.net"].offers(OfferQuery(limit=2))
    wishes = [
        Wish(user_id=books.user_id, offer=offer, spec=InstanceSpec(image="x"), duration_hours=3) for offer in offers
    ]
    first_is_made = asyncio.Event()

    async def second_fails(offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        if offer_id == offers[1].id:
            await first_is_made.wait()
            simulator.faults.add(operation, "auth_403")
            return await create(offer_id, spec, tag)
        made = await create(offer_id, spec, tag)
        first_is_made.set()
        return made

    adapter = fleet.providers["io.net"]
    create, adapter.create = adapter.create, second_fails  # type: ignore[method-assign]
    with pytest.raises(GatewayError):
        await reserve_all(fleet, wishes)
    rows = await fleet.read(in_states, ("destroying", "destroyed", "failed"))
    assert [row.charged_nanousd for row in rows] == [0, 0]
    assert sorted(row.cost_posted_nanousd > 0 for row in rows) == [False, True]
    assert await balance(books.store, books.user_id) == 100 * NANOUSD
    assert await verify(books.store) == []
