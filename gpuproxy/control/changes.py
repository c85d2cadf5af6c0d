"""Reads the store's change feed and tells workers over the link, whichever process on whichever node made the change.

A word on the bus makes it look at once; without one it looks every POLL_S. Rows that no node can need go after KEPT.
"""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from functools import partial

from gpuproxy.access.changes import forget_changes, newest_change, revoked_keys_since, unread_changes
from gpuproxy.access.keys import revoke_expired_keys
from gpuproxy.link.server import LinkServer
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.cursor import Cursor
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds, unless_unchanged

POLL_S = 0.3  # a revoked key must be dead everywhere within a second
EXPIRED_S = 1.0  # how late a key whose end was moved may be found to have expired
KEPT = timedelta(days=7)  # of a change; who was cut off for `Auth.stale_grant_s` asks for every grant anew
FORGET_S = 600.0  # between two looks whether there is anything to forget
REREAD = 100  # rows before the newest, read again at the start: transactions with lower numbers may be open

logger = get_logger(__name__)


class ChangeFeed:
    """How far the feed was read. Before the first `poll_once` call `start`."""

    def __init__(self, store: Store, link: LinkServer) -> None:
        self._store = store
        self._link = link
        self._cursor = Cursor(0)
        self._reading = asyncio.Lock()
        self._woken = asyncio.Event()
        self._kept = KEPT
        self._forgot_s = -FORGET_S

    async def start(self, remember_s: float) -> None:
        """Begin at the feed's end, but with what workers that outlived the last control may have missed."""
        self._cursor = Cursor(max(0, await newest_change(self._store) - REREAD))
        remembered = timedelta(seconds=remember_s)
        self._kept = max(KEPT, 2 * remembered)
        since = datetime.now(UTC) - remembered
        self._link.revoke(await revoked_keys_since(self._store, since))

    def wake(self, _text: str = "") -> None:
        """Let `run` look at once."""
        self._woken.set()

    async def poll_once(self) -> int:
        """Push what is new; return how many changes that were."""
        async with self._reading:
            await revoke_expired_keys(self._store)
            rows, changed = await unread_changes(self._store, self._cursor)
            self._cursor.advance(rows)
            self._link.readmit(changed.restored)
            if changed.renters:
                self._link.forget_machines(changed.renters)
            self._link.renew(changed.renewed)
            if changed.lost:
                logger.info("keys revoked", key_ids=changed.lost)
                self._link.revoke(changed.lost)
        return len(rows)

    async def run(self, stopping: asyncio.Event) -> None:
        """Poll until `stopping` is set, through outages of the store."""
        complain = partial(logger.error, "change feed cannot be read, will go on")
        look = unless_unchanged(self._store, self._round, EXPIRED_S)
        await rounds(look, POLL_S, stopping, complain, self._woken)

    async def _round(self) -> int:
        return await self.poll_once() + await self.forget()

    async def forget(self) -> int:
        """Delete some of what is older than it is kept, once in a while; return how many, 0 if that was all."""
        if time.monotonic() - self._forgot_s < FORGET_S:
            return 0
        count = await forget_changes(self._store, datetime.now(UTC) - self._kept)
        if not count:
            self._forgot_s = time.monotonic()
        return count
