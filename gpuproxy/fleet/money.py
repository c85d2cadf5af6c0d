"""The customer's money against the clock: warn in time, and destroy before more is used than is there."""

from datetime import datetime

from sqlalchemy import Connection

from gpuproxy.fleet.meter import WARNINGS_S, top_up
from gpuproxy.fleet.moves import begin_destroy, tell
from gpuproxy.fleet.rentals import Rental, change, locked
from gpuproxy.fleet.states import ENDED

NO_MONEY = "the account's credit is used up"
TIME_IS_OVER = "the time it was rented for is over"


def check(connection: Connection, rental_id: str, now: datetime, next_s: float) -> Rental:
    """Keep a rental's hold filled; warn its owner; begin its end when the money does not last for `next_s` more.

    So what it costs never exceeds what is held. Also ends what was rented until now.
    """
    rental = locked(connection, rental_id)
    if rental.state in (*ENDED, "destroying"):
        return rental
    if rental.expires_at is not None and rental.expires_at <= now:
        return begin_destroy(connection, rental, rental.expires_at, TIME_IS_OVER)
    if not rental.rate_nanousd_per_hour:
        return rental
    left_s = top_up(connection, rental, now)
    rental = _warn(connection, rental, left_s)
    return begin_destroy(connection, rental, now, NO_MONEY) if left_s < next_s else rental


def _warn(connection: Connection, rental: Rental, left_s: int) -> Rental:
    """Tell of each mark once, when it is passed; whoever pays in is warned anew next time."""
    passed = [mark for mark in WARNINGS_S if left_s < mark]
    mark = passed[-1] if passed else 0
    if mark == rental.warned_s:
        return rental
    if mark and (not rental.warned_s or mark < rental.warned_s):
        tell(connection, "instance.warning", rental, seconds_left=left_s)
    return change(connection, rental, warned_s=mark)
