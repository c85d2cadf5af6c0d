"""Leads one rental to where it is meant to be: asks the provider, looks at the answer, writes down what is proven.

The intent is always stored before a provider is asked, so every step may be repeated by whoever finds it undone: the
call that began it, another node, or the next start. Nothing here creates; see `rent`.
"""

import math
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection

from gpuproxy.errors import GatewayError
from gpuproxy.fleet.meter import PREPAID
from gpuproxy.fleet.moves import NOT_ALL, begin_destroy, end, is_overdue, move, overdue
from gpuproxy.fleet.parts import RETRY_S, Fleet, failure_of, shown_id
from gpuproxy.fleet.purse import reserve
from gpuproxy.fleet.rentals import Rental, find, locked, locked_group
from gpuproxy.fleet.sight import ASKED, BOOTS_AGAIN, miss, see, take
from gpuproxy.fleet.states import ENDED, UNDER_WAY, State
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import (
    CapacityGone,
    InstanceGone,
    NotSupported,
    ProviderAdapter,
    ProviderError,
    ProviderInstance,
    ProviderUnavailable,
)
from gpuproxy.pricing import with_markup

Ask = Callable[[str], Awaitable[None]]

IN_FLIGHT_S = 240  # what a call that rents takes at most: before that a pending rental is its own affair
ASKED_IN_VAIN = f"{ASKED}; done at its provider once that is switched on again"
RESTART_S = 1_800  # a machine is started only with money for so long

logger = get_logger(__name__)


async def advance(fleet: Fleet, rental: Rental) -> Rental:
    """Do the next step of a rental that is under way. Raises ProviderError, and what the store raises."""
    adapter = fleet.providers.get(rental.provider)
    if adapter is None:
        raise ProviderUnavailable(rental.provider, "read", "it is switched off; nothing can be known")
    if not rental.native_id:
        return await resolve(fleet, adapter, rental)
    if rental.state == "destroying":
        return await _press_destroy(fleet, adapter, rental)
    rental = await look(fleet, adapter, rental)
    if rental.state == "stopping":
        return await _press(fleet, adapter, rental, adapter.stop)
    if rental.state == "provisioning" and rental.running_at is not None and rental.reason != BOOTS_AGAIN:
        return await _press(fleet, adapter, rental, adapter.start)
    if rental.state == "destroying":
        return await _press_destroy(fleet, adapter, rental)
    return rental


async def look(fleet: Fleet, adapter: ProviderAdapter, rental: Rental) -> Rental:
    """Ask for one machine and note what is answered. Raises ProviderError: then nothing is known."""
    at = fleet.now()
    instance = await adapter.get(rental.native_id)
    if instance is None or instance.state == "gone":
        return await fleet.write(miss, rental.id, at)
    return await fleet.write(see, rental.id, instance, at, fleet.settings.provision_s)


async def resolve(fleet: Fleet, adapter: ProviderAdapter, rental: Rental) -> Rental:
    """Find out whether the provider has made the machine of a rental whose create nobody has seen the end of.

    It is never asked to create again. What is not there after ``pending_s`` never was; should it come up still later,
    it is destroyed as a stray.
    """
    at = fleet.now()
    found = await adapter.find(rental.id)
    living = [instance for instance in found if instance.state != "gone"]
    if living:
        rental = await note_made(fleet, adapter, rental, living[0])
        return await advance(fleet, rental) if rental.state in UNDER_WAY and rental.native_id else rental
    if at - rental.created_at < timedelta(seconds=fleet.settings.pending_s):
        return rental
    return await fleet.write(give_up, rental.id, fleet.now(), "the provider never made it")


async def adopt_instance(fleet: Fleet, adapter: ProviderAdapter, rental: Rental, instance: ProviderInstance) -> Rental:
    """Note the machine that a create has answered with."""
    at = fleet.now()
    rental = await note_made(fleet, adapter, rental, instance)
    if rental.native_id == instance.id and rental.state == "provisioning":
        rental = await fleet.write(see, rental.id, instance, at, fleet.settings.provision_s)
    return rental


async def note_made(fleet: Fleet, adapter: ProviderAdapter, rental: Rental, instance: ProviderInstance) -> Rental:
    """Note which machine a create has made, at what it costs."""
    prices = {}
    if instance.price_nanousd_per_hour:
        prices["cost_nanousd_per_hour"] = instance.price_nanousd_per_hour
        prices["price_nanousd_per_hour"] = with_markup(instance.price_nanousd_per_hour, fleet.markup(rental.provider))
    shown = shown_id(adapter, instance.id)
    return await fleet.write(take, rental.id, instance, shown, fleet.now(), **prices)


def give_up(connection: Connection, rental_id: str, at: datetime, reason: str, is_proven: bool = True) -> Rental:
    """End a rental that has no machine; with it go the others of its reservation.

    If that is not proven, it is looked for until it is, but not waited for.
    """
    found = find(connection, rental_id)
    assert found is not None  # rentals are never deleted
    group = locked_group(connection, found.group_id) if found.group_id else [locked(connection, rental_id)]
    rows = {each.id: each for each in group}
    rental = rows.pop(rental_id)
    if rental.native_id or rental.state not in ("pending", "destroying"):
        return rental
    if rental.state == "destroying":
        return end(connection, rental, at) if is_proven else rental
    for other in rows.values():
        begin_destroy(connection, other, at, NOT_ALL)
    if not is_proven:
        return begin_destroy(connection, rental, at, reason, has_failed=True)
    return move(connection, rental, "failed", at, reason=reason, has_failed=True)


