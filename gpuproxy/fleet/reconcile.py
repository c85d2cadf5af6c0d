"""Our rows against the provider's list, every minute: nothing is rented that nobody knows, nor billed when it is gone.

A list changes nothing by itself: it may fail, lie or be out of date. It tells whom to ask for: what it does not show
as we know it is asked for alone, and only the provider's word about that one counts. The others are asked for in turn,
so that all that runs is proven to, and charged, every minute, or every quarter of an hour where it is much.

What carries our installation's tag and belongs to no living rental is destroyed: a create that was doubled or came up
late. What carries another tag or none is somebody else's, and is never touched. Both are noted, see `findings`.
"""

import asyncio
import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from gpuproxy.fleet import money
from gpuproxy.fleet.care import advance, look
from gpuproxy.fleet.findings import Kind, note_failure, note_list
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rent import IN_FLIGHT_S
from gpuproxy.fleet.rentals import Rental, find, in_states
from gpuproxy.fleet.sight import is_as_expected
from gpuproxy.fleet.states import ENDED, LIVING, UNDER_WAY
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderAdapter, ProviderError, ProviderInstance

PROOF_S = 900.0  # the longest between two proofs that a machine runs
PROOFS_MIN = 10  # machines of a provider asked for in a cycle even if fewer would do

logger = get_logger(__name__)


class Reconciler:
    """Keeps what is rented and what we believe the same. One runs among all nodes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._suspects: set[tuple[str, str]] = set()  # provider, native id: seen once with our tag, but no row

    async def cycle(self) -> None:
        """Look at every provider at once, then at every customer's money. Raises what the store raises."""
        rows = await self._fleet.read(in_states, LIVING)
        works = [self._reconcile(name, [row for row in rows if row.provider == name]) for name in self._fleet.providers]
        results = await asyncio.gather(*works, return_exceptions=True)
        await self.check_money()
        for failure in results:  # one provider's trouble is not the others'
            if failure is not None:
                raise failure

    async def check_money(self) -> None:
        """Fill holds, warn, and begin to destroy what cannot be paid; what is destroyed is seen to at once."""
        now = self._fleet.now()
        for rental in await self._fleet.read(in_states, LIVING):
            checked = await self._fleet.write(money.check, rental.id, now, self._fleet.settings.reconcile_s)
            if checked.state == "destroying" and rental.state != "destroying":
                await self._advance(checked)

    async def tend(self) -> None:
        """Do the next step of everything that is under way."""
        rows = await self._fleet.read(in_states, UNDER_WAY)
        now = self._fleet.now()
        due = [row for row in rows if row.native_id or now - row.created_at >= timedelta(seconds=IN_FLIGHT_S)]
        by_provider = {name: [row for row in due if row.provider == name] for name in self._fleet.providers}
        await asyncio.gather(*(self._advance_all(each) for each in by_provider.values()))

    async def _advance_all(self, rows: Iterable[Rental]) -> None:
        for rental in rows:
            await self._advance(rental)

    async def _advance(self, rental: Rental) -> None:
        try:
            await advance(self._fleet, rental)
        except ProviderError as error:
            logger.warning("rental waits for its provider", contract_id=rental.id, error=str(error))

    async def _reconcile(self, name: str, rows: Sequence[Rental]) -> None:
        adapter = self._fleet.providers[name]
        try:
            listed = [instance for instance in await adapter.list() if instance.state != "gone"]
        except ProviderError as error:
            logger.warning("provider cannot be listed, nothing is changed", provider=name, error=str(error))
            await self._fleet.write(note_failure, name, self._fleet.now(), str(error))
            return
        for rental in _to_ask(rows, listed, self._fleet.settings.reconcile_s):
            await self._ask(adapter, rental)
        await self._look_at_strays(adapter, listed)

    async def _ask(self, adapter: ProviderAdapter, rental: Rental) -> None:
        """See one machine for itself."""
        try:
            rental = await look(self._fleet, adapter, rental)
            if rental.state == "destroying":
                await advance(self._fleet, rental)
        except ProviderError as error:
            logger.warning("instance cannot be looked at", contract_id=rental.id, error=str(error))

    async def _look_at_strays(self, adapter: ProviderAdapter, listed: Sequence[ProviderInstance]) -> None:
        suspects = set()
        found: dict[tuple[Kind, str], dict[str, Any]] = {}
        for instance in listed:
            detail = {"tag": instance.tag, "gpu_model": instance.gpu_model, "state": instance.state}
            if not instance.tag.startswith(self._fleet.prefix):
                found["foreign", instance.id] = detail
                continue
            rental = await self._fleet.read(find, instance.tag)
            if rental is None:
                suspects.add((adapter.name, instance.id))
            if _is_stray(rental, instance):
                found["stray", instance.id] = detail
                if rental or (adapter.name, instance.id) in self._suspects:
                    await self._destroy_stray(adapter, instance)
        self._suspects = {each for each in self._suspects if each[0] != adapter.name} | suspects
        await self._fleet.write(note_list, adapter.name, self._fleet.now(), len(listed), found)

    async def _destroy_stray(self, adapter: ProviderAdapter, instance: ProviderInstance) -> None:
        logger.error("stray instance is destroyed", provider=adapter.name, native_id=instance.id, tag=instance.tag)
        try:
            await adapter.destroy(instance.id)
        except ProviderError as error:
            logger.error("stray instance cannot be destroyed yet", native_id=instance.id, error=str(error))


def _to_ask(rows: Sequence[Rental], listed: Sequence[ProviderInstance], cycle_s: float) -> list[Rental]:
    """Return the machines to ask for: those the list shows otherwise than we know them, and the longest unseen."""
    seen = {instance.id: instance for instance in listed}
    made = [rental for rental in rows if rental.native_id]
    is_news = {each.id: not (shown := seen.get(each.native_id)) or not is_as_expected(each, shown) for each in made}
    count = max(PROOFS_MIN, math.ceil(len(made) * cycle_s / PROOF_S))
    rest = sorted((each for each in made if not is_news[each.id]), key=lambda each: each.seen_at or each.moved_at)
    return [each for each in made if is_news[each.id]] + rest[:count]


def _is_stray(rental: Rental | None, instance: ProviderInstance) -> bool:
    """Tell whether nobody can have a claim on an instance with our tag: not its rental's machine, nor yet to be it."""
    if rental is None or rental.state in ENDED:
        return True
    return bool(rental.native_id) and rental.native_id != instance.id
