"""The worlds the provider contract is tried in: an adapter, the market it speaks to, and that market's clock."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from gpuproxy_plugins.ionet import IoNet
from gpuproxy_plugins.simulated import Simulated
from gpuproxy_plugins.vast import Vast
from simulators.ionet import KEY as IONET_KEY
from simulators.ionet import IoNetSimulator
from simulators.vast import KEY as VAST_KEY
from simulators.vast import VastSimulator

from gpuproxy.plugin import (
    InstanceSpec,
    OfferQuery,
    ProviderAdapter,
    ProviderError,
    ProviderInstance,
    ProviderSettings,
    Unauthorized,
)

START_S = 1_790_000_000.0
HOUR_S = 3_600.0
TIMEOUT_S = 20.0  # only tests of a silent provider wait for it, and shorten it


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s

    def now_ns(self) -> int:
        return round(self.now_s * 1e9)


class World:
    """What every world has."""

    adapter: ProviderAdapter
    has_stop = True
    has_spot = True
    boot_s = 60.0  # after so long every instance runs

    def __init__(self) -> None:
        self.clock = Clock()

    async def start(self) -> None:
        """Bring the market up."""

    async def close(self) -> None:
        """Take it down."""
        await self.adapter.close()

    async def rented(self, tag: str = "gp-1", **fields: object) -> ProviderInstance:
        """Rent the cheapest offer."""
        offers = await self.adapter.offers(OfferQuery(limit=1))
        spec = InstanceSpec(**{"image": "vllm/vllm-openai:latest", "ports": (8000,), **fields})  # type: ignore[arg-type]
        return await self.adapter.create(offers[0].id, spec, tag)

    async def running(self, tag: str = "gp-1", **fields: object) -> ProviderInstance:
        """Rent and wait until it runs."""
        made = await self.rented(tag, **fields)
        self.clock.now_s += self.boot_s
        seen = await self.seen(made)
        assert seen.state == "running"
        return seen

    async def seen(self, made: ProviderInstance) -> ProviderInstance:
        """Return the instance as the provider shows it now."""
        seen = await self.adapter.get(made.id)
        assert seen is not None
        return seen


class SimulatedWorld(World):
    """The marketplace inside gpuproxy."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = Simulated(ProviderSettings(), self.clock.now_ns)


class VastWorld(World):
    """vast.ai, simulated over HTTP."""

    simulator: VastSimulator

    def __init__(self) -> None:
        super().__init__()
        self.simulator = VastSimulator(self.clock)

    async def start(self) -> None:
        url = await self.simulator.start()
        settings = ProviderSettings(api_key=VAST_KEY, base_url=url, spacing_s=0.0, timeout_s=TIMEOUT_S)
        self.adapter = Vast(settings, self.clock)

    async def close(self) -> None:
        await super().close()
        await self.simulator.close()


class IoNetWorld(World):
    """io.net, simulated over HTTP."""

    has_stop = False
    has_spot = False
    simulator: IoNetSimulator

    def __init__(self) -> None:
        super().__init__()
        self.simulator = IoNetSimulator(self.clock)

    async def start(self) -> None:
        url = await self.simulator.start()
        self.adapter = IoNet(ProviderSettings(api_key=IONET_KEY, base_url=url, spacing_s=0.0, timeout_s=TIMEOUT_S))

    async def close(self) -> None:
        await super().close()
        await self.simulator.close()


Ask = Callable[[Any, str, str], Awaitable[object]]  # of an adapter, with the ids of an offer and of an instance


async def failure(world: "VastWorld | IoNetWorld", operation: str, kind: str, ask: Ask) -> ProviderError:
    """Return what the adapter raises when one operation goes wrong in one way; it is asked once."""
    made = await world.running()
    (offer,) = await world.adapter.offers(OfferQuery(limit=1))
    world.simulator.faults.add(operation, kind)
    before = world.simulator.faults.count(operation)
    with pytest.raises(ProviderError) as raised:
        await ask(world.adapter, offer.id, made.id)
    assert world.simulator.faults.count(operation) == before + 1
    assert raised.value.provider == world.adapter.name
    assert str(raised.value).startswith(f"{world.adapter.name}: ")
    return raised.value


async def check_faults(
    make: type["VastWorld | IoNetWorld"],
    operation: str,
    ask: Ask,
    is_changing: bool,
    faults: Mapping[str, type[ProviderError]],
) -> None:
    """Try each fault in a world of its own: it is told for what it is, and what may have been done anyway is told."""
    for kind, expected in faults.items():
        world = make()
        await world.start()
        error = await failure(world, operation, kind, ask)
        await world.close()
        assert type(error) is expected, kind
        assert error.may_have_worked is (is_changing and expected is not Unauthorized), kind
        assert error.is_retryable is (expected is not Unauthorized), kind


WORLDS: dict[str, type[World]] = {"ionet": IoNetWorld, "simulated": SimulatedWorld, "vast": VastWorld}