def unanswered(connection: Connection, rental_id: str, at: datetime, provision_s: float) -> Rental:
    """Take note that the provider does not answer about a machine: what should long run is not waited for any more."""
    rental = locked(connection, rental_id)
    if not is_overdue(rental, at, provision_s):
        return rental
    if rental.native_id:
        return overdue(connection, rental, at, provision_s)
    return give_up(connection, rental_id, at, "the provider does not say whether it made it", is_proven=False)


async def destroy(fleet: Fleet, rental: Rental, reason: str = ASKED) -> Rental:
    """Bring a rental to its end; when the provider does not answer now, it stays ``destroying`` and is seen to.

    Raises GatewayError CONFLICT for an order on its way that is paid beforehand: it cannot be taken back.
    """
    await _last_look(fleet, rental)
    if reason == ASKED and rental.provider not in fleet.providers:
        reason = ASKED_IN_VAIN
    rental = await fleet.write(_begun, rental.id, fleet.now(), reason)
    if rental.state in ENDED:
        return rental
    try:
        return await advance(fleet, rental)
    except ProviderError as error:
        logger.warning("instance cannot be destroyed yet", contract_id=rental.id, error=str(error))
        return rental


async def stop(fleet: Fleet, rental: Rental) -> Rental:
    """Stop a machine that runs, or is to run again; its storage goes on costing. One that is stopping stays so.

    Raises GatewayError CONFLICT for one that has not run or whose provider is switched off, UNPROCESSABLE where the
    provider cannot stop.
    """
    if rental.state in ("stopping", "stopped"):
        return rental
    if not _can_stop(rental):
        raise GatewayError("CONFLICT", f"rental {rental.id} is {rental.state}; only a running one can be stopped")
    fleet.adapter_of(rental)
    await _last_look(fleet, rental)
    rental = await fleet.write(_stopping, rental.id, fleet.now())
    return await _pressed(fleet, rental)


async def start(fleet: Fleet, rental: Rental) -> Rental:
    """Start a stopped machine. Raises as `stop`, and INSUFFICIENT_CREDITS or BUDGET_EXCEEDED without money
    for a while.
    """
    if rental.state in ("provisioning", "running"):
        return rental
    if rental.state != "stopped":
        raise GatewayError("CONFLICT", f"rental {rental.id} is {rental.state}; only a stopped one can be started")
    fleet.adapter_of(rental)
    rental = await fleet.paying(_restarted, rental.id, fleet.now())
    return await _pressed(fleet, rental)


async def _last_look(fleet: Fleet, rental: Rental) -> None:
    """See a machine that costs once more, so that it is charged up to this moment and not to the last cycle."""
    adapter = fleet.providers.get(rental.provider)
    if adapter is None or not rental.native_id or not rental.rate_nanousd_per_hour:
        return
    try:
        await look(fleet, adapter, rental)
    except ProviderError as error:
        logger.warning("instance is charged to when it was last seen", contract_id=rental.id, error=str(error))


async def _pressed(fleet: Fleet, rental: Rental) -> Rental:
    try:
        return await advance(fleet, rental)
    except (NotSupported, CapacityGone) as error:
        raise failure_of(error) from error
    except ProviderError as error:
        logger.warning("provider will be asked again", contract_id=rental.id, error=str(error))
        return rental


async def _press(fleet: Fleet, adapter: ProviderAdapter, rental: Rental, ask: Ask) -> Rental:
    """Ask for a start or stop, and look. A refusal puts the rental back to what it was."""
    try:
        await ask(rental.native_id)
    except InstanceGone:
        return await look(fleet, adapter, rental)
    except (NotSupported, CapacityGone) as error:
        back = "stopped" if rental.state == "provisioning" else "running"
        await fleet.write(_moved, rental.id, back, fleet.now(), str(error), rental.state)
        raise
    return await look(fleet, adapter, rental)


async def _press_destroy(fleet: Fleet, adapter: ProviderAdapter, rental: Rental) -> Rental:
    """Ask for the end and whether it has come; only the provider's own word that there is nothing ends the rental."""
    await adapter.destroy(rental.native_id)
    return await look(fleet, adapter, rental)


def _begun(connection: Connection, rental_id: str, at: datetime, reason: str) -> Rental:
    rental = locked(connection, rental_id)
    left_s = IN_FLIGHT_S - (at - rental.created_at).total_seconds()
    if reason in (ASKED, ASKED_IN_VAIN) and rental.basis == PREPAID and rental.state == "pending" and left_s > 0:
        message = f"rental {rental_id} is being ordered, and paid beforehand; destroy it once it is provisioning"
        raise GatewayError("CONFLICT", f"{message}, or in {math.ceil(left_s)} s", RETRY_S)
    return begin_destroy(connection, rental, at, reason)


def _stopping(connection: Connection, rental_id: str, at: datetime) -> Rental:
    rental = locked(connection, rental_id)
    return move(connection, rental, "stopping", at, reason=ASKED) if _can_stop(rental) else rental


def _can_stop(rental: Rental) -> bool:
    return rental.state == "running" or (rental.state == "provisioning" and rental.running_at is not None)


def _moved(connection: Connection, rental_id: str, to: State, at: datetime, reason: str, only_from: State) -> Rental:
    rental = locked(connection, rental_id)
    if rental.state != only_from:
        return rental
    return move(connection, rental, to, at, reason=reason)


def _restarted(connection: Connection, rental_id: str, at: datetime) -> Rental:
    rental = locked(connection, rental_id)
    if rental.state != "stopped":
        return rental
    rental = move(connection, rental, "provisioning", at, reason="")
    reserve(connection, rental, RESTART_S)
    return rental
