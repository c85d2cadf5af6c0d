"""Notes which accounts are listened to for what their calls use, so that it is summed up; see `events.usage`."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import Connection

from gpuproxy.events.usage import want
from gpuproxy.store.engine import Store

USAGE_CHANNEL = "usage_events"
RENEW_S = 3_600.0  # far less than what is noted holds


class UsageWanted:
    """One node's notes: each account is written down once an hour while somebody listens."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted_s: dict[str, float] = {}

    async def note(self, user_ids: Iterable[str]) -> None:
        """Write down those of the accounts that were not lately. Raises what the store raises."""
        now_s = time.monotonic()
        self._noted_s = {each: at_s for each, at_s in self._noted_s.items() if now_s - at_s < RENEW_S}
        fresh = sorted({*user_ids} - self._noted_s.keys())
        if fresh:
            async with self._store.writing() as connection:
                await connection.run_sync(_want_all, fresh, datetime.now(UTC))
            self._noted_s.update(dict.fromkeys(fresh, now_s))


def _want_all(connection: Connection, user_ids: list[str], now: datetime) -> None:
    for user_id in user_ids:
        want(connection, user_id, now)
