"""Settles calls: one transfer for each customer, batch and day of calls.

A worker spends from its lease, which the ledger holds; so a charge comes out of the lease of the worker that wrote
the receipt, then out of free credit. What is covered by neither (a worker that died with its books open, a lease
that expired) is written off: a customer never pays more than they have, and revenue still equals the receipts.

No charge is for calls of two days (UTC): receipts go by the day when they are old, and so none is torn.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from uuid import uuid4

from sqlalchemy import Connection, bindparam, or_, select, update

from gpuproxy.ledger.budgets import KEY_MARK, roots_of, spend
from gpuproxy.ledger.transfers import (
    REVENUE,
    WRITE_OFF,
    Account,
    Transfer,
    credit_account,
    lock,
    make_missing,
    post_locked,
)
from gpuproxy.store.schema import holds

DAY_NS = 86_400 * 10**9

_LEASES = select(
    holds.c.owner, holds.c.account_id, holds.c.id, holds.c.remaining_nanousd, holds.c.posted_nanousd
).where(
    holds.c.state == "pending",
    or_(holds.c.owner.in_(bindparam("owners", expanding=True)), holds.c.owner.like(bindparam("marked"))),
    holds.c.account_id.in_(bindparam("accounts", expanding=True)),
)
_DRAW = (
    update(holds)
    .where(holds.c.id == bindparam("changed"))
    .values(remaining_nanousd=bindparam("remaining"), posted_nanousd=bindparam("posted"))
)


class Payer(NamedTuple):
    """Who pays for a call: `owner` may charge the lease, see `leases`; `day` is that of the call, from 1970."""

    owner: str
    user_id: str
    key_id: str = ""
    day: int = 0


class Lease(NamedTuple):
    """A pending hold as far as settling needs it."""

    id: str
    remaining_nanousd: int
    posted_nanousd: int


def lease_owner(node: str, epoch: str, budget_key: str = "") -> str:
    """Return who owns the leases of a worker process on a node; those for keys with a budget of their own are apart."""
    return f"lease:{node}/{epoch}" + (f"{KEY_MARK}{budget_key}" if budget_key else "")


def settle(connection: Connection, owed: Mapping[Payer, int]) -> dict[tuple[str, int], str]:
    """Charge what is owed for calls that were not stored before; return the charge ids, by customer and day.

    The receipts must be stored in the same transaction.
    """
    if not owed:
        return {}
    by_user: dict[str, dict[Payer, int]] = {}
    for payer, cost in owed.items():
        by_user.setdefault(payer.user_id, {})[payer] = cost
    make_missing(connection, (REVENUE, WRITE_OFF))
    found = lock(connection, [*map(credit_account, by_user), REVENUE, WRITE_OFF])
    leases = _leases(connection, {payer.owner for payer in owed}, found)
    owners = _owners(connection, owed, leases)
    transfers: list[Transfer] = []
    drawn: dict[tuple[str, str], int] = {}
    charge_ids: dict[tuple[str, int], str] = {}
    for user_id, own in by_user.items():
        account = found.get(credit_account(user_id), Account(""))
        from_leases = _draw(own, owners, account.id, leases)
        drawn.update(from_leases)
        covered = sum(from_leases.values()) + account.free_nanousd
        for day, cost in _by_day(own):
            charge_id = charge_ids[user_id, day] = str(uuid4())
            transfers += _transfers(account, cost, min(cost, covered), charge_id)
            covered -= min(cost, covered)
    post_locked(connection, transfers, _take_from_leases(connection, drawn, leases))
    _spend(connection, owed)
    return charge_ids


def _by_day(owed: Mapping[Payer, int]) -> list[tuple[int, int]]:
    days: dict[int, int] = {}
    for payer, cost in owed.items():
        days[payer.day] = days.get(payer.day, 0) + cost
    return sorted(days.items())


def _leases(connection: Connection, owners: Iterable[str], found: Iterable[str]) -> dict[tuple[str, str], Lease]:
    """Return the pending holds of these owners on these accounts, by owner and account."""
    wanted = set(owners)
    node = next(iter(wanted)).partition("/")[0]
    told = {"owners": sorted(wanted), "marked": f"{node}/%{KEY_MARK}%", "accounts": sorted(found)}
    rows = connection.execute(_LEASES, told)
    return {(row[0], row[1]): Lease(*row[2:]) for row in rows if row[0].partition(KEY_MARK)[0] in wanted}


def _owners(
    connection: Connection, payers: Iterable[Payer], leases: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return who owns the lease that pays, by the worker and key, where that is not the worker's for all keys."""
    marked = {owner for owner, _ in leases if KEY_MARK in owner}
    if not marked:
        return {}
    pairs = {(payer.owner, payer.key_id) for payer in payers}
    roots = roots_of(connection, {key_id for _, key_id in pairs})
    owners = {pair: f"{pair[0]}{KEY_MARK}{roots.get(pair[1], pair[1])}" for pair in pairs}
    return {pair: owner for pair, owner in owners.items() if owner in marked}


def _draw(
    owed: Mapping[Payer, int],
    owners: Mapping[tuple[str, str], str],
    account_id: str,
    leases: Mapping[tuple[str, str], Lease],
) -> dict[tuple[str, str], int]:
    """Return how much of what one customer owes comes out of which lease."""
    drawn: dict[tuple[str, str], int] = {}
    for payer, cost in owed.items():
        key = (owners.get((payer.owner, payer.key_id), payer.owner), account_id)
        if key in leases:
            drawn[key] = min(drawn.get(key, 0) + cost, leases[key].remaining_nanousd)
    return drawn


def _spend(connection: Connection, owed: Mapping[Payer, int]) -> None:
    charged: dict[tuple[str, str], int] = {}
    for payer, cost in owed.items():
        subject = (payer.user_id, payer.key_id)
        charged[subject] = charged.get(subject, 0) + cost
    spend(connection, charged)


def _transfers(account: Account, cost_nanousd: int, charged: int, charge_id: str) -> list[Transfer]:
    made = []
    if charged:
        made.append(Transfer(account.id, REVENUE, charged, "usage", f"usage:{charge_id}", charge_id))
    if lacking := cost_nanousd - charged:
        made.append(Transfer(WRITE_OFF, REVENUE, lacking, "write_off", f"write_off:{charge_id}", charge_id))
    return made


def _take_from_leases(
    connection: Connection, drawn: Mapping[tuple[str, str], int], leases: Mapping[tuple[str, str], Lease]
) -> dict[str, int]:
    """Draw on the holds; return by how much less is held, by account."""
    rows = []
    released: dict[str, int] = {}
    for key, amount in drawn.items():
        if amount:
            lease = leases[key]
            left, posted = lease.remaining_nanousd - amount, lease.posted_nanousd + amount
            rows.append({"changed": lease.id, "remaining": left, "posted": posted})
            released[key[1]] = released.get(key[1], 0) + amount
    if rows:
        connection.execute(_DRAW, rows)
    return released
