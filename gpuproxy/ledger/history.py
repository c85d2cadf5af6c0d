"""All that a customer used and all that moved their account, part by part, in little memory.

Each part is a transaction of its own, so a slow reader holds neither a connection nor a snapshot. Rows are only added,
so nothing is told twice; nor left out that was there at the start, but receipts that `retention` takes meanwhile.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import Struct
from sqlalchemy import Select, not_, select, tuple_

from gpuproxy.ledger.statement import Transaction, transactions_of
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipt_days, receipts, rentals
from gpuproxy.types import TOOL_CALL

ROWS_AT_ONCE = 500
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_call = receipts.c
_day = receipt_days.c
_rental = rentals.c


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
    gone = select(receipt_days).where(_day.user_id == user_id, not_(_day.is_refused))
    async for rows in _pages(store, gone, _day.day, _day.key_id, _day.upstream, _day.model, _day.tool):
        yield [_day_use(row) for row in rows]
    shown = (_call.id, _call.upstream, _call.model, _call.key_id, _call.started_ns, _call.duration_us)
    calls = select(*shown, _call.cost_nanousd, _call.rpc_method, _call.rpc_name).where(
        _call.user_id == user_id, _call.outcome != "refused"
    )
    async for rows in _pages(store, calls, _call.started_ns, _call.id):
        yield [_call_use(row) for row in rows]
    column = _rental
    has_run = select(rentals).where(column.user_id == user_id, column.running_at.is_not(None))
    async for rows in _pages(store, has_run, column.created_at, column.id):
        yield [_rental_use(row) for row in rows]


async def transaction_pages(store: Store, user_id: str, is_income: bool = False) -> AsyncIterator[list[Transaction]]:
    """Yield all that moved a customer's account, newest first; with `is_income` only what came in."""
    cursor = ""
    while page := await transactions_of(store, user_id, ROWS_AT_ONCE, cursor, is_income):
        yield page
        if len(page) < ROWS_AT_ONCE:
            return
        cursor = page[-1].id


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
    tool = row.rpc_name if row.rpc_method == TOOL_CALL else ""
    return Use(row.id, "inference", row.upstream, "", *told, tool)


def _day_use(row: Any) -> Use:
    start_time = EPOCH + timedelta(days=row.day)
    told = (row.model, row.key_id, start_time, start_time + timedelta(days=1), row.duration_us, row.cost_nanousd)
    name = f"{row.day}/{row.key_id}/{row.upstream}/{row.model}/{row.tool}"  # as in the view
    return Use(name, "inference", row.upstream, "", *told, row.tool)


def _rental_use(row: Any) -> Use:
    cost_nanousd = row.charged_nanousd + row.written_off_nanousd
    told = (row.gpu_model, row.key_id, row.running_at, row.ended_at, row.running_us, cost_nanousd)
    return Use(row.id, "rental", row.provider, row.instance_id, *told)
