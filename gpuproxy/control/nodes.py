"""What ties this control process to those of other machines: words, the question who leads."""

import asyncio

from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import Store
from gpuproxy.store.leader import Leader


class Nodes:
    """The parts; `run` keeps them going."""

    def __init__(self, store: Store) -> None:
        self.bus = Bus(store)
        self.leader = Leader(store)

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, through outages."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bus.run(stopping))
            group.create_task(self.leader.run(stopping))
