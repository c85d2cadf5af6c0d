"""The customer's money and budgets against the clock: warn in time, destroy before more is used than is there."""

from datetime import datetime

from sqlalchemy import Connection

from gpuproxy.fleet.moves import TIME_IS_OVER, begin_destroy, tell
from gpuproxy.fleet.purse import Lasting, top_up
from gpuproxy.fleet.rentals import Rental, change, locked
from gpuproxy.fleet.states import ENDED
from gpuproxy.ledger.budgets import refused

NO_MONEY = "the account's credit is used up"
NO_BUDGET = "a budget is used up"
WARNINGS_S = (900, 300)  # this much money left is told, once each


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
