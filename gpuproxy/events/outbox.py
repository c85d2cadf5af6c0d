"""The outbox: an event is stored in the transaction of what caused it, so that both are there or neither.

Consumers read the table in the order of `seq`; nobody is told from here.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, insert

from gpuproxy.store.schema import events


def record(connection: Connection, name: str, user_id: str | None, data: Mapping[str, Any]) -> str:
    """Store an event inside the caller's writing transaction; return its id.

    `user_id` says whose it is, None: everybody's. `data` is JSON: no secrets, and no key of its own named user_id.
    """
    event_id = f"evt_{uuid4().hex}"
    row = {"id": event_id, "name": name, "user_id": user_id, "data": dict(data), "at": datetime.now(UTC)}
    connection.execute(insert(events).values(row))
    return event_id
