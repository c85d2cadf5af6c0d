"""Renting: the intent and the first hour's money first, then the provider, once.

    hold and row `pending` (one transaction) -> create at the provider -> row `provisioning` (one transaction)

Whatever is killed in between, the row is there and carries the tag: a create that nobody has seen the end of is looked
up by its tag, by the same call for a moment and by the keeper for as long as ``pending_s``, and never made again. An
offer that is taken is a plain no, after which the next-best one may be tried if the caller allows it.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from msgspec import Struct, structs
from sqlalchemy import ColumnElement, Connection, func, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.fleet.care import adopt_instance, advance, destroy, give_up, resolve
from gpuproxy.fleet.meter import PREPAID
from gpuproxy.fleet.moves import NOT_ALL
from gpuproxy.fleet.parts import DISK_GB, Fleet, failure_of
from gpuproxy.fleet.purse import first_hold, reserve
from gpuproxy.fleet.rentals import Rental, add, by_request, change, find, locked, locked_group, new_id, of_group
from gpuproxy.fleet.states import LIVING
from gpuproxy.ledger.transfers import credit_account, lock
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import (
    CapacityGone,
    InstanceSpec,
    Offer,
    ProviderAdapter,
    ProviderError,
    ProviderInstance,
    RateLimited,
)
from gpuproxy.pricing import with_markup, without_markup
from gpuproxy.store.schema import rentals

OFFERS_TRIED_MAX = 5
CREATE_S = 150.0  # longer than any adapter's own wait for a create; with the looks it ends within IN_FLIGHT_S
TURNS_S = 90.0  # waited for turns within that: a reservation of 16 at vast.ai takes as long, at six seconds each
LOOK_S = 1.0  # between two looks at the store of who waits for a machine
LOOKS_S = (0.0, 0.5, 1.0, 2.0)  # waits before each look for a create whose end was not seen

logger = get_logger(__name__)


class Wish(Struct, frozen=True, kw_only=True):
    """What a customer wants to rent. Prices are theirs, markup included. `others` may be tried when `offer` is gone.

    `key_id` is the key whose budgets bound it, empty for a session.
    """

    user_id: str
    key_id: str = ""
    offer: Offer
    spec: InstanceSpec
    duration_hours: int | None = None
    max_price_nanousd_per_hour: int | None = None
    bid_nanousd_per_hour: int | None = None
    others: tuple[Offer, ...] = ()
    request_key: str | None = None
    request_hash: str = ""
    group_id: str = ""


async def rent(fleet: Fleet, wish: Wish) -> tuple[Rental, bool]:
    """Rent, and return the rental and whether it is new: the same request key gives the same rental.

    It may still be ``pending`` when the provider's answer did not come; the keeper finds out. Raises GatewayError
    INSUFFICIENT_CREDITS, BUDGET_EXCEEDED, CAPACITY_GONE, CONFLICT for one rental too many, UNPROCESSABLE,
    PROVIDER_FAILED.
    """
    [(rental, is_new)] = await _intended(fleet, [wish])
    if not is_new:
        return _repeated(rental, wish), False
    return await _fulfil(fleet, rental, wish), True


async def reserve_all(fleet: Fleet, wishes: Sequence[Wish]) -> tuple[list[Rental], bool]:
    """Rent all or nothing: what could be had is destroyed again when one could not. Raises as `rent`."""
    group_id = uuid4().hex
    grouped = [structs.replace(wish, group_id=group_id) for wish in wishes]
    intended = await _intended(fleet, grouped)
    if not intended[0][1]:
        return [_repeated(rental, wishes[0]) for rental, _ in intended], False
    tasks = [_fulfil(fleet, rental, wish) for (rental, _), wish in zip(intended, grouped, strict=True)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if failed := [result for result in results if isinstance(result, BaseException)]:
        for rental, _ in intended:
            await destroy(fleet, rental, NOT_ALL)
        await fleet.write(_forget_group, group_id)
        raise failed[0]
    return [result for result in results if isinstance(result, Rental)], True


async def wait_until_running(fleet: Fleet, rental: Rental, wait_s: float) -> Rental:
    """Look after a rental until it runs or ends, for at most `wait_s`; return it as it is then.

    The keeper does so too: asked is only for what nobody has seen for a while, or many who wait would take all turns.
    """
    deadline, poll_s = fleet.now() + timedelta(seconds=wait_s), fleet.settings.poll_s
    while rental.state in ("pending", "provisioning") and fleet.now() < deadline:
        await fleet.sleep(min(poll_s, LOOK_S))
        found: Rental | None = await fleet.read(find, rental.id)
        rental = found or rental
        last_seen = rental.seen_at or rental.moved_at
        if rental.state == "provisioning" and fleet.now() - last_seen >= timedelta(seconds=poll_s):
            rental = await _advanced(fleet, rental)
    return rental


async def _advanced(fleet: Fleet, rental: Rental) -> Rental:
    try:
        return await advance(fleet, rental)
    except ProviderError as error:
        logger.info("provider does not say how an instance is", contract_id=rental.id, error=str(error))
        return rental


async def _intended(fleet: Fleet, wishes: Sequence[Wish]) -> list[tuple[Rental, bool]]:
    """Store intents, all or none."""
    return await fleet.paying(_intend_all, fleet, wishes, fleet.now())


def _intend_all(
    connection: Connection, fleet: Fleet, wishes: Sequence[Wish], now: datetime
) -> list[tuple[Rental, bool]]:
    """Store the intents, or find what an earlier call with their key has stored, all of it and no more."""
    # First of all: of calls with one request key at the same time one stores its intent, the others find that.
    lock(connection, {credit_account(wish.user_id) for wish in wishes})
    if wishes[0].request_key and (before := by_request(connection, wishes[0].request_key)):
        group = of_group(connection, before.group_id) if before.group_id else [before]
        return [(rental, False) for rental in group]
    return [(_intend(connection, fleet, wish, now), True) for wish in wishes]


def _intend(connection: Connection, fleet: Fleet, wish: Wish, now: datetime) -> Rental:
    """Store the intent with its first hour held, all hours if they are paid beforehand."""
    if not wish.offer.id:
        raise GatewayError("CONFLICT", "the first call with this Idempotency-Key has just been refused; try again")
    rental_id = new_id(fleet.prefix)
    terms = _terms(fleet, wish, wish.offer)
    hours = terms["committed_hours"] or 1
    hold = first_hold(connection, wish.user_id, wish.key_id, rental_id, terms["price_nanousd_per_hour"] * hours)
    _check_count(connection, fleet, wish.user_id)  # the account is locked by now
    rental = Rental(
        id=rental_id,
        user_id=wish.user_id,
        key_id=wish.key_id,
        state="pending",
        label=wish.spec.label,
        spec=_shown_spec(wish.spec),
        hold_id=hold.id,
        request_key=wish.request_key,
        request_hash=wish.request_hash,
        group_id=wish.group_id,
        metered_at=now,
        created_at=now,
        moved_at=now,
        expires_at=_expiry(now, wish.duration_hours or terms["committed_hours"]),
        **terms,
    )
    is_new = add(connection, rental)
    assert is_new  # its request key names the customer, whose account is locked
    return rental


def _expiry(now: datetime, hours: int) -> datetime | None:
    return now + timedelta(hours=hours) if hours else None


def _check_count(connection: Connection, fleet: Fleet, user_id: str) -> None:
    chosen = (rentals.c.user_id == user_id) & rentals.c.state.in_(LIVING)
    most = fleet.settings.rentals_max
    if (connection.scalar(select(func.count()).select_from(rentals).where(chosen)) or 0) >= most:
        raise GatewayError("CONFLICT", f"there are {most} rentals already; destroy one, or ask the operator for more")


def _terms(fleet: Fleet, wish: Wish, offer: Offer) -> dict[str, Any]:
    """Return what an offer makes of a rental, as columns."""
    markup = fleet.markup(offer.provider)
    cost = _bid(fleet, wish, offer) or cost_with_disk(offer, wish.spec.disk_gb)
    storage = offer.storage_nanousd_per_gb_hour * wish.spec.disk_gb
    basis = fleet.providers[offer.provider].basis
    return {
        "provider": offer.provider,
        "offer_id": offer.id,
        "gpu_model": offer.gpu_model,
        "gpu_count": offer.gpu_count,
        "region": offer.region,
        "basis": basis,
        "cost_nanousd_per_hour": cost,
        "price_nanousd_per_hour": max(1, with_markup(cost, markup)),
        "storage_cost_nanousd_per_hour": 0 if basis == PREPAID else storage,
        "storage_price_nanousd_per_hour": 0 if basis == PREPAID else with_markup(storage, markup),
        "committed_hours": (wish.duration_hours or 1) if basis == PREPAID else 0,
    }


def cost_with_disk(offer: Offer, disk_gb: int) -> int:
    """Return what the provider takes for an offer with so large a disk; its price includes a small one.

    A nanodollar more per gigabyte, for what is lost where a provider's price of storage is rounded.
    """
    more_gb = max(0, disk_gb - DISK_GB)
    return offer.price_nanousd_per_hour + more_gb * (offer.storage_nanousd_per_gb_hour + 1)


def _bid(fleet: Fleet, wish: Wish, offer: Offer) -> int | None:
    """Return what the provider is bid: the customer's bid without the markup."""
    if wish.bid_nanousd_per_hour is None:
        return None
    return without_markup(wish.bid_nanousd_per_hour, fleet.markup(offer.provider))


