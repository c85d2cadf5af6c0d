"""Customers' credit: dollars as people write them, credit given, what is left."""

from decimal import Decimal, InvalidOperation

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.ledger.transfers import ADJUSTMENTS, AMOUNT_NANOUSD_MAX, Transfer, credit_account, post
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts

NANOUSD = 1_000_000_000  # in one dollar


def parse_usd(text: str) -> int:
    """Return a positive amount of dollars such as ``12.50`` in nanodollars, exactly. Raises ValueError."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite():
        raise ValueError(f"{text!r} is not an amount in dollars; write it like 12.50")
    if not 0 < amount <= AMOUNT_NANOUSD_MAX // NANOUSD:  # first: bounds the digits below
        raise ValueError(f"{text} is out of range; an amount is over 0 and up to 1000000000 dollars")
    exact = amount.quantize(Decimal("1e-9"))
    if exact != amount:
        raise ValueError(f"{text} has more than 9 decimals; a nanodollar is the least amount")
    return int(exact.scaleb(9))


def format_usd(nanousd: int) -> str:
    """Return nanodollars as exact dollars with at least two decimals."""
    sign, (dollars, rest) = "-" if nanousd < 0 else "", divmod(abs(nanousd), NANOUSD)
    return f"{sign}{dollars}.{f'{rest:09}'.rstrip('0').ljust(2, '0')}"


async def credit(store: Store, user_id: str, amount_nanousd: int, idempotency_key: str) -> bool:
    """Give a customer credit. Return False if this key has done so before.

    Raises GatewayError UNPROCESSABLE for an amount out of range, CONFLICT for a key used for something else.
    """
    async with store.writing() as connection:
        return await add_credit(store, connection, user_id, amount_nanousd, idempotency_key)


async def add_credit(
    store: Store, connection: AsyncConnection, user_id: str, amount_nanousd: int, idempotency_key: str
) -> bool:
    """Do what `credit` does, inside the caller's writing transaction."""
    given = Transfer(ADJUSTMENTS, credit_account(user_id), amount_nanousd, "adjustment", idempotency_key)
    return bool(await connection.run_sync(post, [given]))


async def balance(store: Store, user_id: str) -> int:
    """Return what the customer has left to spend, in nanodollars."""
    query = select(accounts.c.posted_nanousd - accounts.c.held_nanousd).where(accounts.c.id == credit_account(user_id))
    async with store.reading() as connection:
        return (await connection.scalar(query)) or 0
