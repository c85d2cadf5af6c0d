"""All that a customer used and all that moved their account, part by part, in little memory.

Each part is a transaction of its own, so a slow reader holds neither a connection nor a snapshot. Rows are only added,
so nothing is told twice, nor left out that was there at the start. What `retention` takes meanwhile, and was not told,
is told as what it adds up to: calls and the sums of their days are read in one statement, which sees one state.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import Struct
from sqlalchemy import Select, false, func, literal, not_, select, true, tuple_, union_all

from gpuproxy.ledger.retention import KEYS
from gpuproxy.ledger.settle import DAY_NS
from gpuproxy.ledger.statement import Transaction, transactions_of
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipt_days, receipts, rentals

ROWS_AT_ONCE = 500
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_call = receipts.c
_day = receipt_days.c
_rental = rentals.c
_SUMMED_BY = (_day.key_id, _day.upstream, _day.model, _day.tool)
# What is shown of a call, and of a day of those that have gone: the same columns.
_OF_CALL = (
    false().label("is_day"), _call.id, _call.started_ns, _call.key_id, _call.upstream, _call.model, KEYS["tool"],
    _call.duration_us, _call.cost_nanousd, KEYS["day"],
)  # fmt: skip
_OF_DAY = (
    true().label("is_day"), literal("").label("id"), (_day.day * DAY_NS).label("started_ns"), *_SUMMED_BY,
    _day.duration_us, _day.cost_nanousd, _day.day,
)  # fmt: skip


class Use(Struct, frozen=True):
    """One call or rental, as the view ``gpu_usage`` shows it; a rental that still runs has no end."""

    id: str
    kind: str
    provider: str
    instance_id: str
    model: str
    key_id: str
    start_time: datetime
    end_time: datetime | None
    duration_us: int
    cost_nanousd: int
    tool: str = ""


async def use_pages(store: Store, user_id: str) -> AsyncIterator[list[Use]]:
    """Yield all calls of a user, oldest first, but those refused; then all rentals.

    Calls whose receipts have gone, see `retention`, are told first, as what each day of them adds up to.
    """
    first = await _first_day_in_motion(store, user_id)
    async for rows in _pages(store, _gone(user_id).where(_day.day < first), _day.day, *_SUMMED_BY):
        yield [_day_use(row, row.duration_us, row.cost_nanousd) for row in rows]
    async for uses in _call_pages(store, user_id, first):
        yield uses
    column = _rental
    is_used = column.running_at.is_not(None) | (column.charged_nanousd > 0)  # given up before it ran, but paid for
    used = select(rentals).where(column.user_id == user_id, is_used)
    async for rows in _pages(store, used, column.created_at, column.id):
        yield [_rental_use(row) for row in rows]


async def transaction_pages(store: Store, user_id: str, is_income: bool = False) -> AsyncIterator[list[Transaction]]:
    """Yield all that moved a customer's account, newest first; with `is_income` only what came in."""
    cursor = ""
    while page := await transactions_of(store, user_id, ROWS_AT_ONCE, cursor, is_income):
        yield page
        if len(page) < ROWS_AT_ONCE:
            return
        cursor = page[-1].id


async def _first_day_in_motion(store: Store, user_id: str) -> int:
    """Return the first day of which there may be receipts, so that its sums may grow."""
    oldest = select(func.min(_call.started_ns) // DAY_NS).where(_call.user_id == user_id)
    newest_gone = select(func.max(_day.day)).where(_day.user_id == user_id)
    async with store.reading() as connection:
        found = (await connection.execute(select(oldest.scalar_subquery(), newest_gone.scalar_subquery()))).one()
    return min((day for day in found if day is not None), default=0)


async def _call_pages(store: Store, user_id: str, day: int) -> AsyncIterator[list[Use]]:
    """Yield calls, and before them what has gone of days from `day` on and was not told yet.

    Of a day receipts go in the order in which they are told. So what its sums have over what was told of it is what
    has gone since, or nothing.
    """
    calls = select(*_OF_CALL).where(_call.user_id == user_id, _call.outcome != "refused")
    narrowed = calls
    told: dict[tuple[Any, ...], tuple[int, int]] = {}
    while True:
        page = select(narrowed.order_by(_call.started_ns, _call.id).limit(ROWS_AT_ONCE).subquery())
        async with store.reading() as connection:
            both = await connection.execute(union_all(page, _gone(user_id).where(_day.day >= day)))
            rows = sorted(both, key=lambda row: (not row.is_day, row.started_ns, row.id))
        uses = []
        for row in rows:
            key = (row.day, row.key_id, row.upstream, row.model, row.tool)
            duration_us, cost_nanousd = told.get(key, (0, 0))
            if not row.is_day:
                told[key] = duration_us + max(0, row.duration_us), cost_nanousd + max(0, row.cost_nanousd)
                uses.append(_call_use(row))
            elif key not in told or (row.duration_us, row.cost_nanousd) > (duration_us, cost_nanousd):
                told[key] = row.duration_us, row.cost_nanousd
                uses.append(_day_use(row, row.duration_us - duration_us, row.cost_nanousd - cost_nanousd))
        if uses:
            yield uses
        if sum(not row.is_day for row in rows) < ROWS_AT_ONCE:
            return
        narrowed = calls.where(tuple_(_call.started_ns, _call.id) > tuple_(rows[-1].started_ns, rows[-1].id))
        day = rows[-1].day
        told = {key: sums for key, sums in told.items() if key[0] >= day}


def _gone(user_id: str) -> Select[Any]:
    return select(*_OF_DAY).where(_day.user_id == user_id, not_(_day.is_refused))


async def _pages(store: Store, query: Select[Any], *order: Any) -> AsyncIterator[list[Any]]:
    """Yield the rows in an order that no two share; each part begins behind the last row of the one before."""
    narrowed = query
    while True:
        async with store.reading() as connection:
            rows = list(await connection.execute(narrowed.order_by(*order).limit(ROWS_AT_ONCE)))
        if rows:
            yield rows
            narrowed = query.where(tuple_(*order) > tuple_(*(rows[-1]._mapping[column] for column in order)))
        if len(rows) < ROWS_AT_ONCE:
            return


def _call_use(row: Any) -> Use:
    start_time = EPOCH + timedelta(microseconds=row.started_ns // 1_000)
    end_time = EPOCH + timedelta(microseconds=row.started_ns // 1_000 + row.duration_us)
    told = (row.model, row.key_id, start_time, end_time, row.duration_us, row.cost_nanousd)
    return Use(row.id, "inference", row.upstream, "", *told, row.tool)


def _day_use(row: Any, duration_us: int, cost_nanousd: int) -> Use:
    start_time = EPOCH + timedelta(days=row.day)
    told = (row.model, row.key_id, start_time, start_time + timedelta(days=1), duration_us, cost_nanousd)
    name = f"{row.day}/{row.key_id}/{row.upstream}/{row.model}/{row.tool}"  # as in the view
    return Use(name, "inference", row.upstream, "", *told, row.tool)


def _rental_use(row: Any) -> Use:
    cost_nanousd = row.charged_nanousd + row.written_off_nanousd
    told = (row.gpu_model, row.key_id, row.running_at or row.created_at, row.ended_at, row.running_us, cost_nanousd)
    return Use(row.id, "rental", row.provider, row.instance_id, *told)
