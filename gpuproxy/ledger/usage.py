"""What a customer used: sums over their receipts, and the newest calls."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import BigInteger, ColumnElement, case, cast, func, select

from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipts
from gpuproxy.types import TOOL_CALL

GroupBy = Literal["day", "model", "key", "upstream", "tool"]
DAY_NS = 86_400 * 10**9
CALLS_MAX = 1_000

_column = receipts.c
_groups: dict[str, ColumnElement[Any]] = {
    "day": _column.started_ns // DAY_NS,
    "model": _column.model,
    "key": _column.key_id,
    "upstream": _column.upstream,
    "tool": _column.upstream + "/" + _column.rpc_name,
}


def _sum(column: ColumnElement[int]) -> ColumnElement[int]:
    """Sum what is known; -1 stands for unknown. Cast, since PostgreSQL sums BIGINT to NUMERIC."""
    return cast(func.coalesce(func.sum(case((column > 0, column), else_=0)), 0), BigInteger)


_sums = (
    func.count().label("requests"),
    *(
        _sum(_column[name]).label(name)
        for name in ("input_tokens", "cached_tokens", "output_tokens", "request_bytes", "response_bytes")
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
    called, as ``server/tool``. Tokens of answers
    that told no usage count as 0.
    """
    chosen = _chosen(user_id, since, until)
    async with store.reading() as connection:
        total = (await connection.execute(select(*_sums).where(*chosen))).one()
        answer: dict[str, Any] = dict(total._mapping)
        for name, group in {"by_model": "model", "groups": group_by}.items():
            if group is not None:
                value = _groups[group].label(group)
                query = select(value, *_sums).where(*chosen).group_by(value).order_by(value)
                if group == "tool":
                    query = query.where(_column.rpc_method == TOOL_CALL)
                rows = await connection.execute(query)
                answer[name] = [_readable(dict(row._mapping)) for row in rows]
    return answer


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


def _chosen(user_id: str, since: datetime | None, until: datetime | None) -> Sequence[ColumnElement[bool]]:
    chosen = [_column.user_id == user_id]
    if since is not None:
        chosen.append(_column.started_ns >= unix_ns(since))
    if until is not None:
        chosen.append(_column.started_ns < unix_ns(until))
    return chosen


def unix_ns(time: datetime) -> int:
    """Return the aware `time` as unix nanoseconds, exactly."""
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1_000


def _readable(group: dict[str, Any]) -> dict[str, Any]:
    if "day" in group:
        group["day"] = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=group["day"])).date().isoformat()
    return group
