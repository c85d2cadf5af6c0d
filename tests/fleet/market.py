"""A marketplace for tests: the simulated provider on the test's clock, with faults that come when they are asked for.

A fault is what really happens at marketplaces: an answer that is lost after the work was done, a create that is done
twice, a machine that vanishes, a list that is empty or out of date.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from gpuproxy_plugins.simulated import Simulated
from msgspec import structs

from gpuproxy.fleet.rentals import microseconds
from gpuproxy.plugin import (
    CapacityGone,
    InstanceSpec,
    Offer,
    OfferQuery,
    Phase,
    ProviderCharge,
    ProviderError,
    ProviderInstance,
    ProviderSettings,
    ProviderUnavailable,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Market(Simulated):
    """The simulated provider, whose next call of a kind fails as its name in `faults` says.

    ``lost_answer``: the work is done, the answer does not come. ``down``: nothing is done. ``doubled``: done twice.
    ``empty``, ``partial``, ``stale``, ``lying``: the list has nothing in it, one half, is that of before, tells wrong
    states; ``frozen``: it stays that of before. ``taken``: the offer is gone. ``forgotten``: an order is taken and not
    done. ``never``, ``late``: no answer, and nothing is done, or a quarter of an hour later. `shown` has the states in
    which machines are shown when they are asked for; after "lost" they are out of sight.
    """

    def __init__(self, now: Callable[[], datetime], **options: str) -> None:
        super().__init__(
            ProviderSettings(options={"boot_s": "10", **options}), lambda: microseconds(EPOCH, now()) * 1_000
        )
        self.faults: dict[str, str] = {}
        self.chance = 0.0
        self.random = random.Random(1)
        self.asked: list[str] = []
        self._now = now
        self._late: list[tuple[datetime, str, InstanceSpec, str]] = []
        self.shown: dict[str, str] = {}
        self._before: Sequence[ProviderInstance] = []

    def fault(self, phase: str, *known: str) -> str:
        """Take the fault that the next call of this kind has, if any."""
        self.asked.append(phase)
        if self.chance and self.random.random() < self.chance:
            return self.random.choice(known)
        return self.faults.pop(phase, "")

    async def offers(self, query: OfferQuery) -> Sequence[Offer]:
        if self.fault("offers", "down"):
            raise unavailable("search", False)
        return await super().offers(query)

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        fault = self.fault("create", "lost_answer", "doubled", "down", "taken", "never", "late")
        if fault == "down":
            raise unavailable("create", False)
        if fault == "late":
            self._late.append((self._now() + timedelta(seconds=900), offer_id, spec, tag))
        if fault in ("never", "late"):
            raise unavailable("create", True)
        if fault == "taken":
            raise CapacityGone(self.name, "create", f"offer {offer_id} is taken; choose another")
        made = await super().create(offer_id, spec, tag)
        if fault == "doubled":
            others = await super().offers(OfferQuery())
            if others:
                await super().create(others[0].id, InstanceSpec(image=spec.image), tag)
        if fault == "lost_answer":
            raise unavailable("create", True)
        return made

    async def get(self, id: str) -> ProviderInstance | None:
        if self.fault("get", "down"):
            raise unavailable("read", False)
        found = await super().get(id)
        if found is None or id not in self.shown:
            return found
        shown = self.shown[id]
        state = shown.removeprefix("lost").strip() or "running"
        return structs.replace(found, state=state, is_reachable=not shown.startswith("lost"))

    async def list(self) -> Sequence[ProviderInstance]:
        fault = self.fault("list", "down", "empty", "partial", "stale", "lying")
        if fault == "down":
            raise unavailable("read", False)
        await self._deliver()
        listed = await super().list()
        lying = [structs.replace(each, state=self.random.choice(("running", "stopped", "failed"))) for each in listed]
        stale, self._before = self._before, listed
        if fault == "frozen":
            self._before = stale
        told = {"empty": [], "partial": listed[::2], "stale": stale, "frozen": stale, "lying": lying}
        return told.get(fault, listed)

    async def find(self, tag: str) -> Sequence[ProviderInstance]:
        fault = self.fault("find", "down", "empty")
        if fault == "down":
            raise unavailable("read", False)
        return [] if fault == "empty" else await super().find(tag)

    async def start(self, id: str) -> None:
        fault = self.fault("start", "down", "forgotten")
        if fault == "down":
            raise unavailable("start", True)
        if not fault:
            await super().start(id)

    async def stop(self, id: str) -> None:
        fault = self.fault("stop", "lost_answer", "down", "forgotten")
        if fault == "down":
            raise unavailable("stop", True)
        if fault != "forgotten":
            await super().stop(id)
        if fault == "lost_answer":
            raise unavailable("stop", True)

    async def destroy(self, id: str) -> None:
        fault = self.fault("destroy", "lost_answer", "down", "forgotten")
        if fault == "down":
            raise unavailable("destroy", True)
        if fault != "forgotten":
            await super().destroy(id)
        if fault == "lost_answer":
            raise unavailable("destroy", True)

    async def charges(self, since_ns: int, until_ns: int) -> Sequence[ProviderCharge]:
        if self.fault("charges", "down"):
            raise unavailable("charges", False)
        return await super().charges(since_ns, until_ns)

    async def _deliver(self) -> None:
        """Do the creates that are late by now."""
        due = [each for each in self._late if each[0] <= self._now()]
        self._late = [each for each in self._late if each not in due]
        for _, offer_id, spec, tag in due:
            with suppress(ProviderError):
                await super().create(offer_id, spec, tag)

    async def vanish(self, id: str) -> None:
        """Lose a machine without anybody's doing."""
        await super().destroy(id)

    async def stranger(self, tag: str = "somebody-else") -> str:
        """Rent a machine that is not ours."""
        offer = next(iter(await super().offers(OfferQuery())))
        return (await super().create(offer.id, InstanceSpec(image="x"), tag)).id

    async def there(self) -> Sequence[ProviderInstance]:
        """Return what is really there."""
        await self._deliver()
        return await super().list()


def unavailable(phase: Phase, may_have_worked: bool) -> ProviderUnavailable:
    return ProviderUnavailable("simulated", phase, "no answer in time", may_have_worked=may_have_worked)
