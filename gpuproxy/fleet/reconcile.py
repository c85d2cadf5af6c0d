"""Our rows against the provider's list, every minute: nothing is rented that nobody knows, nor billed when it is gone.

A list changes nothing by itself: it may fail, lie or be out of date. It tells whom to ask for: what it does not show
as we know it is asked for alone, and only the provider's word about that one counts. The others are asked for in turn,
at the same time and whether a list comes or not: those whose money ends first, then the longest unseen. So all that
runs is proven to, and charged, every minute; every quarter of an hour where it is much; more seldom where the provider
wants more time between calls. A cycle asks for no more than fit into it.

What carries our installation's tag and belongs to no living rental is destroyed: a create that was doubled or came up
late. What carries another tag or none is somebody else's, and is never touched. Both are noted, see `findings`.
"""

import asyncio
import math
from collections.abc import Awaitable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from gpuproxy.fleet import money
from gpuproxy.fleet.care import IN_FLIGHT_S, advance, look, unanswered
from gpuproxy.fleet.findings import Kind, note_failure, note_list
from gpuproxy.fleet.moves import is_overdue
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.rentals import Rental, find, in_states
from gpuproxy.fleet.sight import OFF, SILENT, UNREACHABLE, UNSEEN_S, is_as_expected, silence
from gpuproxy.fleet.states import ENDED, SETTLED, UNDER_WAY
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderAdapter, ProviderError, ProviderInstance

PROOF_S = 900.0  # the longest between two proofs that a machine runs
PROOFS_MIN = 10  # machines of a provider asked for in a cycle even if fewer would do

logger = get_logger(__name__)


class Reconciler:
    """Keeps what is rented and what we believe the same. One runs among all nodes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._silent_since: dict[str, datetime] = {}  # those that nobody has answered about since
        self._suspects: set[tuple[str, str]] = set()  # provider, native id: seen once with our tag, but no row

    async def cycle(self) -> None:
        """Look at what every provider has, all at once. Raises what the store raises."""
        rows = await self._fleet.read(in_states, SETTLED)
        self._silent_since = {row.id: self._silent_since[row.id] for row in rows if row.id in self._silent_since}
        under_way = await self._fleet.read(in_states, UNDER_WAY)
        works: list[Awaitable[None]] = [
            self._note_silence(row, OFF) for row in rows if row.provider not in self._fleet.providers
        ]
        works.append(self._advance_all(row for row in under_way if row.provider not in self._fleet.providers))
        for name, adapter in self._fleet.providers.items():
            ours, asked = [row for row in rows if row.provider == name], set[str]()
            works += [self._prove(adapter, ours, asked), self._compare(adapter, ours, asked)]
        for failure in await asyncio.gather(*works, return_exceptions=True):  # one's trouble is not the others'
            if failure is not None:
                raise failure

    async def check_money(self) -> None:
        """Fill holds, warn, and begin to destroy what cannot be paid. Asks no provider, so none can hold it up."""
        now = self._fleet.now()
        for rental in await self._fleet.read(money.in_need, now):
            await self._fleet.write(money.check, rental.id, now, self._fleet.settings.reconcile_s)

    async def tend(self, *names: str) -> None:
        """Do the next step of everything that is under way at these providers; at all, if none is named."""
        rows = await self._fleet.read(in_states, UNDER_WAY)
        now = self._fleet.now()
        due = [row for row in rows if row.native_id or now - row.created_at >= timedelta(seconds=IN_FLIGHT_S)]
        works = [[row for row in due if row.provider == name] for name in names or self._fleet.providers]
        await asyncio.gather(*(self._advance_all(each) for each in works))

    async def _advance_all(self, rows: Iterable[Rental]) -> None:
        for rental in rows:
            await self._advance(rental)

    async def _advance(self, rental: Rental) -> None:
        try:
            await advance(self._fleet, rental)
        except ProviderError as error:
            logger.warning("rental waits for its provider", contract_id=rental.id, error=str(error))
            now, provision_s = self._fleet.now(), self._fleet.settings.provision_s
            if is_overdue(rental, now, provision_s):
                await self._fleet.write(unanswered, rental.id, now, provision_s)

    async def _prove(self, adapter: ProviderAdapter, rows: Sequence[Rental], asked: set[str]) -> None:
        """Let the provider say of some that they run."""
        turn = _in_turn(rows, self._fleet.now(), self._fleet.settings.reconcile_s)
        await self._ask_all(adapter, turn, asked)

    async def _compare(self, adapter: ProviderAdapter, rows: Sequence[Rental], asked: set[str]) -> None:
        """Look at the provider's list for what is news."""
        try:
            listed = [instance for instance in await adapter.list() if instance.state != "gone"]
        except ProviderError as error:
            logger.warning("provider cannot be listed, nothing is changed", provider=adapter.name, error=str(error))
            await self._fleet.write(note_failure, adapter.name, self._fleet.now(), str(error))
            return
        seen = {instance.id: instance for instance in listed}
        news = [each for each in rows if not (shown := seen.get(each.native_id)) or not is_as_expected(each, shown)]
        await self._ask_all(adapter, sorted(news, key=_last_seen), asked)
        await self._look_at_strays(adapter, listed)

    async def _ask_all(self, adapter: ProviderAdapter, rentals: Iterable[Rental], asked: set[str]) -> None:
        """See each that was not asked for in this cycle yet, as long as it lasts."""
        until = self._fleet.now() + timedelta(seconds=self._fleet.settings.reconcile_s)
        for rental in rentals:
            if self._fleet.now() >= until:
                return
            if rental.id not in asked:
                asked.add(rental.id)
                await self._ask(adapter, rental)

    async def _ask(self, adapter: ProviderAdapter, rental: Rental) -> None:
        """See one machine for itself."""
        try:
            await look(self._fleet, adapter, rental)
            self._silent_since.pop(rental.id, None)
        except ProviderError as error:
            logger.warning("instance cannot be looked at", contract_id=rental.id, error=str(error))
            await self._note_silence(rental)

    async def _note_silence(self, rental: Rental, reason: str = SILENT) -> None:
        now = self._fleet.now()
        since = self._silent_since.setdefault(rental.id, now)
        if rental.reason not in UNREACHABLE and now - since >= timedelta(seconds=UNSEEN_S):
            await self._fleet.write(silence, rental.id, since, reason)

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


def _in_turn(rows: Sequence[Rental], now: datetime, cycle_s: float) -> list[Rental]:
    """Return the machines to ask for: those whose money or time ends soon, and the longest unseen."""
    soon = now + timedelta(seconds=2 * cycle_s)
    ending = {each.id for each in rows if each.warned_s or (each.expires_at is not None and each.expires_at < soon)}
    count = max(PROOFS_MIN, math.ceil(len(rows) * cycle_s / PROOF_S))
    return sorted(rows, key=lambda each: (each.id not in ending, _last_seen(each)))[: count + len(ending)]


def _last_seen(rental: Rental) -> datetime:
    return rental.seen_at or rental.moved_at


def _is_stray(rental: Rental | None, instance: ProviderInstance) -> bool:
    """Tell whether nobody can have a claim on an instance with our tag: not its rental's machine, nor yet to be it."""
    if rental is None or rental.state in ENDED:
        return True
    return bool(rental.native_id) and rental.native_id != instance.id
