"""Who changed what as an admin: a row in the same transaction as the change."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.callers import Caller
from gpuproxy.store.schema import audit


async def note(
    connection: AsyncConnection, actor: Caller, action: str, subject_id: str, detail: dict[str, Any]
) -> None:
    """Write down that `actor` did `action` to `subject_id`; `detail` is what can be said as JSON, no secrets."""
    row = {"actor_user_id": actor.user_id, "actor_key_id": actor.key_id, "action": action, "subject_id": subject_id}
    await connection.execute(insert(audit).values(**row, detail=detail, at=datetime.now(UTC)))
