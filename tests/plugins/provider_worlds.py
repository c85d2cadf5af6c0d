"""The worlds the provider contract is tried in: an adapter, the market it speaks to, and that market's clock."""

from gpuproxy_plugins.ionet import IoNet
from gpuproxy_plugins.simulated import Simulated
from gpuproxy_plugins.vast import Vast
from simulators.ionet import KEY as IONET_KEY
from simulators.ionet import IoNetSimulator
from simulators.vast import KEY as VAST_KEY
from simulators.vast import VastSimulator

from gpuproxy.plugin import InstanceSpec, OfferQuery, ProviderAdapter, ProviderInstance, ProviderSettings

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
        seen = await self.adapter.get(made.id)
        assert seen is not None
        assert seen.state == "running"
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


WORLDS: dict[str, type[World]] = {"ionet": IoNetWorld, "simulated": SimulatedWorld, "vast": VastWorld}
