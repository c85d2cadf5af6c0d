"""One rental from one state to the next: meter, change, event and word to the workers in one transaction."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, insert

from gpuproxy.access.changes import INSTANCES_CHANGED
from gpuproxy.events.outbox import record
from gpuproxy.fleet.meter import PREPAID, charge_commitment, commit_cost, meter, proven_until, rates_in
from gpuproxy.fleet.purse import release
from gpuproxy.fleet.rentals import Rental, change
from gpuproxy.fleet.states import ENDED, State, check_move
from gpuproxy.ledger.book import format_usd
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.schema import changes

EVENT_BY_STATE: dict[State, str] = {
    "running": "instance.running",
    "stopped": "instance.stopped",
    "destroyed": "instance.destroyed",
    "failed": "instance.failed",
}
TIME_IS_OVER = "the time it was rented for is over"
NOT_ALL = "not all of the reservation could be had"
LOST = "lost: the provider has it no more"
REASON_CHARACTERS_MAX = 500

logger = get_logger(__name__)


def move(connection: Connection, rental: Rental, to: State, at: datetime, **values: Any) -> Rental:
    """Move a rental, whose row is locked, to another state; `values` are columns that change with it.

    It is metered up to `at` with the rates of the state it leaves, as far as it was seen: nobody knows what has become
    of it since. Raises IllegalMoveError.
    """
    check_move(rental.state, to)
    before = rental.state
    rental = meter(connection, rental, proven_until(rental, at))
    moved_at = max(at, rental.metered_at)
    values = {"state": to, "moved_at": moved_at, "missing_count": 0, **values}
    if "reason" in values:
        values["reason"] = values["reason"][:REASON_CHARACTERS_MAX]
    if to == "running":
        values.setdefault("running_at", rental.running_at or moved_at)
        if rental.basis == PREPAID and rental.running_at is None:  # what was paid for begins now
            values.setdefault("expires_at", moved_at + timedelta(hours=rental.committed_hours))
    if to in ENDED:
        values.setdefault("ended_at", moved_at)
    rental = change(connection, rental, **values)
    rental = change(connection, rental, **rates_in(rental, to))
    if to in (*ENDED, "destroying"):  # however long it takes to be gone, the customer pays no more
        release(connection, rental)
    if "running" in (before, to):
        announce(connection, rental.user_id)
    if to in EVENT_BY_STATE:
        tell(connection, EVENT_BY_STATE[to], rental)
    return rental


def adopt(connection: Connection, rental: Rental, native_id: str, at: datetime, **values: Any) -> Rental:
    """Note that the provider has made the machine: a pending rental is provisioning from now on."""
    rental = move(connection, rental, "provisioning", at, native_id=native_id, seen_at=at, **values)
    if rental.basis == PREPAID:
        rental = commit_cost(connection, rental)
    tell(connection, "instance.created", rental)
    return rental


def begin_destroy(
    connection: Connection, rental: Rental, at: datetime, reason: str, has_failed: bool = False
) -> Rental:
    """Take leave of a rental: the customer pays no more from now on. Again changes nothing.

    What was paid beforehand and is given up without need is charged to the end of what was ordered; a reservation that
    is not had whole is nobody's wish.
    """
    if rental.state in (*ENDED, "destroying"):
        return rental
    if rental.basis == PREPAID and rental.native_id and not has_failed and reason != NOT_ALL:
        rental = charge_commitment(connection, rental)
        rental = change(connection, rental, rate_nanousd_per_hour=0)
    return move(connection, rental, "destroying", at, reason=reason, has_failed=has_failed)


def is_overdue(rental: Rental, at: datetime, within_s: float) -> bool:
    """Tell whether a machine has had its time to come up."""
    return rental.state in ("pending", "provisioning") and at - rental.moved_at > timedelta(seconds=within_s)


def overdue(connection: Connection, rental: Rental, at: datetime, within_s: float) -> Rental:
    """Wait no longer for a machine to run. One that has run is stopped, for the sake of its disk, where that goes."""
    if rental.running_at is not None and rental.basis != PREPAID:
        return move(connection, rental, "stopping", at, reason=f"did not run again within {within_s:g} s")
    return begin_destroy(connection, rental, at, f"did not run within {within_s:g} s", has_failed=True)


def end(connection: Connection, rental: Rental, at: datetime) -> Rental:
    """Note that the provider has nothing left of a rental that was being destroyed."""
    return move(connection, rental, "failed" if rental.has_failed else "destroyed", at)


def lose(connection: Connection, rental: Rental, at: datetime) -> Rental:
    """Close a rental whose machine is gone without our doing: it is billed up to when it was last seen.

    One that was paid beforehand, and whose time is over, has come to its end.
    """
    if rental.basis == PREPAID and rental.expires_at is not None and rental.expires_at <= at:
        rental = begin_destroy(connection, rental, rental.expires_at, TIME_IS_OVER)
    if rental.state == "destroying":
        return end(connection, rental, at)
    last = rental.seen_at or rental.metered_at
    return move(connection, rental, "destroyed", at, reason=LOST, ended_at=max(last, rental.metered_at))


def announce(connection: Connection, user_id: str) -> None:
    """Let workers on every node forget which machines a user has."""
    row = {"kind": INSTANCES_CHANGED, "subject_id": user_id, "at": datetime.now(UTC)}
    connection.execute(insert(changes).values(**row))


def tell(connection: Connection, name: str, rental: Rental, **more: Any) -> None:
    """Record an event about a rental for its owner, and log it for the operator: ``Instance created``."""
    record(connection, name, rental.user_id, {**facts(rental), **more})
    logger.info(
        name.replace(".", " ").capitalize(),
        user_id=rental.user_id, instance_id=rental.instance_id, provider=rental.provider, contract_id=rental.id,
        reason=rental.reason,
    )  # fmt: skip


def facts(rental: Rental) -> dict[str, Any]:
    """Return what an event says of a rental."""
    return {
        "contract_id": rental.id,
        "instance_id": rental.instance_id,
        "provider": rental.provider,
        "gpu_model": rental.gpu_model,
        "gpu_count": rental.gpu_count,
        "status": rental.state,
        "reason": rental.reason,
        "label": rental.label,
        "price_per_hour": float(format_usd(rental.price_nanousd_per_hour)),
        "cost": float(format_usd(rental.charged_nanousd)),
    }
