"""What a customer used: sums over their receipts, and the newest calls."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Row, case, cast, func, select, union_all

from gpuproxy.ledger.settle import DAY_NS
from gpuproxy.pricing import NEVER_NS
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipt_days, receipts
from gpuproxy.types import TOOL_CALL

GroupBy = Literal["day", "model", "key", "upstream", "tool"]
CALLS_MAX = 1_000
SUMS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "request_bytes", "response_bytes", "cost_nanousd")

_column = receipts.c
_day = receipt_days.c


def sum_of_known(column: ColumnElement[int]) -> ColumnElement[int]:
    """Sum what is known; -1 stands for unknown. Cast, since PostgreSQL sums BIGINT to NUMERIC."""
    return cast(func.coalesce(func.sum(case((column > 0, column), else_=0)), 0), BigInteger)


class _Source(NamedTuple):
    """Where calls are: those that are kept one by one, or the days of those that have gone."""

    user_id: ColumnElement[str]
    started_ns: ColumnElement[int]
    is_tool_call: ColumnElement[bool]
    sums: Sequence[ColumnElement[int]]
    groups: dict[str, ColumnElement[Any]]


_SOURCES = (
    _Source(
        _column.user_id,
        _column.started_ns,
        _column.rpc_method == TOOL_CALL,
        (func.count(), *(sum_of_known(_column[name]) for name in SUMS[1:])),
        {
            "day": _column.started_ns // DAY_NS,
            "model": _column.model,
            "key": _column.key_id,
            "upstream": _column.upstream,
            "tool": _column.upstream + "/" + _column.rpc_name,
        },
    ),
    _Source(
        _day.user_id,
        _day.day * DAY_NS,
        _day.tool != "",
        tuple(sum_of_known(_day[name]) for name in SUMS),
        {
            "day": _day.day,
            "model": _day.model,
            "key": _day.key_id,
            "upstream": _day.upstream,
            "tool": _day.upstream + "/" + _day.tool,
        },
    ),
)


async def usage_summary(
    store: Store,
    user_id: str,
    since: datetime | None = None,
    until: datetime | None = None,
    group_by: GroupBy | None = None,
) -> dict[str, Any]:
    """Return the sums over a user's calls started in [since, until), in all and by model.

    With `group_by` also ``groups``, one entry for each day (UTC), model, key or upstream, or for each tool that was
    called, as ``server/tool``. Tokens of answers that told no usage count as 0. A day whose receipts have gone, see
    `retention`, counts whole if it begins in that time.
    """
    by_model: dict[Any, list[int]] = {}
    groups: dict[Any, list[int]] = {}
    for row in await _summed(store, user_id, since, until, group_by or "model"):
        _add(by_model, row.model, row[3:])
        if group_by != "tool" or row.is_tool_call:
            _add(groups, row.value, row[3:])
    total = [sum(column) for column in zip([0] * len(SUMS), *by_model.values(), strict=True)]
    answer: dict[str, Any] = dict(zip(SUMS, total, strict=True))
    answer["by_model"] = _shown("model", by_model)
    if group_by is not None:
        answer["groups"] = _shown(group_by, groups)
    return answer


async def _summed(
    store: Store, user_id: str, since: datetime | None, until: datetime | None, group_by: GroupBy
) -> Sequence[Row[Any]]:
    """Return rows of the model, the value that calls are grouped by, whether they are tool calls, and the sums.

    It is one statement: on PostgreSQL two would see two states, and calls whose receipts go between them twice.
    """
    parts = []
    for source in _SOURCES:
        keys = {"model": source.groups["model"], "value": source.groups[group_by], "is_tool_call": source.is_tool_call}
        named = (column.label(name) for name, column in keys.items())
        query = select(*named, *source.sums).where(*_chosen(source, user_id, since, until))
        parts.append(query.group_by(*keys.values()))
    async with store.reading() as connection:
        return (await connection.execute(union_all(*parts))).all()


def _add(groups: dict[Any, list[int]], value: Any, sums: Sequence[int]) -> None:
    groups[value] = [a + b for a, b in zip(groups.get(value, [0] * len(SUMS)), sums, strict=True)]


def _shown(group_by: GroupBy, groups: dict[Any, list[int]]) -> list[dict[str, Any]]:
    return [
        {group_by: _date(value) if group_by == "day" else value, **dict(zip(SUMS, sums, strict=True))}
        for value, sums in sorted(groups.items())
    ]


async def newest_calls(store: Store, user_id: str, limit: int = 100) -> list[dict[str, Any]]:
    """Return a user's newest receipts, newest first, at most CALLS_MAX."""
    query = (
        select(receipts)
        .where(_column.user_id == user_id)
        .order_by(_column.started_ns.desc())
        .limit(min(limit, CALLS_MAX))
    )
    async with store.reading() as connection:
        return [dict(row._mapping) for row in await connection.execute(query)]


def _chosen(
    source: _Source, user_id: str, since: datetime | None, until: datetime | None
) -> Sequence[ColumnElement[bool]]:
    chosen = [source.user_id == user_id]
    if since is not None:
        chosen.append(source.started_ns >= unix_ns(since))
    if until is not None:
        chosen.append(source.started_ns < unix_ns(until))
    return chosen


def unix_ns(time: datetime) -> int:
    """Return the aware `time` as unix nanoseconds, exactly; after 2262 the last that a store can hold."""
    return min((time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1_000, NEVER_NS - 1)


def _date(day: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).date().isoformat()
