"""A market, customers, and a gateway that dies at any of its writes and is started again; and what must hold then."""

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import select

from gpuproxy import config
from gpuproxy.access.accounts import create_user
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care
from gpuproxy.fleet.care import IN_FLIGHT_S
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import Wish, rent, reserve_all
from gpuproxy.fleet.rentals import Rental, in_states
from gpuproxy.fleet.states import ENDED, LIVING
from gpuproxy.ledger.book import NANOUSD, credit
from gpuproxy.ledger.transfers import PROVIDER_COST, REVENUE
from gpuproxy.ledger.verify import verify
from gpuproxy.plugin import InstanceSpec, OfferQuery, ProviderError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts

from .conftest import Clock, Rounds
from .market import Market

T = TypeVar("T")
SEED = int(os.environ.get("GPUPROXY_FAULT_SEED", "1"))
RENTALS_AT_ONCE = 8
THERE = ("pending", "running", "stopped", "failed")


class Died(BaseException):
    """The process ends here: whatever it was about to do, it does not."""


class MortalFleet(Fleet):
    """A fleet whose process dies before or after any of its writes: at the one with the number, or by chance."""

    def __init__(self, store: Store, market: Market, clock: Clock) -> None:
        super().__init__(store, {"simulated": market}, config.Fleet(), (config.Provider("simulated"),))
        self.now = clock
        self.dies_at = 0
        self.chance = 0.0
        self.random = random.Random(SEED)
        self.moments = 0
        self.is_dead = False

    async def write(self, work: Callable[..., T], *words: Any, **more: Any) -> T:
        self._live_on()
        result = await super().write(work, *words, **more)
        self._live_on()
        return result

    def _live_on(self) -> None:
        self.moments += 1
        self.is_dead |= self.moments == self.dies_at or bool(self.chance and self.random.random() < self.chance)
        if self.is_dead:
            raise Died


