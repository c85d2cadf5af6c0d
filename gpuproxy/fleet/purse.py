"""What a rental is paid from: its hold, kept ahead of what it costs, out of the customer's credit, within budgets.

A rental counts in the budgets of its account, and of the key it was rented with, as calls do: what was charged in the
window and what is held never exceed one together. Rentals' holds live over the end of a window; what is charged then
counts in the next.
"""

import time
from datetime import datetime

from msgspec import Struct
from sqlalchemy import Connection

from gpuproxy.errors import GatewayError
from gpuproxy.fleet.rentals import Rental, living_of, microseconds
from gpuproxy.ledger import holds
from gpuproxy.ledger.budgets import KEY_MARK, RENTAL, Budget, rooms
from gpuproxy.ledger.transfers import PROVIDER_COST, REVENUE, WRITE_OFF, credit_account, lock
from gpuproxy.pricing import Accrued, seconds_paid

AHEAD_S = 1_200  # what a hold is kept filled to: over the first warning


class Lasting(Struct, frozen=True):
    """For how many seconds money lasts, and the budget that ends first; None: it is the credit."""

    seconds: int
    budget: Budget | None = None


def payable(provider: str) -> str:
    """Return the account of what a provider is owed."""
    return f"payable.{provider}"


def lock_books(connection: Connection, rental: Rental) -> None:
    """Lock every account a rental may move, at once and so in the ledger's one order, before the first is changed."""
    lock(connection, [credit_account(rental.user_id), payable(rental.provider), PROVIDER_COST, REVENUE, WRITE_OFF])


def first_hold(connection: Connection, user_id: str, key_id: str, rental_id: str, amount_nanousd: int) -> holds.Hold:
    """Set aside what a rental needs to begin. Raises GatewayError INSUFFICIENT_CREDITS, BUDGET_EXCEEDED."""
    lock(connection, [credit_account(user_id)])
    check_budgets(connection, user_id, key_id, amount_nanousd)
    name = f"{RENTAL}{rental_id}"
    owner = f"{name}{KEY_MARK}{key_id}" if key_id else name
    return holds.place(connection, user_id, amount_nanousd, name, owner)


def check_budgets(connection: Connection, user_id: str, key_id: str, amount_nanousd: int) -> None:
    """Raise BudgetError if a budget has not so much left."""
    for room in rooms(connection, user_id, key_id):
        if room.tightest is not None and room.nanousd < amount_nanousd:
            raise BudgetError(room.tightest)


class BudgetError(GatewayError):
    """A budget has not enough left to rent or start something; it is told of once what was begun is taken back."""

    def __init__(self, budget: Budget) -> None:
        left_s = max(1, budget.ends_ns(time.time()) // 10**9 - int(time.time()))
        whose = "a budget of this key" if budget.key_id else "a budget of this account"
        message = f"this needs more than {whose} has left; wait {left_s} s until its window ends, or raise it"
        super().__init__("BUDGET_EXCEEDED", message, left_s)
        self.budget = budget


def release(connection: Connection, rental: Rental) -> None:
    """Give the rest of the hold back: nothing more will be charged. Again changes nothing."""
    lock_books(connection, rental)
    hold = holds.get(connection, rental.hold_id)
    if hold is None or hold.state != "pending":
        return
    if hold.posted_nanousd:
        holds.settle(connection, hold.id, 0, "rental")
    else:
        holds.void(connection, hold.id)


def unposted(rental: Rental, now: datetime) -> int:
    """Return what will be charged at most for the time since it was last metered or seen."""
    since = max(rental.metered_at, rental.seen_at or rental.metered_at)
    return Accrued().after(rental.rate_nanousd_per_hour, microseconds(since, now)).due_nanousd


def top_up(connection: Connection, rental: Rental, now: datetime) -> Lasting:
    """Fill the hold to AHEAD_S as far as credit and budgets go; return how long from `now` they last.

    Of free credit, and of what a budget leaves, a user's other rentals take their part too, by their rates.
    """
    rate = rental.rate_nanousd_per_hour
    if not rate:
        return Lasting(seconds_paid(0, 0))
    owed = unposted(rental, now)
    wanted = owed + Accrued().after(rate, AHEAD_S * 1_000_000).due_nanousd
    held_s = seconds_paid(max(0, fill(connection, rental, wanted) - owed), rate)
    free = lock(connection, [credit_account(rental.user_id)])[credit_account(rental.user_id)].free_nanousd
    rates = max(rate, sum(each.rate_nanousd_per_hour for each in living_of(connection, rental.user_id)))
    lasting = Lasting(held_s + seconds_paid(free, rates))
    for room in rooms(connection, rental.user_id, rental.key_id):
        assert room.tightest is not None
        left_s = held_s + seconds_paid(room.nanousd, rates)
        if left_s < lasting.seconds and time.time() + left_s < room.tightest.ends_ns(time.time()) / 1e9:
            lasting = Lasting(left_s, room.tightest)
    return lasting


def reserve(connection: Connection, rental: Rental, seconds: int) -> None:
    """Fill the hold for so long a time of running. Raises GatewayError INSUFFICIENT_CREDITS, BUDGET_EXCEEDED."""
    wanted = Accrued().after(rental.price_nanousd_per_hour, seconds * 1_000_000).due_nanousd
    held = fill(connection, rental, wanted)
    if held < wanted:
        check_budgets(connection, rental.user_id, rental.key_id, wanted - held)
        message = f"the account has not enough credit to run this for {seconds // 60} minutes"
        raise GatewayError("INSUFFICIENT_CREDITS", message)


def fill(connection: Connection, rental: Rental, wanted_nanousd: int) -> int:
    """Let the hold have `wanted_nanousd` as far as credit and budgets go; return what it has."""
    hold = holds.get(connection, rental.hold_id)
    if hold is None or hold.state != "pending":
        return 0
    lacking = wanted_nanousd - hold.remaining_nanousd
    if lacking <= 0:
        return hold.remaining_nanousd
    account_id = credit_account(rental.user_id)
    lacking = min(lacking, lock(connection, [account_id])[account_id].free_nanousd)
    lacking = min([lacking, *(room.nanousd for room in rooms(connection, rental.user_id, rental.key_id))])
    if lacking > 0 and holds.extend(connection, hold.id, lacking):
        return hold.remaining_nanousd + lacking
    return hold.remaining_nanousd
