"""The outbox: an event is stored in the transaction of what caused it, so that both are there or neither.

So are the deliveries it owes to webhooks: no reader can pass over one, whatever order transactions commit in. ``/ws``
reads the table, see `stream`; nobody is told from here.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, case, insert, literal, select

from gpuproxy.events.catalogue import EVENTS, EVERYTHING, spellings
from gpuproxy.store.schema import deliveries, events, webhook_events, webhooks

DATA_BYTES_MAX = 16_384  # Standard Webhooks wants payloads below 20 kB, and there is more in one than this


def record(connection: Connection, name: str, user_id: str | None, data: Mapping[str, Any]) -> str:
    """Store an event inside the caller's writing transaction; return its id.

    `name` is one of `catalogue.EVENTS`. `user_id` says whose it is, None: everybody's. `data` is JSON: no secrets, and
    no key of its own named user_id. Raises ValueError for an unknown name and for data over DATA_BYTES_MAX.
    """
    at = datetime.now(UTC)
    event_id = store_event(connection, name, user_id, data, at)
    if user_id is not None:
        _owe_deliveries(connection, event_id, name, user_id, at)
    return event_id


def store_event(connection: Connection, name: str, user_id: str | None, data: Mapping[str, Any], at: datetime) -> str:
    """Store an event that owes nothing to webhooks; else as `record`."""
    if name not in EVENTS:
        raise ValueError(f"no event {name!r}; known: {', '.join(EVENTS)}")
    size = len(msgspec.json.encode(data))
    if size > DATA_BYTES_MAX:
        raise ValueError(f"the data of {name} has {size} bytes; an event carries at most {DATA_BYTES_MAX}")
    event_id = f"evt_{uuid4().hex}"
    row = {"id": event_id, "name": name, "user_id": user_id, "data": dict(data), "at": at}
    connection.execute(insert(events).values(row))
    return event_id


def _owe_deliveries(connection: Connection, event_id: str, name: str, user_id: str, at: datetime) -> None:
    fixed: dict[str, Any] = {
        "event_id": event_id, "state": "pending", "attempts": 0, "due_at": at, "claim": "",
        "status": 0, "error": "", "duration_ms": 0, "created_at": at,
    }  # fmt: skip
    spelled = case((webhook_events.c.name == EVERYTHING, name), else_=webhook_events.c.name)
    chosen = (
        select(
            webhooks.c.id,
            spelled,
            *(literal(value, deliveries.c[column].type) for column, value in fixed.items()),
        )
        .select_from(webhooks.join(webhook_events, webhook_events.c.webhook_id == webhooks.c.id))
        .where(
            webhooks.c.user_id == user_id,
            webhooks.c.state == "enabled",
            webhook_events.c.name.in_(spellings(name)),
        )
        # One that is being deleted is waited for and passed over, or its key would fail and with it the event's cause.
        .with_for_update(read=True, key_share=True, of=webhooks)
    )
    connection.execute(insert(deliveries).from_select(["webhook_id", "name", *fixed], chosen))