class World:
    """A market, customers, and a gateway that is started again whenever it dies."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store, self.clock = store, clock
        self.market = Market(clock)
        self.random = random.Random(SEED)
        self.users: list[str] = []
        self.strangers: set[str] = set()
        self.vanished: set[str] = set()
        self.deaths = 0
        self.chance = 0.0
        self.spot = 0.2  # the share of those that others may bid away
        self.fleet: MortalFleet
        self.reconciler: Rounds

    async def start(self, dies_at: int = 0) -> None:
        self.fleet = MortalFleet(self.store, self.market, self.clock)
        self.fleet.sleep = self._sleep
        await self.fleet.open()
        self.fleet.dies_at, self.fleet.moments, self.fleet.chance = dies_at, 0, self.chance
        self.reconciler = Rounds(self.fleet)

    async def _sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def user(self, usd: int = 1_000_000) -> str:
        user = await create_user(self.store, f"{uuid4()}@example.com")
        await credit(self.store, user.id, usd * NANOUSD, f"gift {user.id}")
        self.users.append(user.id)
        return user.id

    async def rentals(self, *states: Any) -> list[Rental]:
        return await self.fleet.read(in_states, states or (*LIVING, *ENDED))

    async def wish(self, **more: Any) -> Wish | None:
        offers = await Market.__mro__[1].offers(self.market, OfferQuery(is_spot=self.random.random() < self.spot))
        if not offers:
            return None
        offer = self.random.choice(offers)
        bid = offer.price_nanousd_per_hour if offer.is_spot else None
        spec = InstanceSpec(image="x", ports=(8000,))
        fields = {"user_id": self.random.choice(self.users), "offer": offer, "spec": spec, "bid_nanousd_per_hour": bid}
        return Wish(**{**fields, **more})  # type: ignore[arg-type]

    # -- what customers, time and fate do ---------------------------------------------------------------

    async def rent(self) -> None:
        if len(await self.rentals(*LIVING)) < RENTALS_AT_ONCE and (wish := await self.wish()):
            await rent(self.fleet, wish)

    async def reserve(self) -> None:
        wishes = [await self.wish() for _ in range(2)]
        if len(await self.rentals(*LIVING)) < RENTALS_AT_ONCE and all(wishes):
            await reserve_all(self.fleet, [wish for wish in wishes if wish])

    async def destroy(self) -> None:
        if rental := await self._one_of(*LIVING):
            await care.destroy(self.fleet, rental)

    async def stop(self) -> None:
        if rental := await self._one_of("running"):
            await care.stop(self.fleet, rental)

    async def begin(self) -> None:
        if rental := await self._one_of("stopped"):
            await care.start(self.fleet, rental)

    async def tend(self) -> None:
        self.clock.advance(5)
        await self.reconciler.tend()

    async def cycle(self) -> None:
        self.clock.advance(60)
        await self.reconciler.cycle()

    async def both(self) -> None:
        """Let two nodes believe that they lead."""
        self.clock.advance(60)
        other = MortalFleet(self.store, self.market, self.clock)
        other.sleep = self._sleep
        await other.open()
        works = [self.reconciler.cycle(), self.reconciler.tend(), Rounds(other).cycle(), Rounds(other).tend()]
        for failure in await asyncio.gather(*works, return_exceptions=True):
            if failure is not None:
                raise failure

    async def wait(self) -> None:
        self.clock.advance(self.random.randrange(1, 900))

    async def vanish(self) -> None:
        if (rental := await self._one_of("running", "stopped")) and self.random.random() < 0.2:
            self.vanished.add(rental.id)
            await self.market.vanish(rental.native_id)

    async def stranger(self) -> None:
        if len(self.strangers) < 3 and await Market.__mro__[1].offers(self.market, OfferQuery()):
            self.strangers.add(await self.market.stranger(self.random.choice(("", "gpx00000000-1", "mine"))))

    async def restart(self) -> None:
        await self.start()

    async def _one_of(self, *states: Any) -> Rental | None:
        found = await self.rentals(*states)
        return self.random.choice(found) if found else None

    async def step(self, without: Sequence[Any] = ()) -> None:
        """Let something happen; if the gateway dies of it, start it again."""
        known = (
            [self.rent] * 4 + [self.reserve, self.destroy, self.stop, self.begin, self.vanish, self.stranger]
            + [self.restart, self.wait, self.both] + [self.tend, self.cycle] * 4
        )  # fmt: skip
        does = self.random.choice([each for each in known if each not in without])
        try:
            await does()
        except (GatewayError, ProviderError):
            pass
        except Died:
            self.deaths += 1
            await self.start()

    # -- what must hold ---------------------------------------------------------------------------------

    async def calm(self) -> None:
        """Let the provider be well and the gateway live; go through what is in doubt, then two cycles."""
        self.market.chance, self.chance = 0.0, 0.0
        await self.start()
        self.clock.advance(IN_FLIGHT_S + 900)
        await self.reconciler.tend()
        for _ in range(2):
            await self.cycle()

    async def check(self) -> None:
        """Check after a calm."""
        there = {instance.id: instance for instance in await self.market.there()}
        living = await self.rentals(*LIVING)
        ours = {rental.native_id for rental in living if rental.native_id}
        assert set(there) - ours == self.strangers, "an orphan, or a stranger's machine is gone"
        assert ours <= set(there), "something that is gone is believed to be there"
        assert len(ours) == len([rental for rental in living if rental.native_id]), "two rentals have one machine"
        tags = [instance.tag for instance in there.values() if instance.id not in self.strangers]
        assert len(tags) == len(set(tags)), "a rental has two machines"
        for rental in await self.rentals():
            self._check_money(rental)
        assert await verify(self.store) == []
        await self._check_sums()

    def _check_money(self, rental: Rental) -> None:
        exact = rental.price_nanousd_per_hour * rental.running_us
        exact += rental.storage_price_nanousd_per_hour * rental.stopped_us
        assert rental.charged_nanousd + rental.written_off_nanousd == -(-exact // 3_600_000_000)
        assert rental.written_off_nanousd == 0
        assert rental.running_us <= self.lived_us(rental), "charged for longer than it ran"
        assert rental.running_us + rental.stopped_us <= self.lived_us(rental, *THERE), "charged for longer than it was"

    def lived_us(self, rental: Rental, *states: Any) -> int:
        """Return how long a machine really was in these states: running if none is named."""
        machine = self.market._all().get(rental.native_id)
        if machine is None:
            return 0
        return machine._lasted_ns(states or ("running",), 0, self.market._now_ns()) // 1_000

    async def _check_sums(self) -> None:
        everything = await self.rentals()
        async with self.store.reading() as connection:
            query = select(accounts.c.id, accounts.c.posted_nanousd)
            posted = {row.id: row.posted_nanousd for row in await connection.execute(query)}
        assert posted.get(REVENUE, 0) == sum(rental.charged_nanousd for rental in everything)
        assert -posted.get(PROVIDER_COST, 0) == sum(rental.cost_posted_nanousd for rental in everything)


async def opened(store: Store, clock: Clock) -> World:
    """Return a world with three customers and a gateway that runs."""
    made = World(store, clock)
    for _ in range(3):
        await made.user()
    await made.start()
    return made
