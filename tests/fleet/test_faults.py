"""Providers that fail in every way and a gateway that dies at any moment: nothing is lost, doubled, or wrongly charged.

``GPUPROXY_FAULT_STEPS`` sets the number of steps of the seeded run (150 if left out), ``GPUPROXY_FAULT_SEED`` the seed.
"""

import os
from pathlib import Path

import pytest

from gpuproxy.fleet import care
from gpuproxy.store.engine import Store

from .conftest import Clock
from .world import World, opened

STEPS = int(os.environ.get("GPUPROXY_FAULT_STEPS", "150"))


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def world(store: Store, clock: Clock) -> World:
    return await opened(store, clock)


async def test_a_seeded_run_of_faults_loses_nothing(world: World) -> None:
    for step in range(STEPS):
        if step % 100 == 99:
            await world.calm()
            await world.check()
        world.market.chance, world.chance = 0.15, 0.005
        world.fleet.chance = world.chance
        await world.step()
    await world.calm()
    await world.check()
    rentals = await world.rentals()
    lived_s = sum(world.lived_us(rental) for rental in rentals) / 1e6
    charged_s = sum(rental.running_us for rental in rentals) / 1e6
    print(f"{STEPS} steps, {len(rentals)} rentals, {world.deaths} deaths, {len(world.vanished)} machines lost,"
          f" {charged_s:.1f} s charged of {lived_s:.1f} s run")  # fmt: skip


async def test_without_faults_every_second_lived_is_charged_and_no_other(world: World) -> None:
    world.spot = 0.0  # nobody tells when exactly one was bid away
    for _ in range(60):
        await world.step(without=(world.vanish, world.wait, world.restart))
    for rental in await world.rentals():
        await care.destroy(world.fleet, rental)
    ended = await world.rentals()
    assert sum(rental.running_us for rental in ended) > 10**9
    assert [rental.running_us for rental in ended] == [world.lived_us(rental) for rental in ended]
    await world.check()
