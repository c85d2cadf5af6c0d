"""A marketplace for tests: the simulated provider on the test's clock, with faults that come when they are asked for.

A fault is what really happens at marketplaces: an answer that is lost after the work was done, a create that is done
twice, a machine that vanishes, a list that is empty or out of date.
"""

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from gpuproxy_plugins.simulated import Simulated

from gpuproxy.fleet.rentals import microseconds
from gpuproxy.plugin import (
    CapacityGone,
    InstanceSpec,
    Offer,
    OfferQuery,
    Phase,
    ProviderCharge,
    ProviderInstance,
    ProviderSettings,
    ProviderUnavailable,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Market(Simulated):
    """The simulated provider, whose next call of a kind fails as its name in `faults` says.

    ``lost_answer``: the work is done, the answer does not come. ``down``: nothing is done. ``doubled``: done twice.
    ``empty``: the list has nothing in it. ``taken``: the offer is gone. ``forgotten``: an order is taken and not done.
    """

    def __init__(self, now: Callable[[], datetime], **options: str) -> None:
        super().__init__(
            ProviderSettings(options={"boot_s": "10", **options}), lambda: microseconds(EPOCH, now()) * 1_000
        )
        self.faults: dict[str, str] = {}
        self.chance = 0.0
        self.random = random.Random(1)
        self.asked: list[str] = []

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
        fault = self.fault("create", "lost_answer", "doubled", "down", "taken", "never")
        if fault == "down":
            raise unavailable("create", False)
        if fault == "never":
            raise unavailable("create", True)
        if fault == "taken":
            raise CapacityGone(self.name, "create", f"offer {offer_id} is taken; choose another")
        made = await super().create(offer_id, spec, tag)
        if fault == "doubled":
            other = next(offer for offer in await super().offers(OfferQuery()))
            await super().create(other.id, InstanceSpec(image=spec.image), tag)
        if fault == "lost_answer":
            raise unavailable("create", True)
        return made

    async def get(self, id: str) -> ProviderInstance | None:
        if self.fault("get", "down"):
            raise unavailable("read", False)
        return await super().get(id)

    async def list(self) -> Sequence[ProviderInstance]:
        fault = self.fault("list", "down", "empty", "partial")
        if fault == "down":
            raise unavailable("read", False)
        listed = await super().list()
        return {"empty": [], "partial": listed[::2]}.get(fault, listed)

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

    async def vanish(self, id: str) -> None:
        """Lose a machine without anybody's doing."""
        await super().destroy(id)

    async def stranger(self, tag: str = "somebody-else") -> str:
        """Rent a machine that is not ours."""
        offer = next(iter(await super().offers(OfferQuery())))
        return (await super().create(offer.id, InstanceSpec(image="x"), tag)).id

    async def there(self) -> Sequence[ProviderInstance]:
        """Return what is really there."""
        return await super().list()


def unavailable(phase: Phase, may_have_worked: bool) -> ProviderUnavailable:
    return ProviderUnavailable("simulated", phase, "no answer in time", may_have_worked=may_have_worked)
