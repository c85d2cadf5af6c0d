"""The customer's money and budgets against the clock: warn in time, destroy before more is used than is there."""

from datetime import datetime

from sqlalchemy import Connection, select

from gpuproxy.fleet.moves import TIME_IS_OVER, begin_destroy, tell
from gpuproxy.fleet.purse import Lasting, top_up, unposted
from gpuproxy.fleet.rentals import Rental, change, in_states, locked
from gpuproxy.fleet.states import ENDED, LIVING
from gpuproxy.ledger.budgets import refused
from gpuproxy.pricing import seconds_paid
from gpuproxy.store.schema import holds, rentals

NO_MONEY = "the account's credit is used up"
NO_BUDGET = "a budget is used up"
WARNINGS_S = (900, 300)  # this much money left is told, once each
CALM_S = 1_000  # a hold over that needs no look: it is filled to AHEAD_S when it comes below


def in_need(connection: Connection, now: datetime) -> list[Rental]:
    """Return the rentals to check: all but those whose hold is well over the first warning, so few of many."""
    held = select(rentals.c.id, holds.c.remaining_nanousd).join(holds, rentals.c.hold_id == holds.c.id)
    remaining = {row.id: row.remaining_nanousd for row in connection.execute(held.where(rentals.c.state.in_(LIVING)))}
    return [each for each in in_states(connection) if not _is_calm(each, remaining.get(each.id, 0), now)]


def _is_calm(rental: Rental, remaining_nanousd: int, now: datetime) -> bool:
    if rental.warned_s or (rental.expires_at is not None and rental.expires_at <= now):
        return False
    rate = rental.rate_nanousd_per_hour
    return seconds_paid(max(0, remaining_nanousd - unposted(rental, now)), rate) > CALM_S


def check(connection: Connection, rental_id: str, now: datetime, next_s: float) -> Rental:
    """Keep a rental's hold filled; warn its owner; begin its end when money or budget do not last for `next_s` more.

    So what it costs never exceeds what is held. Also ends what was rented until now.
    """
    rental = locked(connection, rental_id)
    if rental.state in (*ENDED, "destroying"):
        return rental
    if rental.expires_at is not None and rental.expires_at <= now:
        return begin_destroy(connection, rental, rental.expires_at, TIME_IS_OVER)
    if not rental.rate_nanousd_per_hour:
        return rental
    lasting = top_up(connection, rental, now)
    rental = _warn(connection, rental, lasting)
    if lasting.seconds >= next_s:
        return rental
    if lasting.budget is not None:
        refused(connection, lasting.budget)
    return begin_destroy(connection, rental, now, NO_BUDGET if lasting.budget else NO_MONEY)


def _warn(connection: Connection, rental: Rental, lasting: Lasting) -> Rental:
    """Tell of each mark once, when it is passed; whoever pays in is warned anew next time."""
    passed = [mark for mark in WARNINGS_S if lasting.seconds < mark]
    mark = passed[-1] if passed else 0
    if mark == rental.warned_s:
        return rental
    if mark and (not rental.warned_s or mark < rental.warned_s):
        budget_id = lasting.budget.id if lasting.budget else ""
        tell(connection, "instance.warning", rental, seconds_left=lasting.seconds, budget_id=budget_id)
    return change(connection, rental, warned_s=mark)
