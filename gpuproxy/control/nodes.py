"""What ties this control process to those of other machines: words, who leads, what is counted together."""

import asyncio

from gpuproxy.ledger.peers import Peers
from gpuproxy.ledger.shared_windows import SharedWindows
from gpuproxy.ledger.windows import LocalWindows, Windows
from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import Store
from gpuproxy.store.leader import Leader
from gpuproxy.store.redis import Redis


class Nodes:
    """The parts; `run` keeps them going. Without a `redis_url` this node counts alone; `node` is its name."""

    def __init__(self, store: Store, redis_url: str = "", node: str = "") -> None:
        self.bus = Bus(store)
        self.leader = Leader(store)
        self.peers = Peers(self.bus, node)
        self.redis = Redis(redis_url) if redis_url else None
        self.windows: Windows = SharedWindows(self.redis, node) if self.redis is not None else LocalWindows()

    async def start(self) -> None:
        """Make this node known, before it hands out anything."""
        if self.redis is not None:
            await self.redis.probe()

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, through outages."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bus.run(stopping))
            group.create_task(self.leader.run(stopping))
            if self.redis is not None:
                group.create_task(self.redis.run(stopping))

    def redis_health(self) -> str:
        """Tell how Redis was half a second ago."""
        if self.redis is None:
            return "not_configured"
        return "healthy" if self.redis.is_up else "unhealthy"
