"""Tells customers once that little credit is left, until credit is added again.

What may be spent counts: credit that is not held, and the overdraft. Nothing is paid for that by what moves money: the
accounts are looked through now and then, which takes a database 20 to 50 ms for 100,000 of them.
"""

from sqlalchemy import ColumnElement, Connection, and_, func, not_, select, update

from gpuproxy.events.outbox import record
from gpuproxy.ledger.transfers import CREDIT, credit_account, lock, open_accounts
from gpuproxy.store.schema import accounts

TELL_MAX = 200  # of one transaction

_column = accounts.c
_spendable = _column.posted_nanousd - _column.held_nanousd + _column.overdraft_nanousd


def find_low(connection: Connection, threshold_nanousd: int) -> list[str]:
    """Return accounts that are below their threshold, or this one, and whose owners were not told; TELL_MAX at most."""
    return list(connection.scalars(select(_column.id).where(_is_low(threshold_nanousd)).limit(TELL_MAX)))


def tell_low(connection: Connection, account_ids: list[str], threshold_nanousd: int) -> int:
    """Record ``credits.low`` for those of the accounts that are still low; return how many."""
    lock(connection, account_ids)
    low = func.coalesce(_column.low_nanousd, threshold_nanousd).label("low")
    query = select(_column.id, _column.owner_user_id, _spendable.label("left"), low)
    found = connection.execute(query.where(_column.id.in_(account_ids), _is_low(threshold_nanousd))).all()
    for row in found:
        record(connection, "credits.low", row.owner_user_id, _told(row.left, row.low))
    is_told = _column.id.in_([row.id for row in found])
    connection.execute(update(accounts).where(is_told).values(is_low_told=True))
    return len(found)


def set_threshold(connection: Connection, user_id: str, threshold_nanousd: int | None) -> None:
    """Let a customer be told below so much; 0: never, None: as everybody."""
    account_id = credit_account(user_id)
    open_accounts(connection, [account_id])
    values = {"low_nanousd": threshold_nanousd, "is_low_told": False}
    connection.execute(update(accounts).where(_column.id == account_id).values(**values))


def threshold_of(connection: Connection, user_id: str) -> int | None:
    """Return below what a customer wants to be told; None: they have not said."""
    return connection.scalar(select(_column.low_nanousd).where(_column.id == credit_account(user_id)))


def _is_low(threshold_nanousd: int) -> ColumnElement[bool]:
    is_customers = and_(_column.kind == CREDIT, not_(_column.is_low_told))
    return and_(is_customers, _spendable < func.coalesce(_column.low_nanousd, threshold_nanousd))


def _told(left_nanousd: int, threshold_nanousd: int) -> dict[str, object]:
    return {
        "credits_remaining": left_nanousd / 1e9,
        "credits_remaining_nanousd": left_nanousd,
        "threshold": threshold_nanousd / 1e9,
        "threshold_nanousd": threshold_nanousd,
    }
