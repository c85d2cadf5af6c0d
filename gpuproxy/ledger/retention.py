"""Takes receipts away that are older than the configuration keeps them, and leaves what they add up to.

By day, customer, key, upstream, model and tool the sums go into ``receipt_days`` in the transaction that takes the
receipts, so usage, exports and the view ``gpu_usage`` stay right; balances and statements are made of transfers, which
are kept for ever. Days go whole, and no charge is for calls of two days, so none is torn.

The node that leads does it in the background, a bounded step at a time: on PostgreSQL a day's part goes at once, all
else in steps of ROWS_AT_ONCE.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from sqlalchemy import ColumnElement, Connection, Insert, case, delete, func, select, text, tuple_

from gpuproxy.ledger import days
from gpuproxy.ledger.settle import DAY_NS
from gpuproxy.ledger.usage import sum_of_known
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store, insert_into
from gpuproxy.store.rounds import pause, rounds
from gpuproxy.store.schema import RECEIPT_SUMS, receipt_days, receipts
from gpuproxy.types import TOOL_CALL

LOOK_S = 60.0
LEAD_S = 1.0  # between two questions whether this node leads, while it does not
ROWS_AT_ONCE = 5_000  # as many as come in one transaction
STEP_S = 0.05  # between two steps, for others to write

_column = receipts.c
KEYS = {
    "user_id": _column.user_id,
    "day": (_column.started_ns // DAY_NS).label("day"),
    "key_id": _column.key_id,
    "upstream": _column.upstream,
    "model": _column.model,
    "tool": case((_column.rpc_method == TOOL_CALL, _column.rpc_name), else_="").label("tool"),
    "is_refused": (_column.outcome == "refused").label("is_refused"),
}

logger = get_logger(__name__)


class Retention:
    """Keeps receipts for `kept_days`, 0 for ever. ``leads()`` tells whether this node shall do it."""

    def __init__(self, store: Store, kept_days: int, leads: Callable[[], Awaitable[bool]]) -> None:
        self.now_s: Callable[[], float] = time.time
        self._store = store
        self._kept_days = kept_days
        self._leads = leads

    async def run(self, stopping: asyncio.Event) -> None:
        """Look every LOOK_S while this node leads, until `stopping` is set, through outages of the store."""
        has_led = False

        async def work() -> None:
            nonlocal has_led
            while not stopping.is_set() and (has_led := await self._leads()) and await self.step():
                await pause(STEP_S, stopping)

        complain = partial(logger.warning, "old receipts stay for now")
        await rounds(work, lambda: LOOK_S if has_led else LEAD_S, stopping, complain)

    async def step(self) -> bool:
        """Make the parts that will be needed and take some old receipts away; False if there are none.

        Raises what the store raises; nothing has changed then.
        """
        today = int(self.now_s()) // 86_400
        if not self._store.is_sqlite:
            async with self._store.writing() as connection:
                await connection.run_sync(days.make_days, today)
        if not self._kept_days:
            return False
        end = today - self._kept_days
        if not self._store.is_sqlite and await self._drop_oldest(end):
            return True
        async with self._store.writing() as connection:
            if not self._store.is_sqlite:  # else a receipt that comes meanwhile would go without being summed
                await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            return await connection.run_sync(_take_oldest, end)

    async def _drop_oldest(self, end: int) -> bool:
        async with self._store.writing() as connection:
            old = await connection.run_sync(days.old_days, end)
            if old:
                await connection.run_sync(_drop, old[0])
        return bool(old)


def _drop(connection: Connection, day: int) -> None:
    days.hold_day(connection, day)
    connection.execute(_summing(connection, _within(day)))
    days.drop_day(connection, day)
    logger.info("receipts of a day have gone", day=days.part_of(day))


def _take_oldest(connection: Connection, end: int) -> bool:
    """Sum up and delete the oldest receipts of one day before `end`; False if there are none."""
    order = (_column.started_ns, _column.id)
    oldest_ns = connection.scalar(select(func.min(_column.started_ns)).where(_column.started_ns < end * DAY_NS))
    if oldest_ns is None:
        return False
    chosen = _within(oldest_ns // DAY_NS)
    last = connection.execute(select(*order).where(chosen).order_by(*order).offset(ROWS_AT_ONCE - 1).limit(1)).first()
    if last is not None:
        chosen &= tuple_(*order) <= tuple_(*last)
    connection.execute(_summing(connection, chosen))
    connection.execute(delete(receipts).where(chosen))
    return True


def _within(day: int) -> ColumnElement[bool]:
    return _column.started_ns.between(day * DAY_NS, (day + 1) * DAY_NS - 1)


def _summing(connection: Connection, chosen: ColumnElement[bool]) -> Insert:
    """Return the statement that adds receipts to the sums of their day."""
    query = select(*KEYS.values(), *_sums()).where(chosen).group_by(*KEYS.values())
    insert = insert_into(receipt_days, connection.dialect).from_select([*KEYS, *RECEIPT_SUMS], query)
    added = {name: receipt_days.c[name] + insert.excluded[name] for name in RECEIPT_SUMS}
    statement: Insert = insert.on_conflict_do_update(index_elements=list(KEYS), set_=added)
    return statement


def _sums() -> list[ColumnElement[int]]:
    """Return what is summed up."""
    return [func.count(), *(sum_of_known(_column[name]) for name in RECEIPT_SUMS if name != "requests")]
