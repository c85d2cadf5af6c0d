"""What a rental costs: the customer's price and the provider's cost, counted apart, exact to the nanodollar.

Both grow with time at the rates in force since ``metered_at``; a move to another state meters first and then sets the
rates of the new one. Only what the provider proves is metered: the time between two moments at which it said, asked
for this machine alone, that it runs. So nobody pays for one that is lost, nor on the word of a list that is out of
date. The customer's meter stops with their wish to stop, the provider's when the machine is proven to be gone. What
the customer owes comes out of the rental's hold, which runs ahead of it.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from gpuproxy.fleet.purse import fill, lock_books, payable
from gpuproxy.fleet.rentals import Rental, change, microseconds
from gpuproxy.fleet.states import State
from gpuproxy.ledger import holds
from gpuproxy.ledger.budgets import spend
from gpuproxy.ledger.transfers import PROVIDER_COST, REVENUE, WRITE_OFF, Transfer, post
from gpuproxy.pricing import Accrued

PREPAID = "prepaid"


def rates_in(rental: Rental, state: State) -> dict[str, int]:
    """Return the rates of a rental in a state, as columns.

    Storage costs from the first byte on, but the customer pays for it only once the machine has run.
    """
    storage = rental.storage_price_nanousd_per_hour if rental.running_at else 0
    rate = {"running": rental.price_nanousd_per_hour, "stopping": storage, "stopped": storage, "provisioning": storage}
    cost = {
        "provisioning": rental.storage_cost_nanousd_per_hour,
        "running": rental.cost_nanousd_per_hour,
        "stopping": rental.cost_nanousd_per_hour,
        "stopped": rental.storage_cost_nanousd_per_hour,
        "destroying": rental.cost_rate_nanousd_per_hour,  # as before, until it is gone
    }
    cost_rate = 0 if rental.basis == PREPAID else cost.get(state, 0)
    return {"rate_nanousd_per_hour": rate.get(state, 0), "cost_rate_nanousd_per_hour": cost_rate}


def meter(connection: Connection, rental: Rental, until: datetime) -> Rental:
    """Charge what has come together since the rental was last metered; a time before that changes nothing."""
    elapsed_us = microseconds(rental.metered_at, until)
    if not elapsed_us:
        return rental
    price = Accrued(rental.accrued_nanousd, rental.accrued_rest).after(rental.rate_nanousd_per_hour, elapsed_us)
    cost = Accrued(rental.cost_accrued_nanousd, rental.cost_accrued_rest)
    cost = cost.after(rental.cost_rate_nanousd_per_hour, elapsed_us)
    spent = {}
    if rental.state == "running":
        spent["running_us"] = rental.running_us + elapsed_us
    elif rental.running_at is not None and rental.state in ("stopping", "stopped", "provisioning"):
        spent["stopped_us"] = rental.stopped_us + elapsed_us
    return settle(connection, rental, price, cost, metered_at=until, **spent)


def prove(connection: Connection, rental: Rental, at: datetime, since: datetime | None) -> Rental:
    """Charge a running machine that is proven to run at a time; `since` is when it was seen before.

    If it was not proven to run then, nobody knows how long it has run again: that time is passed over.
    """
    if since is not None and since > rental.metered_at:
        return change(connection, rental, metered_at=max(at, rental.metered_at))
    return meter(connection, rental, at)


def proven_until(rental: Rental, at: datetime) -> datetime:
    """Return up to when a rental may be metered if it leaves its state at a time: what costs must have been seen.

    One that runs is metered at every proof, so there is nothing after `metered_at`.
    """
    if rental.state == "running":
        return rental.metered_at
    is_costly = rental.state in ("provisioning", "stopping", "stopped")
    return min(at, rental.seen_at or at) if is_costly else at


def settle(connection: Connection, rental: Rental, price: Accrued, cost: Accrued, **values: Any) -> Rental:
    """Post what is due and not posted yet, of price and cost; write both to the rental with other columns."""
    lock_books(connection, rental)
    charged, written_off = _charge(connection, rental, price.due_nanousd)
    return change(
        connection,
        rental,
        accrued_nanousd=price.nanousd,
        accrued_rest=price.rest,
        cost_accrued_nanousd=cost.nanousd,
        cost_accrued_rest=cost.rest,
        charged_nanousd=rental.charged_nanousd + charged,
        written_off_nanousd=rental.written_off_nanousd + written_off,
        cost_posted_nanousd=rental.cost_posted_nanousd + _owe(connection, rental, cost.due_nanousd),
        **values,
    )


def commit_cost(connection: Connection, rental: Rental) -> Rental:
    """Owe the provider all that is paid beforehand, from the moment it has taken the order."""
    price = Accrued(rental.accrued_nanousd, rental.accrued_rest)
    return settle(connection, rental, price, Accrued(rental.committed_hours * rental.cost_nanousd_per_hour))


def charge_commitment(connection: Connection, rental: Rental) -> Rental:
    """Charge the customer the rest of the hours they ordered: the provider has been paid for them."""
    whole = rental.committed_hours * rental.price_nanousd_per_hour
    price = Accrued(max(whole, rental.accrued_nanousd), 0 if whole >= rental.accrued_nanousd else rental.accrued_rest)
    cost = Accrued(rental.cost_accrued_nanousd, rental.cost_accrued_rest)
    return settle(connection, rental, price, cost)


def _charge(connection: Connection, rental: Rental, due_nanousd: int) -> tuple[int, int]:
    """Charge up to `due_nanousd` in all; what the customer has not is written off. Return both."""
    owed = due_nanousd - rental.charged_nanousd - rental.written_off_nanousd
    if owed <= 0:
        return 0, 0
    key = f"rental:{rental.id}:{due_nanousd}"
    charged = min(owed, fill(connection, rental, owed))
    if charged:
        holds.draw(connection, rental.hold_id, charged, "rental", key)
        spend(connection, {(rental.user_id, rental.key_id): charged})
    if owed > charged:
        post(connection, [Transfer(WRITE_OFF, REVENUE, owed - charged, "write_off", f"{key}:write_off")])
    return charged, owed - charged


def owe_traffic(connection: Connection, rental: Rental, amount_nanousd: int) -> Rental:
    """Owe the provider what it took for a rental's traffic, once it has ended; no customer's account is locked.

    Again changes nothing. Raises GatewayError CONFLICT for another amount.
    """
    key = f"rental_traffic:{rental.id}"
    if not post(connection, [Transfer(PROVIDER_COST, payable(rental.provider), amount_nanousd, "rental_cost", key)]):
        return rental
    return change(connection, rental, cost_posted_nanousd=rental.cost_posted_nanousd + amount_nanousd)


def _owe(connection: Connection, rental: Rental, due_nanousd: int) -> int:
    owed = due_nanousd - rental.cost_posted_nanousd
    if owed > 0:
        key = f"rental_cost:{rental.id}:{due_nanousd}"
        post(connection, [Transfer(PROVIDER_COST, payable(rental.provider), owed, "rental_cost", key)])
    return max(0, owed)
