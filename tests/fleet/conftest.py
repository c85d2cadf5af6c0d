"""A customer with money, a rental, and a clock that goes when it is told to."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from gpuproxy_plugins.simulated import Simulated
from sqlalchemy import select

from gpuproxy import config
from gpuproxy.access.accounts import create_user
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import Reconciler
from gpuproxy.fleet.rent import Wish, rent, wait_until_running
from gpuproxy.fleet.rentals import Rental, add, find, new_id, prefix_of
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import NANOUSD, credit
from gpuproxy.plugin import InstanceSpec, OfferQuery
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import events

from .market import Market

T = TypeVar("T")
NOON = datetime(2026, 1, 12, 12, tzinfo=UTC)


class Clock:
    """The time, moved by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


class Books:
    """A store with one customer."""

    def __init__(self, store: Store, user_id: str, clock: Clock) -> None:
        self.store = store
        self.user_id = user_id
        self.clock = clock

    async def do(self, work: Callable[..., T], *words: Any, **more: Any) -> T:
        """Do `work` in a writing transaction."""
        async with self.store.writing() as connection:
            return await connection.run_sync(work, *words, **more)

    async def give(self, usd: float) -> None:
        await credit(self.store, self.user_id, int(usd * NANOUSD), f"gift {self.clock.now} {usd}")

    async def rental(self, **values: Any) -> Rental:
        """Store a rental that is pending, with its first hour held."""

        def work(connection: Any) -> Rental:
            rental_id = new_id(prefix_of(connection))
            price = values.get("price_nanousd_per_hour", NANOUSD)
            hold = holds.place(connection, self.user_id, price, f"rental:{rental_id}", f"rental:{rental_id}")
            now = self.clock()
            fields: dict[str, Any] = {
                "id": rental_id, "user_id": self.user_id, "provider": "simulated", "offer_id": "1", "state": "pending",
                "gpu_model": "RTX 4090", "gpu_count": 1, "spec": {}, "basis": "per_second", "hold_id": hold.id,
                "price_nanousd_per_hour": NANOUSD, "cost_nanousd_per_hour": NANOUSD // 2,
                "metered_at": now, "created_at": now, "moved_at": now,
            }  # fmt: skip
            rental = Rental(**{**fields, **values})
            assert add(connection, rental)
            return rental

        return await self.do(work)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def books(store: Store, clock: Clock) -> Books:
    user = await create_user(store, "renter@example.com")
    return Books(store, user.id, clock)


@pytest.fixture
def market(clock: Clock) -> Market:
    return Market(clock)


@pytest.fixture
async def fleet(books: Books, market: Market, clock: Clock) -> Fleet:
    return await fleet_over(books.store, market, clock)


class Rounds(Reconciler):
    """The work of the keeper, in turn."""

    async def cycle(self) -> None:
        """Do all of it once."""
        await super().cycle()
        await self.check_money()
        await self.tend()


async def fleet_over(store: Store, market: Market, clock: Clock) -> Fleet:
    """Return a fleet as a process has it after its start."""
    fleet = Fleet(store, {"simulated": market}, config.Fleet(), (config.Provider("simulated", markup_percent="20"),))
    fleet.now = clock

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    fleet.sleep = sleep
    await fleet.open()
    return fleet


async def wish_for(fleet: Fleet, user_id: str, **more: Any) -> Wish:
    """Return the wish for the cheapest offer."""
    offer = (await Simulated.offers(fleet.providers["simulated"], OfferQuery()))[0]  # type: ignore[arg-type]
    return Wish(**{"user_id": user_id, "offer": offer, "spec": InstanceSpec(image="x", ports=(8000,)), **more})


@pytest.fixture
async def running(fleet: Fleet, books: Books) -> Rental:
    await books.give(100)
    rental, _ = await rent(fleet, await wish_for(fleet, books.user_id))
    return await wait_until_running(fleet, rental, 60)


@pytest.fixture
def reconciler(fleet: Fleet) -> Rounds:
    return Rounds(fleet)


async def now(fleet: Fleet, rental: Rental) -> Rental:
    found: Rental | None = await fleet.read(find, rental.id)
    assert found is not None
    return found


async def names(fleet: Fleet) -> list[str]:
    def work(connection):  # type: ignore[no-untyped-def]
        return connection.scalars(select(events.c.name).order_by(events.c.seq)).all()

    return await fleet.read(work)


def price_of(rental: Rental, seconds: float) -> int:
    return -(-rental.price_nanousd_per_hour * round(seconds * 1_000_000) // 3_600_000_000)