async def _fulfil(fleet: Fleet, rental: Rental, wish: Wish) -> Rental:
    """Ask the provider for the machine, and for the next-best ones while they are taken."""
    adapter = fleet.providers[rental.provider]
    try:
        for offer in (wish.offer, *wish.others)[:OFFERS_TRIED_MAX]:
            if offer is not wish.offer:
                rental = await fleet.paying(_turn_to, fleet, rental.id, wish, offer)
            try:
                return await _create(fleet, adapter, rental, wish, offer)
            except CapacityGone as error:
                refusal = failure_of(error)
                await _scrap(adapter, error)
    except GatewayError as error:
        refusal = error
    await fleet.write(_refused, rental.id, fleet.now(), refusal.message)
    raise refusal


def _refused(connection: Connection, rental_id: str, at: datetime, reason: str) -> None:
    if not give_up(connection, rental_id, at, reason).native_id:
        _forget_request(connection, rentals.c.id == rental_id)


def _forget_group(connection: Connection, group_id: str) -> None:
    locked_group(connection, group_id)
    _forget_request(connection, rentals.c.group_id == group_id)


def _forget_request(connection: Connection, chosen: ColumnElement[bool]) -> None:
    """Let a repetition with the same key try anew: what was answered is that nothing was rented."""
    connection.execute(update(rentals).where(chosen).values(request_key=None))


