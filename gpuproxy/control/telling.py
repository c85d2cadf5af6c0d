"""Events that no single act causes: sums of what calls used, credit that has become low. The leader looks for them."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial

from gpuproxy.config import Config
from gpuproxy.events import usage
from gpuproxy.ledger.book import parse_usd
from gpuproxy.ledger.low_credit import find_low, tell_low
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds

TURN_S_MAX = 1.0
LOW_S = 15.0  # between two looks at all accounts
FORGET_S = 60.0

logger = get_logger(__name__)


class Teller:
    """Runs until told to stop, through outages of the store. ``leads()`` tells whether this node leads."""

    def __init__(self, store: Store, config: Config, leads: Callable[[], Awaitable[bool]]) -> None:
        self._store = store
        self._leads = leads
        self._usage_s = config.events.usage_s
        self._low_nanousd = parse_usd(config.credit.low_usd or "0", 0)

    async def tell_usage(self) -> int:
        """Tell the sums that are old enough; return how many."""
        now = datetime.now(UTC)
        before, count = now - timedelta(seconds=self._usage_s), 0
        is_any_due = await usage.is_any_due(self._store, before)
        while is_any_due:
            async with self._store.writing() as connection:
                told = await connection.run_sync(usage.tell_due, before, now)
            count, is_any_due = count + told, told == usage.TELL_MAX
        return count

    async def tell_low(self) -> int:
        """Tell whose credit has become low; return how many."""
        async with self._store.reading() as connection:
            found = await connection.run_sync(find_low, self._low_nanousd)
        if not found:
            return 0
        async with self._store.writing() as connection:
            return await connection.run_sync(tell_low, found, self._low_nanousd)

    async def forget(self) -> None:
        """Sum up no more what nobody wants to hear."""
        async with self._store.writing() as connection:
            await connection.run_sync(usage.forget_unwanted, datetime.now(UTC))

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set."""
        works = ((min(TURN_S_MAX, self._usage_s), self.tell_usage), (LOW_S, self.tell_low), (FORGET_S, self.forget))
        async with asyncio.TaskGroup() as group:
            for period_s, work in works:
                group.create_task(self._every(period_s, work, stopping))

    async def _every(self, period_s: float, work: Callable[[], Awaitable[object]], stopping: asyncio.Event) -> None:
        async def lead() -> None:
            if await self._leads():
                await work()

        complain = partial(logger.error, "not told, will go on", work=work.__name__)
        await rounds(lead, period_s, stopping, complain)
