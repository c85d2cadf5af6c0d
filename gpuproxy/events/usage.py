"""What calls used and cost, told as sums: one event for each account and moment, however many calls there were.

Only accounts of which somebody wants to hear it are summed up: those that have a row. A webhook gives them one, and
whoever listens over ``/ws``, for a day beyond, so that one that returns has missed nothing. Each charge is added to the
sum in the transaction that makes it, and leaves it in the transaction that stores the event: it is told exactly once.

Cost of a batch of charges: one look-up by primary key for its accounts, 0.1 ms for 50 of them and 1.3 µs for each more;
for those that have a row an update, 0.1 ms and 12 µs for each.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, and_, bindparam, delete, exists, func, select, update

from gpuproxy.events.catalogue import EVERYTHING
from gpuproxy.events.outbox import record
from gpuproxy.store.engine import Store, insert_into
from gpuproxy.store.schema import usage_sums, webhook_events, webhooks

NAME = "usage.recorded"
WANTED = timedelta(days=1)
USERS_AT_ONCE = 500  # parameters of one query
TELL_MAX = 500  # events of one transaction
TOKENS_MAX = 10**12  # of one call; an upstream may claim any number, and the sum must fit its column

_column = usage_sums.c
EMPTY = {"since": None, "call_count": 0, "input_tokens": 0, "output_tokens": 0, "cost_nanousd": 0}


class Charged(NamedTuple):
    """What calls of one account were charged together."""

    call_count: int
    input_tokens: int
    output_tokens: int
    cost_nanousd: int


# Made once: to make them costs more than to run them.
_WITH_ROWS = select(_column.user_id).where(_column.user_id.in_(bindparam("user_ids", expanding=True)))
_ADD = (
    update(usage_sums)
    .where(_column.user_id == bindparam("whose"))
    .values(
        since=func.coalesce(_column.since, bindparam("at", type_=_column.since.type)),
        **{name: _column[name] + bindparam(f"more_{name}") for name in Charged._fields},
    )
)


def want(connection: Connection, user_id: str, now: datetime) -> None:
    """Let the charges of an account be told from now on, for WANTED at least."""
    until = now + WANTED
    row = insert_into(usage_sums, connection.dialect).values(user_id=user_id, wanted_until=until, **EMPTY)
    later = {"wanted_until": until}
    connection.execute(
        row.on_conflict_do_update(index_elements=["user_id"], set_=later, where=_column.wanted_until < until)
    )


def wants(names: Iterable[str]) -> bool:
    """Tell whether a webhook for these events is told what was used."""
    return not {NAME, EVERYTHING}.isdisjoint(names)


def wanted(connection: Connection, user_ids: Iterable[str]) -> list[str]:
    """Return those of the accounts of which somebody wants to hear, in order."""
    ids = sorted(user_ids)
    starts = range(0, len(ids), USERS_AT_ONCE)
    parts = (connection.scalars(_WITH_ROWS, {"user_ids": ids[at : at + USERS_AT_ONCE]}) for at in starts)
    return sorted(user_id for part in parts for user_id in part)


def add(connection: Connection, charged: Mapping[str, Charged], now: datetime | None = None) -> None:
    """Add to the sums of accounts that have one."""
    since = now or datetime.now(UTC)
    rows = [{"whose": user_id, "at": since, **_named(each)} for user_id, each in charged.items()]
    if rows:
        connection.execute(_ADD, rows)


def _named(charged: Charged) -> dict[str, int]:
    return {f"more_{name}": value for name, value in zip(Charged._fields, charged, strict=True)}


async def is_any_due(store: Store, before: datetime) -> bool:
    """Tell whether `tell_due` would find something."""
    return bool(await store.look(select(_column.user_id).where(_column.since <= before).limit(1)))


def tell_due(connection: Connection, before: datetime, now: datetime) -> int:
    """Record an event of each sum that was begun before a time, TELL_MAX at most, and empty it; return how many."""
    query = select(usage_sums).where(_column.since <= before).order_by(_column.user_id).limit(TELL_MAX)
    rows = connection.execute(query.with_for_update(skip_locked=True)).all()
    for row in rows:
        record(connection, NAME, row.user_id, _told(row, now))
    told = _column.user_id.in_([row.user_id for row in rows])
    connection.execute(update(usage_sums).where(told).values(**EMPTY))
    return len(rows)


def _told(row: Row[Any], now: datetime) -> dict[str, Any]:
    sums = {name: getattr(row, name) for name in ("input_tokens", "output_tokens", "cost_nanousd")}
    times = {"since": row.since.isoformat(), "until": now.isoformat()}
    return {"calls": row.call_count, **sums, "cost": row.cost_nanousd / 1e9, **times}


def forget_unwanted(connection: Connection, now: datetime) -> None:
    """Sum up no more what nobody wants to hear."""
    names = webhook_events.c.name.in_([NAME, EVERYTHING])
    subscribed = webhooks.join(webhook_events, webhook_events.c.webhook_id == webhooks.c.id)
    is_theirs = and_(webhooks.c.user_id == _column.user_id, webhooks.c.state == "enabled", names)
    has_webhook = exists().select_from(subscribed).where(is_theirs)
    connection.execute(delete(usage_sums).where(_column.wanted_until < now, _column.since.is_(None), ~has_webhook))
