"""Customers' credit: dollars as people write them, credit given, what is left."""

import re
from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.ledger.transfers import ADJUSTMENTS, AMOUNT_NANOUSD_MAX, Transfer, credit_account, post
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts

NANOUSD = 1_000_000_000  # in one dollar
USD_CHARACTERS_MAX = 40

_matches_usd = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?").fullmatch  # a number as JSON writes it


def parse_usd(text: str, lowest_nanousd: int = 1) -> int:
    """Return an amount of dollars such as ``12.50`` in nanodollars, exactly. Raises ValueError."""
    if len(text) > USD_CHARACTERS_MAX or not _matches_usd(text):
        raise ValueError(f"{text[:USD_CHARACTERS_MAX]!r} is not an amount in dollars; write it like 12.50")
    amount = Decimal(text)
    if not lowest_nanousd <= amount * NANOUSD <= AMOUNT_NANOUSD_MAX:  # first: bounds the digits below
        lowest = "over 0" if lowest_nanousd else "0"
        raise ValueError(f"{text} is out of range; an amount is {lowest} and up to 1000000000 dollars")
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


async def take_credit(store: Store, user_id: str, amount_nanousd: int, idempotency_key: str) -> bool:
    """Take credit back that was given by mistake. Return False if this key has done so before.

    Raises as `credit`, and GatewayError INSUFFICIENT_CREDITS for more than is there.
    """
    taken = Transfer(credit_account(user_id), ADJUSTMENTS, amount_nanousd, "adjustment", idempotency_key)
    async with store.writing() as connection:
        return bool(await connection.run_sync(post, [taken]))


async def balance(store: Store, user_id: str) -> int:
    """Return what the customer has left to spend, in nanodollars."""
    query = select(accounts.c.posted_nanousd - accounts.c.held_nanousd).where(accounts.c.id == credit_account(user_id))
    async with store.reading() as connection:
        return (await connection.scalar(query)) or 0
