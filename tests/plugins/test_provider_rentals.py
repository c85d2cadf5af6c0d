"""A rental's whole life at every provider, over its wire where it has one: rented, charged, stopped, destroyed."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from provider_worlds import WORLDS, World

from gpuproxy import config
from gpuproxy.access.accounts import create_user
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.charges import compare
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import Reconciler
from gpuproxy.fleet.rent import Wish, rent, wait_until_running
from gpuproxy.fleet.rentals import Rental, find
from gpuproxy.ledger.book import NANOUSD, credit
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, OfferQuery
from gpuproxy.store.engine import Store


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture(params=sorted(WORLDS))
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Bring up each world in turn."""
    made = WORLDS[request.param]()
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def fleet(world: World, store: Store) -> Fleet:
    """Rent in this world, on its clock."""
    made = Fleet(store, {world.adapter.name: world.adapter}, config.Fleet())
    made.now = lambda: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=world.clock.now_ns() // 1_000)

    async def sleep(seconds: float) -> None:
        world.clock.now_s += seconds

    made.sleep = sleep
    await made.open()
    return made


async def now(fleet: Fleet, rental: Rental) -> Rental:
    found: Rental | None = await fleet.read(find, rental.id)
    assert found is not None
    return found


async def test_a_rental_lives_and_ends_and_is_charged_for_what_it_ran(world: World, fleet: Fleet, store: Store) -> None:
    user = await create_user(store, "renter@example.com")
    await credit(store, user.id, 1_000 * NANOUSD, "gift")
    offer = (await world.adapter.offers(OfferQuery()))[0]
    began = fleet.now()
    spec = InstanceSpec(image="a/b", ports=(8000,), disk_gb=100)
    rental, _ = await rent(fleet, Wish(user_id=user.id, offer=offer, spec=spec, duration_hours=2))
    assert (rental.state, rental.instance_id) == ("provisioning", f"{world.adapter.id_prefix}-{rental.native_id}")
    rental = await wait_until_running(fleet, rental, 2 * world.boot_s)
    assert (rental.state, list(rental.ports)) == ("running", ["8000"])
    reconciler = Reconciler(fleet)
    for _ in range(10):
        world.clock.now_s += 60
        await reconciler.cycle()
    rental = await now(fleet, rental)
    assert rental.charged_nanousd == -(-rental.price_nanousd_per_hour * rental.running_us // 3_600_000_000)
    assert rental.running_us >= 600_000_000
    if world.has_stop:
        assert (await care.stop(fleet, rental)).state in ("stopping", "stopped")
        world.clock.now_s += 60
        await reconciler.tend()
        rental = await now(fleet, rental)
        assert rental.state == "stopped"
    else:
        with pytest.raises(GatewayError):
            await care.stop(fleet, rental)
        assert (await now(fleet, rental)).state == "running"
    rental = await care.destroy(fleet, await now(fleet, rental))
    world.clock.now_s += 120
    await reconciler.tend()
    rental = await now(fleet, rental)
    assert rental.state == "destroyed"
    assert [each for each in await world.adapter.list() if each.state != "gone"] == []
    if rental.basis == "prepaid":
        assert rental.charged_nanousd == 2 * rental.price_nanousd_per_hour
        assert rental.cost_posted_nanousd == 2 * rental.cost_nanousd_per_hour
    assert await verify(store) == []
    world.clock.now_s += 1
    assert (await compare(fleet, world.adapter.name, began, fleet.now())).rental_count == 1