async def _create(fleet: Fleet, adapter: ProviderAdapter, rental: Rental, wish: Wish, offer: Offer) -> Rental:
    """Create once. Raises CapacityGone for a plain no of that kind, GatewayError for any other."""
    try:
        async with asyncio.timeout(CREATE_S):
            instance = await _in_turn(fleet, adapter, rental, wish, offer)
    except TimeoutError:
        return await _look_for(fleet, adapter, rental)
    except ProviderError as error:
        if error.may_have_worked:
            logger.warning("create is in doubt, looking", contract_id=rental.id, error=str(error))
            return await _look_for(fleet, adapter, rental)
        if isinstance(error, CapacityGone):
            raise
        await _scrap(adapter, error)
        logger.warning("instance cannot be rented", contract_id=rental.id, error=str(error))
        raise failure_of(error) from error
    return await _adopted(fleet, adapter, rental, instance)


async def _in_turn(
    fleet: Fleet, adapter: ProviderAdapter, rental: Rental, wish: Wish, offer: Offer
) -> ProviderInstance:
    """Create, when it is our turn at a provider whose calls are spaced.

    A refusal of the provider's own limiter is taken for one only if nothing with our tag is there afterwards.
    """
    spec, waited_s = _provider_spec(fleet, wish, offer), 0.0
    while True:
        try:
            return await adapter.create(offer.id, spec, rental.id)
        except RateLimited as error:
            waited_s += error.retry_after_s or TURNS_S
            is_over = waited_s >= TURNS_S
            if not is_over:
                await fleet.sleep(error.retry_after_s or 0.0)
            if error.may_have_worked and not await _is_unmade(adapter, rental):
                raise
            if is_over:
                error.may_have_worked = False
                raise


