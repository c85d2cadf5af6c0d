"""Settles calls: what each receipt costs, and one transfer for each customer and batch.

A worker spends from its lease, which the ledger holds; so a charge comes out of the lease of the worker that wrote
the receipt, then out of free credit. What is covered by neither (a worker that died with its books open, a lease
that expired) is written off: a customer never pays more than they have, and revenue still equals the receipts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import Connection, bindparam, or_, select, update

from gpuproxy.ledger.budgets import KEY_MARK, roots_of, spend
from gpuproxy.ledger.transfers import REVENUE, WRITE_OFF, Account, Transfer, credit_account, lock, post
from gpuproxy.pricing import Catalogue, cost_of, marked_up
from gpuproxy.store.schema import accounts, holds, receipts
from gpuproxy.types import Receipt

IDS_AT_ONCE = 1_000  # parameters of one query
Row = tuple[Any, ...]


class Call(NamedTuple):
    """A receipt that costs something; `owner` is who may charge the lease, see `leases`."""

    id: str
    owner: str
    user_id: str
    cost_nanousd: int
    key_id: str = ""


class Lease(NamedTuple):
    """A pending hold as far as settling needs it."""

    id: str
    remaining_nanousd: int
    posted_nanousd: int


def lease_owner(node: str, epoch: str, budget_key: str = "") -> str:
    """Return who owns the leases of a worker process on a node; those for keys with a budget of their own are apart."""
    return f"lease:{node}/{epoch}" + (f"{KEY_MARK}{budget_key}" if budget_key else "")


def priced(catalogue: Catalogue, owner: str, rows: Iterable[Row]) -> list[Call]:
    """Return the calls that cost something. About 2 µs for each row, nothing if there is no price."""
    if not catalogue:
        return []
    costs = ((row, _cost(Receipt(*row), catalogue)) for row in rows if row[_OUTCOME] != "open")
    return [Call(row[_ID], owner, row[_USER], cost, row[_KEY]) for row, cost in costs if cost]


def _cost(receipt: Receipt, catalogue: Catalogue) -> int:
    price = catalogue.find(receipt.model, receipt.upstream, receipt.started_ns)
    return cost_of(receipt, marked_up(price, receipt.markup_bps) if receipt.markup_bps else price)


def settle(connection: Connection, calls: Sequence[Call]) -> dict[str, str]:
    """Charge calls whose receipts are not stored yet; return the charge id of each, by receipt id.

    The receipts must be stored in the same transaction.
    """
    new = _unknown(connection, calls)
    if not new:
        return {}
    by_user: dict[str, list[Call]] = {}
    for call in new.values():
        by_user.setdefault(call.user_id, []).append(call)
    found = lock(connection, [*map(credit_account, by_user), REVENUE, WRITE_OFF])
    leases = _leases(connection, {call.owner for call in new.values()}, found)
    owners = _owners(connection, new.values(), leases)
    transfers: list[Transfer] = []
    drawn: dict[tuple[str, str], int] = {}
    charge_ids: dict[str, str] = {}
    for user_id, own in by_user.items():
        charge_id = str(uuid4())
        charge_ids.update((call.id, charge_id) for call in own)
        account = found.get(credit_account(user_id), Account(""))
        from_leases = _draw(own, owners, account.id, leases)
        drawn.update(from_leases)
        transfers += _transfers(account, sum(call.cost_nanousd for call in own), sum(from_leases.values()), charge_id)
    _take_from_leases(connection, drawn, leases)
    post(connection, transfers)
    _spend(connection, new.values())
    return charge_ids


def _unknown(connection: Connection, calls: Sequence[Call]) -> dict[str, Call]:
    """Return the calls whose receipts are not stored, by id: a receipt met again is not charged again."""
    new = {call.id: call for call in calls}
    for start in range(0, len(calls), IDS_AT_ONCE):
        ids = [call.id for call in calls[start : start + IDS_AT_ONCE]]
        for receipt_id in connection.scalars(select(receipts.c.id).where(receipts.c.id.in_(ids))):
            new.pop(receipt_id, None)
    return new


def _leases(connection: Connection, owners: Iterable[str], found: Iterable[str]) -> dict[tuple[str, str], Lease]:
    """Return the pending holds of these owners on these accounts, by owner and account."""
    shown = (holds.c.owner, holds.c.account_id, holds.c.id, holds.c.remaining_nanousd, holds.c.posted_nanousd)
    wanted = sorted(owners)
    is_owned = or_(holds.c.owner.in_(wanted), *(holds.c.owner.startswith(f"{owner}{KEY_MARK}") for owner in wanted))
    chosen = (holds.c.state == "pending") & is_owned & holds.c.account_id.in_(sorted(found))
    rows = connection.execute(select(*shown).where(chosen))
    return {(row.owner, row.account_id): Lease(*row[2:]) for row in rows}


def _owners(
    connection: Connection, calls: Iterable[Call], leases: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Return who owns the lease of a call, by its worker and key, where that is not the worker's for all keys."""
    marked = {owner for owner, _ in leases if KEY_MARK in owner}
    if not marked:
        return {}
    pairs = {(call.owner, call.key_id) for call in calls}
    roots = roots_of(connection, {key_id for _, key_id in pairs})
    owners = {pair: f"{pair[0]}{KEY_MARK}{roots.get(pair[1], pair[1])}" for pair in pairs}
    return {pair: owner for pair, owner in owners.items() if owner in marked}


