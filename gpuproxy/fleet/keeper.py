"""What the fleet does by itself while control runs: reconcile and watch the money, see to what is under way.

Also without a provider: there may be rentals from before it was switched off.

Of several nodes the one that leads does it. Every step is a conditional write, so two leaders for a moment do no harm.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic

from gpuproxy.fleet import charges
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import Reconciler
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.rounds import pause, rounds

HOUR_S = 3_600.0  # each provider is compared once a day; a keeper that is started anew must not put it off

logger = get_logger(__name__)


class Keeper:
    """Runs until told to stop, through outages of store and providers. ``leads()`` tells whether this node leads."""

    def __init__(self, fleet: Fleet, offers: Offers, leads: Callable[[], Awaitable[bool]]) -> None:
        self._fleet = fleet
        self._offers = offers
        self._leads = leads
        self._reconciler = Reconciler(fleet)

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set."""
        settings = self._fleet.settings
        async with asyncio.TaskGroup() as group:
            group.create_task(self._every(settings.reconcile_s, stopping, self._reconciler.cycle))
            group.create_task(self._every(settings.reconcile_s / 2, stopping, self._reconciler.check_money))
            for name in self._fleet.providers:  # each by itself: one that does not answer takes its time with each call
                group.create_task(self._every(settings.poll_s, stopping, self._reconciler.tend, name))
            group.create_task(self._every(settings.offers_s, stopping, self._offers.refresh_all))
            group.create_task(self._every(HOUR_S, stopping, self._compare, first_s=HOUR_S / 60))

    async def _compare(self) -> None:
        await charges.report(self._fleet)

    async def _every(
        self,
        period_s: float,
        stopping: asyncio.Event,
        work: Callable[..., Awaitable[None]],
        *words: str,
        first_s: float = 0.0,
    ) -> None:
        """Begin the work once in a period; what takes longer rests for a tenth of it."""
        began_s = 0.0

        async def lead() -> None:
            nonlocal began_s
            began_s = monotonic()
            if await self._leads():
                await work(*words)
            else:
                self._offers.forget_news()

        def rest_s() -> float:
            return max(period_s / 10, period_s - (monotonic() - began_s))

        await pause(first_s, stopping)
        complain = partial(logger.error, "the fleet is not kept, will go on", work=work.__name__)
        await rounds(lead, rest_s, stopping, complain)