async def _is_unmade(adapter: ProviderAdapter, rental: Rental) -> bool:
    try:
        return not await adapter.find(rental.id)
    except ProviderError as error:
        logger.warning("create is in doubt", contract_id=rental.id, error=str(error))
        return False


async def _adopted(fleet: Fleet, adapter: ProviderAdapter, rental: Rental, instance: ProviderInstance) -> Rental:
    rental = await adopt_instance(fleet, adapter, rental, instance)
    if rental.state == "destroying" and rental.native_id == instance.id:  # its owner has thought better of it
        return await destroy(fleet, rental, rental.reason)
    return rental


async def _look_for(fleet: Fleet, adapter: ProviderAdapter, rental: Rental) -> Rental:
    """Look whether a create has worked after all; a rental that is still pending is the keeper's."""
    for wait_s in LOOKS_S:
        await fleet.sleep(wait_s)
        try:
            rental = await resolve(fleet, adapter, rental)
        except ProviderError as error:
            logger.warning("create is still in doubt", contract_id=rental.id, error=str(error))
        if rental.state != "pending":
            break
    return rental


async def _scrap(adapter: ProviderAdapter, error: ProviderError) -> None:
    """Destroy what a refused create has left behind; if that fails the keeper finds it by its tag."""
    if not error.instance_id:
        return
    try:
        await adapter.destroy(error.instance_id)
    except ProviderError as failure:
        logger.warning("leftover of a refused create stays for now", error=str(failure))


def _turn_to(connection: Connection, fleet: Fleet, rental_id: str, wish: Wish, offer: Offer) -> Rental:
    """Let a pending rental be for another offer, with its first hour held. Raises INSUFFICIENT_CREDITS."""
    rental = locked(connection, rental_id)
    if rental.state != "pending":
        raise GatewayError("CONFLICT", f"rental {rental_id} was given up")
    rental = change(connection, rental, **_terms(fleet, wish, offer))
    reserve(connection, rental, 3_600 * (rental.committed_hours or 1))
    return rental


def _provider_spec(fleet: Fleet, wish: Wish, offer: Offer) -> InstanceSpec:
    """Return the spec with the prices the provider is told: never dearer than what the customer has seen or allows."""
    most = cost_with_disk(offer, wish.spec.disk_gb)
    if wish.max_price_nanousd_per_hour is not None:
        most = without_markup(wish.max_price_nanousd_per_hour, fleet.markup(offer.provider))
    bid = _bid(fleet, wish, offer)
    hours = wish.duration_hours or 1
    return structs.replace(
        wish.spec, max_price_nanousd_per_hour=max(most, bid or 0), bid_nanousd_per_hour=bid, duration_hours=hours
    )


def _shown_spec(spec: InstanceSpec) -> dict[str, Any]:
    """Return what is kept of a spec. Values of variables and commands often hold secrets, so they are not."""
    return {
        "image": spec.image,
        "env": sorted(spec.env),
        "ports": list(spec.ports),
        "disk_gb": spec.disk_gb,
        "has_command": bool(spec.command),
        "has_ssh_key": bool(spec.ssh_key),
    }


def _repeated(rental: Rental, wish: Wish) -> Rental:
    if rental.request_hash != wish.request_hash:
        message = "this Idempotency-Key was used for another request; take a new one"
        raise GatewayError("UNPROCESSABLE", message, param="Idempotency-Key")
    return rental
