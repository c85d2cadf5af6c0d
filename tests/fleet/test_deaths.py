"""The gateway dies at every commit of every kind of life a rental can have, is started again, and nothing is amiss."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.charges import DAY, report
from gpuproxy.fleet.rent import Wish, rent, reserve_all
from gpuproxy.fleet.rentals import Rental, find
from gpuproxy.fleet.states import LIVING
from gpuproxy.plugin import OfferQuery
from gpuproxy.store.engine import Store

from .conftest import Clock
from .world import Died, World, opened

Life = Callable[[World], Awaitable[None]]


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def world(store: Store, clock: Clock) -> World:
    made = await opened(store, clock)
    made.spot = 0.0
    return made


async def wished(world: World, **more: object) -> Wish:
    """Return the wish for any offer; others take most of them for a while now and then."""
    while not (wish := await world.wish(user_id=world.users[0], **more)):
        world.clock.advance(600)
    return wish


async def now(world: World, rental: Rental) -> Rental:
    found: Rental | None = await world.fleet.read(find, rental.id)
    assert found is not None
    return found


async def pass_by(world: World, seconds: float) -> None:
    """Let time pass, and the keeper do what it does."""
    world.clock.advance(seconds)
    await world.reconciler.tend()
    await world.reconciler.cycle()


async def whole(world: World) -> None:
    """Rent, run, stop, start, destroy."""
    rental, _ = await rent(world.fleet, await wished(world))
    await pass_by(world, 20)
    world.clock.advance(60)
    rental = await care.stop(world.fleet, await now(world, rental))
    world.clock.advance(60)
    await care.start(world.fleet, rental)
    await pass_by(world, 20)
    rental = await now(world, rental)
    assert rental.state == "running"
    assert (await care.destroy(world.fleet, rental)).state == "destroyed"


async def in_doubt(world: World) -> None:
    """The answer to the create is lost, and those to stop and destroy."""
    world.market.faults = {"create": "lost_answer", "stop": "lost_answer", "destroy": "lost_answer"}
    rental, _ = await rent(world.fleet, await wished(world))
    await pass_by(world, 20)
    await care.stop(world.fleet, await now(world, rental))
    await pass_by(world, 20)
    await care.destroy(world.fleet, await now(world, rental))
    await pass_by(world, 5)
    assert (await now(world, rental)).state == "destroyed"


async def second_choice(world: World) -> None:
    """The offer is taken, and the next best is rented."""
    offers = await world.market.offers(OfferQuery())
    world.market.faults = {"create": "taken"}
    rental, _ = await rent(world.fleet, await wished(world, offer=offers[0], others=tuple(offers[1:3])))
    await pass_by(world, 20)
    assert (await care.destroy(world.fleet, await now(world, rental))).state == "destroyed"


async def reserved(world: World) -> None:
    """Two are reserved."""
    offers = await world.market.offers(OfferQuery())
    got, _ = await reserve_all(world.fleet, [await wished(world, offer=offer) for offer in offers[:2]])
    await pass_by(world, 20)
    for rental in got:
        await care.destroy(world.fleet, await now(world, rental))


async def not_all(world: World) -> None:
    """Of two that are reserved one cannot be had."""
    offers = await world.market.offers(OfferQuery())
    world.market.faults = {"create": "taken"}
    with pytest.raises(GatewayError):
        await reserve_all(world.fleet, [await wished(world, offer=offer) for offer in offers[:2]])


async def never_made(world: World) -> None:
    """The provider never does what it was asked."""
    world.market.faults = {"create": "never"}
    await rent(world.fleet, await wished(world))
    await pass_by(world, world.fleet.settings.pending_s)
    assert await world.rentals("pending") == []


async def made_late(world: World) -> None:
    """The machine comes up when its rental was given up."""
    world.market.faults = {"create": "late"}
    await rent(world.fleet, await wished(world))
    await pass_by(world, world.fleet.settings.pending_s)
    await pass_by(world, 900)
    await pass_by(world, 5)


async def doubled(world: World) -> None:
    """The provider makes two."""
    world.market.faults = {"create": "doubled"}
    rental, _ = await rent(world.fleet, await wished(world))
    await pass_by(world, 20)
    await care.destroy(world.fleet, await now(world, rental))


async def failing(world: World) -> None:
    """The machine never comes up."""
    rental, _ = await rent(world.fleet, await wished(world))
    world.market._all()[rental.native_id].will_fail = True
    await pass_by(world, 20)
    await pass_by(world, 5)
    assert (await now(world, rental)).state == "failed"


async def lost(world: World) -> None:
    """The machine is gone without anybody's doing."""
    rental, _ = await rent(world.fleet, await wished(world))
    await pass_by(world, 20)
    await world.market.vanish(rental.native_id)
    for _ in range(3):
        await pass_by(world, 60)
    assert (await now(world, rental)).state == "destroyed"


async def expiring(world: World) -> None:
    """The time it was rented for is over; then the day is compared."""
    rental, _ = await rent(world.fleet, await wished(world, duration_hours=1))
    await pass_by(world, 20)
    await pass_by(world, 3_600)
    await pass_by(world, 5)
    assert (await now(world, rental)).state == "destroyed"
    world.clock.advance(DAY.total_seconds())
    assert len(await report(world.fleet)) == 1


LIVES: list[Life] = [
    whole, in_doubt, second_choice, reserved, not_all, never_made, made_late, doubled, failing, lost, expiring
]  # fmt: skip


@pytest.mark.parametrize("life", [pytest.param(life, id=life.__name__) for life in LIVES])
async def test_a_death_at_any_commit_is_survived(world: World, life: Life) -> None:
    await world.start()
    await life(world)
    moments = world.fleet.moments
    assert moments > 3
    for dies_at in range(1, moments + 1):
        world.market.faults = {}
        await world.start(dies_at)
        with pytest.raises(Died):
            await life(world)
        world.market.faults = {}
        await world.calm()
        await world.check()
        for rental in await world.rentals(*LIVING):
            await care.destroy(world.fleet, rental)
    assert await world.market.there() == []
