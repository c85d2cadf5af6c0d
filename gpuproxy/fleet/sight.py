"""What a provider says of a machine, laid beside what we know of it: the moves that follow.

Only the database is touched here. A sighting is the answer to a question for this machine alone: lists may be out of
date, so they only tell whom to ask for (`is_as_expected`). It is as old as the question that brought it; one that is
older than the rental's last move says nothing about the state after it and is passed over.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select

from gpuproxy.fleet.meter import PREPAID, commit_cost, meter, prove, proven_until, rates_in
from gpuproxy.fleet.moves import adopt, announce, begin_destroy, end, is_overdue, lose, move, overdue, tell
from gpuproxy.fleet.rentals import Rental, change, locked
from gpuproxy.fleet.states import ENDED
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderInstance
from gpuproxy.store.schema import rentals

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ASKED = "asked by its owner"
INTERRUPTED = "interrupted by the provider"
BOOTS_AGAIN = "boots again at the provider"
UNSEEN = "the provider has lost sight of it; it is not charged until it is seen again"
SILENT = "its provider does not answer about it; if it runs meanwhile, that is charged once it is seen"
OFF = "its provider is switched off at this gateway; if it runs meanwhile, that is charged once it is seen"
UNREACHABLE = (UNSEEN, SILENT, OFF)
UNSEEN_S = 300.0  # how long that lasts before the owner is told: a heartbeat may be missed
MISSES_MAX = 2  # how often the provider has to say that there is none, before a machine is lost,
MISSED_S = 120.0  # and for how long: a new one may not be shown at once

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
    return instance.is_reachable and instance.state in expected.get(rental.state, ())


def take(
    connection: Connection, rental_id: str, instance: ProviderInstance, shown: str, at: datetime, **prices: int
) -> Rental:
    """Note which machine a create has made, and what it costs if it told that.

    A rental that was given up meanwhile keeps it for its destruction.
    """
    rental = locked(connection, rental_id)
    if rental.state == "destroying" and not rental.native_id:
        rental = change(connection, rental, native_id=instance.id, instance_id=shown, **prices)
        return commit_cost(connection, rental) if rental.basis == PREPAID else rental
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
        case "provisioning", "running" if instance.is_reachable:
            return meter(connection, move(connection, rental, "running", _began(rental, instance, at), reason=""), at)
        case ("running", "stopped") | ("provisioning", "stopped") if _runs_by_itself(rental):
            rental = move(connection, rental, "stopped", max(last_seen, rental.moved_at), reason=INTERRUPTED)
            return prove(connection, rental, at, last_seen)
        case "stopping", "stopped":
            return move(connection, rental, "stopped", at)
        case "stopped", "running" if rental.reason == INTERRUPTED and instance.is_reachable:
            rental = move(connection, rental, "provisioning", at, reason="")
            return move(connection, rental, "running", at)
        case "stopped", "running" if rental.reason != INTERRUPTED:
            logger.warning("a stopped instance runs, is stopped again", contract_id=rental.id)
            return move(connection, rental, "stopping", at)
        case "running", "running" if instance.is_reachable:
            return _proven(connection, rental, at, last_seen)
        case "running", "pending":
            return prove(connection, move(connection, rental, "provisioning", at, reason=BOOTS_AGAIN), at, last_seen)
        case "running", _:
            return _unseen(connection, rental, at, last_seen)
        case "provisioning", _ if is_overdue(rental, at, provision_s):
            return overdue(connection, rental, at, provision_s)
    return prove(connection, rental, at, last_seen) if instance.is_reachable else rental


def _runs_by_itself(rental: Rental) -> bool:
    """Tell whether nobody of ours has to do anything for it to run."""
    return rental.state == "running" or rental.reason == BOOTS_AGAIN


def _proven(connection: Connection, rental: Rental, at: datetime, last_seen: datetime) -> Rental:
    """Charge one that runs, no further than it was rented for; tell if its owner was told that it is out of sight."""
    rental = prove(connection, rental, min(at, rental.expires_at or at), last_seen)
    if rental.reason in UNREACHABLE:
        rental = change(connection, rental, reason="")
        tell(connection, "instance.running", rental)
    return rental


def _unseen(connection: Connection, rental: Rental, at: datetime, last_seen: datetime) -> Rental:
    """Pass over one that its provider has lost sight of: there is no proof that it runs. Tell when that lasts.

    Where proofs are far apart one missed heartbeat would seem to last: it has to be out of sight twice in turn.
    """
    is_first = last_seen <= rental.metered_at
    if rental.reason == UNSEEN or is_first or at - rental.metered_at < timedelta(seconds=UNSEEN_S):
        return rental
    rental = change(connection, rental, reason=UNSEEN)
    tell(connection, "instance.unreachable", rental)
    return rental


def silence(connection: Connection, rental_id: str, since: datetime, reason: str) -> None:
    """Tell the owner of a running machine that its provider has not answered about it since then."""
    rental = locked(connection, rental_id)
    is_seen = rental.seen_at is not None and rental.seen_at > since
    if rental.state == "running" and rental.reason not in UNREACHABLE and not is_seen:
        tell(connection, "instance.unreachable", change(connection, rental, reason=reason))


def unreachable_counts(connection: Connection) -> dict[str, int]:
    """Return of how many running machines nobody knows how they are, by provider."""
    chosen = (rentals.c.state == "running") & rentals.c.reason.in_(UNREACHABLE)
    query = select(rentals.c.provider, func.count().label("unreachable")).where(chosen).group_by(rentals.c.provider)
    return {row.provider: row.unreachable for row in connection.execute(query)}


def miss(connection: Connection, rental_id: str, at: datetime) -> Rental:
    """Take note that the provider, asked for this machine alone, says that there is none."""
    rental = locked(connection, rental_id)
    if rental.state in ENDED or at < rental.moved_at:
        return rental
    if rental.state == "destroying":
        return end(connection, rental, at)
    count = rental.missing_count + 1
    if count >= MISSES_MAX and at - (rental.seen_at or rental.moved_at) >= timedelta(seconds=MISSED_S):
        logger.warning("instance is lost", contract_id=rental.id, instance_id=rental.instance_id)
        return lose(connection, rental, at)
    return change(connection, rental, missing_count=count)


def unseen_since(rental: Rental) -> datetime | None:
    """Return since when a running machine is out of its provider's sight; None for any other."""
    until = rental.seen_at if rental.expires_at is None else min(rental.seen_at or rental.expires_at, rental.expires_at)
    is_unseen = rental.state == "running" and until is not None and until > rental.metered_at
    return rental.metered_at if is_unseen else None


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
    if any(abs(new - getattr(rental, name)) > new // 1_000 for name, new in costs.items()):  # more than was rounded
        logger.warning("a provider's price has changed", contract_id=rental.id, **costs)
    if costs:
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
