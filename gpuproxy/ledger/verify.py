"""Checks the book against itself: what must hold at every moment, and what does not."""

from collections.abc import Iterator

from msgspec import Struct
from sqlalchemy import BigInteger, ColumnElement, Connection, Subquery, and_, cast, func, or_, select, text

from gpuproxy.ledger.settle import DAY_NS
from gpuproxy.ledger.transfers import CREDIT
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import accounts, holds, receipt_days, receipts, transfers

FAULTS_MAX = 100  # of one kind; more say nothing new


class Fault(Struct, frozen=True):
    """Something that does not hold: which rule, about which account, transfer or hold, and the numbers."""

    rule: str
    subject_id: str
    detail: str


async def verify(store: Store) -> list[Fault]:
    """Return everything that is wrong in the book, as it was at one moment; [] if nothing is.

    Reads all transfers and holds: seconds for millions of them. Nobody is kept waiting.
    """
    async with store.reading() as connection:
        if not store.is_sqlite:
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        return await connection.run_sync(lambda inner: list(faults(inner)))


def faults(connection: Connection) -> Iterator[Fault]:
    """Yield everything that is wrong, by what this transaction sees."""
    yield from _unbalanced(connection)
    yield from _bad_transfers(connection)
    yield from _wrong_balances(connection)
    yield from _wrong_held(connection)
    yield from _overspent(connection)
    yield from _bad_holds(connection)
    yield from _unpaid_receipts(connection)


def _unbalanced(connection: Connection) -> Iterator[Fault]:
    total = connection.scalar(select(_sum(accounts.c.posted_nanousd)))
    if total:
        yield Fault("all accounts sum to nothing", "", f"the sum is {total}")


def _bad_transfers(connection: Connection) -> Iterator[Fault]:
    """Find transfers with a leg that leads nowhere: the database's own constraints were got round."""
    debit, credit = accounts.alias("debit"), accounts.alias("credit")
    joined = transfers.outerjoin(debit, debit.c.id == transfers.c.debit_account_id).outerjoin(
        credit, credit.c.id == transfers.c.credit_account_id
    )
    is_bad = or_(
        debit.c.id.is_(None),
        credit.c.id.is_(None),
        transfers.c.amount_nanousd <= 0,
        transfers.c.debit_account_id == transfers.c.credit_account_id,
    )
    for row in connection.execute(select(transfers).select_from(joined).where(is_bad).limit(FAULTS_MAX)):
        detail = f"{row.amount_nanousd} from {row.debit_account_id!r} to {row.credit_account_id!r}"
        yield Fault("a transfer has two legs and an amount", row.id, detail)


def _wrong_balances(connection: Connection) -> Iterator[Fault]:
    gained = _by(transfers.c.credit_account_id, transfers.c.amount_nanousd, "gained")
    lost = _by(transfers.c.debit_account_id, transfers.c.amount_nanousd, "lost")
    summed = func.coalesce(gained.c.total, 0) - func.coalesce(lost.c.total, 0)
    joined = accounts.outerjoin(gained, gained.c.key == accounts.c.id).outerjoin(lost, lost.c.key == accounts.c.id)
    query = select(accounts.c.id, accounts.c.posted_nanousd, summed.label("summed")).select_from(joined)
    for row in connection.execute(query.where(accounts.c.posted_nanousd != summed).limit(FAULTS_MAX)):
        detail = f"the balance is {row.posted_nanousd}, its transfers sum to {row.summed}"
        yield Fault("a balance is the sum of its transfers", row.id, detail)


def _wrong_held(connection: Connection) -> Iterator[Fault]:
    held = _by(holds.c.account_id, holds.c.remaining_nanousd, "held", holds.c.state == "pending")
    summed = func.coalesce(held.c.total, 0)
    joined = accounts.outerjoin(held, held.c.key == accounts.c.id)
    query = select(accounts.c.id, accounts.c.held_nanousd, summed.label("summed")).select_from(joined)
    for row in connection.execute(query.where(accounts.c.held_nanousd != summed).limit(FAULTS_MAX)):
        detail = f"{row.held_nanousd} is held, the pending holds sum to {row.summed}"
        yield Fault("what is held is the sum of the holds", row.id, detail)


def _overspent(connection: Connection) -> Iterator[Fault]:
    left = accounts.c.posted_nanousd - accounts.c.held_nanousd
    is_over = and_(accounts.c.kind == CREDIT, left < -accounts.c.overdraft_nanousd)
    for row in connection.execute(select(accounts.c.id, left.label("left")).where(is_over).limit(FAULTS_MAX)):
        yield Fault("no customer spends more than they have", row.id, f"{row.left} is left")


def _bad_holds(connection: Connection) -> Iterator[Fault]:
    is_bad = or_(
        holds.c.remaining_nanousd < 0,
        holds.c.posted_nanousd < 0,
        holds.c.posted_nanousd + holds.c.remaining_nanousd > holds.c.amount_nanousd,
        and_(holds.c.state != "pending", holds.c.remaining_nanousd != 0),
    )
    for row in connection.execute(select(holds).where(is_bad).limit(FAULTS_MAX)):
        detail = f"{row.state}: of {row.amount_nanousd} {row.posted_nanousd} posted, {row.remaining_nanousd} remain"
        yield Fault("a hold is never charged more than was held", row.id, detail)


def _unpaid_receipts(connection: Connection) -> Iterator[Fault]:
    """Compare what calls cost with what was posted for them; the part written off is named after the charge.

    A day of receipts that is being taken away may lack some already; charges of old may be for calls of two days.
    """
    columns = (receipts.c.charge_id.label("key"), _sum(receipts.c.cost_nanousd).label("total"))
    begun_ns = func.min(receipts.c.started_ns).label("begun_ns")
    charged = select(*columns, begun_ns).where(receipts.c.charge_id != "").group_by(receipts.c.charge_id)
    cost = charged.subquery("cost")
    paid = _by(transfers.c.charge_id, transfers.c.amount_nanousd, "paid", transfers.c.charge_id != "")
    summed = func.coalesce(paid.c.total, 0)
    joined = cost.outerjoin(paid, paid.c.key == cost.c.key)
    query = select(cost.c.key, cost.c.total, summed.label("paid")).select_from(joined)
    is_wrong = cost.c.total != summed
    last_gone = connection.scalar(select(func.max(receipt_days.c.day)))
    if last_gone is not None:
        is_wrong &= or_(cost.c.total > summed, cost.c.begun_ns >= (last_gone + 2) * DAY_NS)
    for row in connection.execute(query.where(is_wrong).limit(FAULTS_MAX)):
        yield Fault("calls cost what was posted for them", row.key, f"they cost {row.total}, {row.paid} was posted")


def _by(
    key: ColumnElement[str], amount: ColumnElement[int], name: str, chosen: ColumnElement[bool] | None = None
) -> Subquery:
    query = select(key.label("key"), _sum(amount).label("total")).group_by(key)
    return (query if chosen is None else query.where(chosen)).subquery(name)


def _sum(column: ColumnElement[int]) -> ColumnElement[int]:
    """Sum; cast, since PostgreSQL sums BIGINT to NUMERIC."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)
