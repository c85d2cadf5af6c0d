"""One of the nodes on a PostgreSQL does what only one shall do: it holds an advisory lock of its session.

The lock ends with the session, so a leader that dies is followed within a second or two, one whose machine falls off
the network within half a minute. A leader that is stopped and goes on much later still believes in itself for a
moment: before an effect outside the store ask `confirm`, and let effects inside be guarded by keys and row locks.

On SQLite there is one node, which leads.

    if leader.is_leader: ...             cheap: what is periodic and harmless when done twice
    if await leader.confirm(): ...       before renting, destroying, charging, sending
"""

import asyncio
from typing import Any

from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store, connect_postgresql, fault_of
from gpuproxy.store.rounds import pause

LOCK_ID = 7_305_819_212  # any number, the same for every gpuproxy on one PostgreSQL; not that of the migrations
CHECK_S = 1.0
ANSWER_S = 2.0  # a database that takes longer cannot tell

logger = get_logger(__name__)


class Leader:
    """Whether this process leads. `run` must run for it to ever do so on PostgreSQL."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._session: Any = None
        self._asking = asyncio.Lock()  # asyncpg takes one statement at a time
        self._has_lock = store.is_sqlite

    @property
    def is_leader(self) -> bool:
        """Tell whether this process led when it last looked, about a second ago."""
        return self._has_lock

    async def confirm(self) -> bool:
        """Ask the database whether this process leads now; costs a round trip."""
        if self._has_lock and not self._store.is_sqlite:
            await self._look()
        return self._has_lock

    async def run(self, stopping: asyncio.Event) -> None:
        """Try to lead until `stopping` is set, through outages of the store; then let another lead."""
        try:
            while not stopping.is_set():
                if not self._store.is_sqlite:
                    await self._look()
                await pause(CHECK_S, stopping)
        finally:
            self._end()

    async def _look(self) -> None:
        """Take the lock, or see that the session which holds it lives."""
        try:
            async with self._asking, asyncio.timeout(ANSWER_S):
                if self._session is None:
                    self._session = await connect_postgresql(self._store)
                statement = "SELECT true" if self._has_lock else f"SELECT pg_try_advisory_lock({LOCK_ID})"
                has_lock = bool(await self._session.fetchval(statement))
        except Exception as error:  # asyncpg raises errors of its own, of the system, and of its own faults
            if self._has_lock:
                logger.warning("leads no more, the store is away", error=fault_of(error))
            self._end()
            return
        if has_lock and not self._has_lock:
            logger.info("leads the nodes on this store")
        self._has_lock = has_lock

    def _end(self) -> None:
        """End the session, and the lock with it."""
        if self._session is not None:
            self._session.terminate()
        self._session = None
        self._has_lock = False
