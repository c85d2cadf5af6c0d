"""What customers see of their account: what is left, and what moved it."""

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct
from sqlalchemy import BigInteger, ColumnElement, Subquery, cast, func, literal, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.ledger.transfers import credit_account
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, transfers

ROWS_MAX = 1_000


class Credits(Struct, frozen=True):
    """A customer's account, in nanodollars: ``total`` came in, ``held`` is set aside for running calls and rentals.

    ``remaining`` is what may be spent now, without the overdraft; below 0 the overdraft is in use.
    """

    remaining_nanousd: int = 0
    total_nanousd: int = 0
    held_nanousd: int = 0
    overdraft_nanousd: int = 0


class Transaction(Struct, frozen=True):
    """One transfer as its customer sees it: ``amount`` is over 0 when it came in. ``charge_id`` is in the receipts."""

    id: str
    kind: str
    amount_nanousd: int
    created_at: datetime
    charge_id: str


async def credits_of(store: Store, user_id: str) -> Credits:
    """Return a customer's account; one that never had credit has nothing."""
    async with store.reading() as connection:
        return await credits_within(connection, user_id)


async def credits_within(connection: AsyncConnection, user_id: str) -> Credits:
    """Return what `credits_of` returns, as the caller's transaction sees it."""
    account_id = credit_account(user_id)
    return (await _credits(connection, [account_id])).get(account_id, Credits())


async def credits_of_all(store: Store, user_ids: Sequence[str]) -> dict[str, Credits]:
    """Return the account of each of some customers."""
    async with store.reading() as connection:
        found = await _credits(connection, [credit_account(user_id) for user_id in user_ids])
    return {user_id: found.get(credit_account(user_id), Credits()) for user_id in user_ids}


async def _credits(connection: AsyncConnection, account_ids: Sequence[str]) -> dict[str, Credits]:
    """Return accounts by id. It is one statement: on PostgreSQL two would see two states, and sums that do not fit."""
    column = accounts.c
    income = select(cast(func.coalesce(func.sum(transfers.c.amount_nanousd), 0), BigInteger)).where(
        transfers.c.credit_account_id == column.id
    )
    remaining = column.posted_nanousd - column.held_nanousd
    query = select(column.id, remaining, income.scalar_subquery(), column.held_nanousd, column.overdraft_nanousd)
    rows = await connection.execute(query.where(column.id.in_(account_ids)))
    return {row[0]: Credits(*row[1:]) for row in rows}


async def transactions_of(
    store: Store, user_id: str, limit: int = 100, cursor: str = "", is_income: bool = False
) -> list[Transaction]:
    """Return a customer's newest transfers, newest first, at most ROWS_MAX, from behind the one with the id `cursor`.

    Calls appear as one transfer for each batch, not one each; an unknown cursor finds nothing. With `is_income` only
    those that came in.
    """
    limit = min(limit, ROWS_MAX)
    account_id = credit_account(user_id)
    sides = [_side(transfers.c.credit_account_id, 1, account_id, limit, cursor)]
    if not is_income:
        sides.append(_side(transfers.c.debit_account_id, -1, account_id, limit, cursor))
    both = union_all(*(select(side) for side in sides)).subquery()
    query = select(both).order_by(both.c.created_at.desc(), both.c.id.desc()).limit(limit)
    async with store.reading() as connection:
        return [Transaction(*row) for row in await connection.execute(query)]


def _side(account: ColumnElement[str], sign: int, account_id: str, limit: int, cursor: str) -> Subquery:
    """Select transfers of one side, as many as can be wanted of it: each side has its index, both together none."""
    column = transfers.c
    shown = (
        column.id,
        column.kind,
        (column.amount_nanousd * sign).label("amount"),
        column.created_at,
        column.charge_id,
    )
    query = select(*shown).where(account == account_id)
    if cursor:
        begin = select(transfers.c.created_at).where(transfers.c.id == cursor).scalar_subquery()
        query = query.where(tuple_(column.created_at, column.id) < tuple_(begin, literal(cursor)))
    return query.order_by(column.created_at.desc(), column.id.desc()).limit(limit).subquery()
