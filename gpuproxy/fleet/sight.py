"""What a provider says of a machine, laid beside what we know of it: the moves that follow.

Only the database is touched here. A sighting is the answer to a question for this machine alone: lists may be out of
date, so they only tell whom to ask for (`is_as_expected`). It is as old as the question that brought it; one that is
older than the rental's last move says nothing about the state after it and is passed over.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from gpuproxy.fleet.meter import PREPAID, meter, prove, proven_until, rates_in
from gpuproxy.fleet.moves import adopt, announce, begin_destroy, end, lose, move
from gpuproxy.fleet.rentals import Rental, change, locked
from gpuproxy.fleet.states import ENDED
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderInstance

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ASKED = "asked by its owner"
INTERRUPTED = "interrupted by the provider"
MISSES_MAX = 2  # complete lists without a machine, each confirmed by asking for it alone, before it is lost

logger = get_logger(__name__)


def is_as_expected(rental: Rental, instance: ProviderInstance) -> bool:
    """Tell whether what a list says of a machine is no news."""
    expected = {
        "provisioning": ("pending",),
        "running": ("running",),
        "stopping": ("running",),
        "stopped": ("stopped",),
        "destroying": ("pending", "running", "stopped", "failed"),
    }
    return instance.state in expected.get(rental.state, ())


def take(
    connection: Connection, rental_id: str, instance: ProviderInstance, shown: str, at: datetime, **prices: int
) -> Rental:
    """Note which machine a create has made, and what it costs if it told that.

    A rental that was given up meanwhile keeps it for its destruction.
    """
    rental = locked(connection, rental_id)
    if rental.state == "destroying" and not rental.native_id:
        return change(connection, rental, native_id=instance.id, instance_id=shown)
    if rental.state != "pending":
        return rental  # ended: what was made late is destroyed as a stray
    return adopt(connection, rental, instance.id, at, instance_id=shown, **prices)


def see(connection: Connection, rental_id: str, instance: ProviderInstance, at: datetime, provision_s: float) -> Rental:
    """Take note of a machine as its provider, asked for it alone, has shown it at a time."""
    rental = locked(connection, rental_id)
    if rental.state in ENDED or rental.native_id != instance.id or at < rental.moved_at:
        return rental
    last_seen = rental.seen_at or rental.moved_at
    rental = _refreshed(connection, rental, instance, at)
    match rental.state, instance.state:
        case _, "gone":
            return miss(connection, rental_id, at)
        case ("destroying", _) | ("pending", _):
            return meter(connection, rental, at)
        case _, "failed":
            reason = f"failed: {instance.message}" if instance.message else "failed at the provider"
            return begin_destroy(connection, rental, max(last_seen, rental.moved_at), reason, has_failed=True)
        case "provisioning", "running":
            return meter(connection, move(connection, rental, "running", _began(rental, instance, at)), at)
        case "running", "stopped":
            return move(connection, rental, "stopped", max(last_seen, rental.moved_at), reason=INTERRUPTED)
        case "stopping", "stopped":
            return move(connection, rental, "stopped", at)
        case "stopped", "running" if rental.reason == INTERRUPTED:
            rental = move(connection, rental, "provisioning", at, reason="")
            return move(connection, rental, "running", at)
        case "stopped", "running":
            logger.warning("a stopped instance runs, is stopped again", contract_id=rental.id)
            return move(connection, rental, "stopping", at)
        case "running", "running" if instance.is_reachable:
            return prove(connection, rental, at, last_seen)
        case "running", _:  # it boots again, or its provider has lost sight of it: no proof that it runs
            return rental
        case "provisioning", _ if at - rental.moved_at > timedelta(seconds=provision_s):
            reason = f"did not run within {provision_s:g} s"
            return begin_destroy(connection, rental, at, reason, has_failed=True)
    return meter(connection, rental, at)


def miss(connection: Connection, rental_id: str, at: datetime) -> Rental:
    """Take note that the provider, asked for this machine alone, says that there is none."""
    rental = locked(connection, rental_id)
    if rental.state in ENDED or at < rental.moved_at:
        return rental
    if rental.state == "destroying":
        return end(connection, rental, at)
    count = rental.missing_count + 1
    if count >= MISSES_MAX:
        logger.warning("instance is lost", contract_id=rental.id, instance_id=rental.instance_id)
        return lose(connection, rental, at)
    return change(connection, rental, missing_count=count)


def _began(rental: Rental, instance: ProviderInstance, at: datetime) -> datetime:
    """Return when a machine that is seen running began to: what its provider says, if that can be."""
    told = EPOCH + timedelta(microseconds=instance.started_ns // 1_000)
    return told if rental.moved_at <= told <= at else at


def _refreshed(connection: Connection, rental: Rental, instance: ProviderInstance, at: datetime) -> Rental:
    """Write what may change in a machine's life: where it is reached, what it costs us."""
    last_seen = rental.seen_at or rental.moved_at
    values: dict[str, Any] = {"seen_at": max(at, last_seen), "missing_count": 0}
    if instance.ip:
        values["ip"] = instance.ip
        values["ports"] = {str(inside): outside for inside, outside in sorted(instance.ports.items())}
    if rental.state == "running" and "ip" in values and (values["ip"], values["ports"]) != (rental.ip, rental.ports):
        announce(connection, rental.user_id)
    costs = _costs(rental, instance)
    if costs:
        logger.warning("a provider's price has changed", contract_id=rental.id, **costs)
        rental = change(connection, meter(connection, rental, proven_until(rental, last_seen)), **costs)
        if rental.state in ("provisioning", "running", "stopping", "stopped"):
            values["cost_rate_nanousd_per_hour"] = rates_in(rental, rental.state)["cost_rate_nanousd_per_hour"]
    return change(connection, rental, **values)


def _costs(rental: Rental, instance: ProviderInstance) -> dict[str, int]:
    """Return what the provider takes now, if that is told and is not what we know."""
    told = {"storage_cost_nanousd_per_hour": instance.storage_nanousd_per_hour}
    if instance.price_nanousd_per_hour:
        told["cost_nanousd_per_hour"] = instance.price_nanousd_per_hour
    if rental.basis == PREPAID or not instance.price_nanousd_per_hour:
        return {}
    return {name: value for name, value in told.items() if value != getattr(rental, name)}