def _draw(
    calls: Iterable[Call], owners: dict[tuple[str, str], str], account_id: str, leases: dict[tuple[str, str], Lease]
) -> dict[tuple[str, str], int]:
    """Return how much of what one customer's calls cost comes out of which lease."""
    drawn: dict[tuple[str, str], int] = {}
    for call in calls:
        key = (owners.get((call.owner, call.key_id), call.owner), account_id)
        if key in leases:
            wanted = drawn.get(key, 0) + call.cost_nanousd
            drawn[key] = min(wanted, leases[key].remaining_nanousd)
    return drawn


def _spend(connection: Connection, calls: Iterable[Call]) -> None:
    charged: dict[tuple[str, str], int] = {}
    for call in calls:
        subject = (call.user_id, call.key_id)
        charged[subject] = charged.get(subject, 0) + call.cost_nanousd
    spend(connection, charged)


def _transfers(account: Account, cost_nanousd: int, drawn_nanousd: int, charge_id: str) -> list[Transfer]:
    charged = min(cost_nanousd, drawn_nanousd + account.free_nanousd)
    parts = [
        Transfer(account.id, REVENUE, charged, "usage", f"usage:{charge_id}", charge_id),
        Transfer(WRITE_OFF, REVENUE, cost_nanousd - charged, "write_off", f"write_off:{charge_id}", charge_id),
    ]
    return [part for part in parts if part.amount_nanousd]


def _take_from_leases(
    connection: Connection, drawn: dict[tuple[str, str], int], leases: dict[tuple[str, str], Lease]
) -> None:
    """Turn held credit into free credit of the same accounts, which the transfers then take."""
    taken = [(leases[key], key[1], amount) for key, amount in drawn.items() if amount]
    if not taken:
        return
    hold = update(holds).where(holds.c.id == bindparam("changed"))
    connection.execute(
        hold.values(remaining_nanousd=bindparam("remaining"), posted_nanousd=bindparam("posted")),
        [
            {
                "changed": lease.id,
                "remaining": lease.remaining_nanousd - amount,
                "posted": lease.posted_nanousd + amount,
            }
            for lease, _, amount in taken
        ],
    )
    account = update(accounts).where(accounts.c.id == bindparam("changed"))
    connection.execute(
        account.values(held_nanousd=accounts.c.held_nanousd - bindparam("amount")),
        [{"changed": account_id, "amount": amount} for _, account_id, amount in taken],
    )


_ID, _USER, _KEY, _OUTCOME = (Receipt.__struct_fields__.index(name) for name in ("id", "user_id", "key_id", "outcome"))
