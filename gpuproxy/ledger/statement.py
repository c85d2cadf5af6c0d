"""What customers see of their account: what is left, and what moved it."""

from datetime import datetime

from msgspec import Struct
from sqlalchemy import BigInteger, and_, case, cast, func, or_, select
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
    income = select(cast(func.coalesce(func.sum(transfers.c.amount_nanousd), 0), BigInteger)).where(
        transfers.c.credit_account_id == account_id
    )
    remaining = accounts.c.posted_nanousd - accounts.c.held_nanousd
    query = select(remaining, income.scalar_subquery(), accounts.c.held_nanousd, accounts.c.overdraft_nanousd)
    row = (await connection.execute(query.where(accounts.c.id == account_id))).first()
    return Credits(*row) if row is not None else Credits()


async def transactions_of(store: Store, user_id: str, limit: int = 100, cursor: str = "") -> list[Transaction]:
    """Return a customer's newest transfers, newest first, at most ROWS_MAX, from behind the one with the id `cursor`.

    Calls appear as one transfer for each batch, not one each; an unknown cursor finds nothing.
    """
    account_id = credit_account(user_id)
    is_income = transfers.c.credit_account_id == account_id
    amount = case((is_income, transfers.c.amount_nanousd), else_=-transfers.c.amount_nanousd)
    order = (transfers.c.created_at, transfers.c.id)
    query = select(transfers.c.id, transfers.c.kind, amount, transfers.c.created_at, transfers.c.charge_id)
    query = query.where(or_(is_income, transfers.c.debit_account_id == account_id))
    if cursor:
        begin = select(transfers.c.created_at).where(transfers.c.id == cursor).scalar_subquery()
        query = query.where(or_(order[0] < begin, and_(order[0] == begin, order[1] < cursor)))
    query = query.order_by(order[0].desc(), order[1].desc()).limit(min(limit, ROWS_MAX))
    async with store.reading() as connection:
        return [Transaction(*row) for row in await connection.execute(query)]
