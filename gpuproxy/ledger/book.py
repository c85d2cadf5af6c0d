"""The double-entry book: transfers between accounts, in whole nanodollars.

An account's ``posted_nanousd`` is what was credited to it less what was debited, so the sum over all accounts
is zero and a customer's credit account shows what is left to spend. Transfers are immutable; each carries an
idempotency key, so that whoever is unsure may post again.
"""

from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from uuid import uuid4

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, transfers

NANOUSD = 1_000_000_000  # in one dollar
AMOUNT_NANOUSD_MAX = 10**18  # a billion dollars; nine times that fits the column
ADJUSTMENTS = "adjustments"


def credit_account(user_id: str) -> str:
    """Return the id of the account that holds a customer's credit."""
    return f"credit:{user_id}"


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
    if not 0 < amount_nanousd <= AMOUNT_NANOUSD_MAX:
        raise GatewayError("UNPROCESSABLE", f"{amount_nanousd} nanodollars is out of range", param="amount")
    to = credit_account(user_id)
    await _open(store, connection, ADJUSTMENTS, "adjustments", None)
    await _open(store, connection, to, "credit", user_id)
    return await _transfer(store, connection, ADJUSTMENTS, to, amount_nanousd, idempotency_key)


async def balance(store: Store, user_id: str) -> int:
    """Return what the customer has left to spend, in nanodollars."""
    query = select(accounts.c.posted_nanousd - accounts.c.held_nanousd).where(accounts.c.id == credit_account(user_id))
    async with store.reading() as connection:
        return (await connection.scalar(query)) or 0


async def _open(
    store: Store, connection: AsyncConnection, account_id: str, kind: str, owner_user_id: str | None
) -> None:
    await connection.execute(
        store.insert_new(accounts).values(
            id=account_id, owner_user_id=owner_user_id, kind=kind, posted_nanousd=0, held_nanousd=0
        )
    )


async def _transfer(
    store: Store, connection: AsyncConnection, debit: str, credit: str, amount_nanousd: int, key: str
) -> bool:
    """Post one transfer inside the caller's transaction; False if its key was posted before."""
    posted = await connection.execute(
        store.insert_new(transfers).values(
            id=str(uuid4()),
            debit_account_id=debit,
            credit_account_id=credit,
            amount_nanousd=amount_nanousd,
            kind="adjustment",
            idempotency_key=key,
            created_at=datetime.now(UTC),
        )
    )
    if posted.rowcount == 0:
        await _check_same(connection, debit, credit, amount_nanousd, key)
        return False
    for account_id, change in sorted([(debit, -amount_nanousd), (credit, amount_nanousd)]):  # one order: no deadlock
        await connection.execute(
            update(accounts)
            .where(accounts.c.id == account_id)
            .values(posted_nanousd=accounts.c.posted_nanousd + change)
        )
    return True


async def _check_same(connection: AsyncConnection, debit: str, credit: str, amount_nanousd: int, key: str) -> None:
    row = (await connection.execute(select(transfers).where(transfers.c.idempotency_key == key))).one()
    if (row.debit_account_id, row.credit_account_id, row.amount_nanousd) != (debit, credit, amount_nanousd):
        raise GatewayError("CONFLICT", f"idempotency key {key!r} belongs to another transfer")
