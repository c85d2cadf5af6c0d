"""Leases of credit: what worker processes may spend of customers' credit without a question for every call.

Each is a hold in the ledger, one for each worker and customer, apart for keys with a budget of their own. It grows when
the worker asks, shrinks when it gives back and when its receipts are settled, and ends when the worker is dead and its
journal is read to the end.

What nobody knows for sure, such as the outcome of a commit whose answer was lost, or what a control before this one was
told, leaves a hold larger than what the worker has, never smaller. That ends when the worker has nothing left.
"""

import math
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, select, update

from gpuproxy.ledger import holds
from gpuproxy.ledger.budgets import KEY_MARK, Budget, refused, room
from gpuproxy.ledger.rates import share
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.transfers import AMOUNT_NANOUSD_MAX, credit_account, lock
from gpuproxy.link.messages import HeldCredit, Lease, Return
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import holds as table

SHARE = 8  # a lease is at most this part of the free credit
EXPIRY_S = 7_200.0  # a lease whose node is gone for so long is given back; its receipts then meet free credit
RENEWALS = 12  # of living workers' leases, until they would expire
PASSES = 2  # of the journal's reader: what a worker wrote before it gave back is settled then
ENDED_AT_ONCE = 1_000
OWNER_PREFIX = lease_owner("", "").removesuffix("/")  # of the leases of all nodes

Key = tuple[str, str]  # owner of the hold, user id

logger = get_logger(__name__)


class CreditLeases:
    """Those of the workers of one node. ``passes()`` counts how often the journal was read to its end."""

    def __init__(self, store: Store, node: str, passes: Callable[[], int]) -> None:
        self.expiry_s = EXPIRY_S
        self._store = store
        self._node = node
        self._passes = passes
        self._owed: dict[Key, int] = {}  # what came back and is still held
        self._idle: dict[Key, int] = {}  # the pass in which the worker had nothing left
        self._told: dict[str, set[Key]] = {}  # by worker: what it has had since it was linked
        self._told_whole: set[str] = set()
        self._suspects: set[str] = set()
        self._renewed_s = -math.inf

    async def grant(self, epoch: str, ask: Lease, is_last: bool) -> tuple[int, Budget | None]:
        """Hold a part of the customer's free credit for a worker; return how much, and the budget that refused more.

        `is_last` tells that the call is refused now if this refuses. Raises what the store raises.
        """
        owner = lease_owner(self._node, epoch, ask.key_id)
        self._idle.pop((owner, ask.user_id), None)
        if (told := self._told.get(worker_of(owner))) is not None:
            told.add((owner, ask.user_id))
        async with self._store.writing() as connection:
            await connection.run_sync(self._free, {ask.user_id})
            return await connection.run_sync(_hold, owner, ask, is_last, self.expiry_s)

    def take_back(self, epoch: str, returned: Return) -> None:
        """Note what a worker gives back; it is free again with the customer's next grant or `flush`.

        A negative amount says that the worker has nothing left nor in use: whatever is still held for it is given back
        when its receipts are settled.
        """
        key = (lease_owner(self._node, epoch, returned.key_id), returned.user_id)
        if returned.amount < 0:
            self._idle[key] = self._passes()
        elif returned.amount:
            self._owed[key] = self._owed.get(key, 0) + returned.amount

    def restate(self, epoch: str, told: HeldCredit) -> None:
        """Note of whom a worker has credit that is linked anew; what is held for it of others is given back.

        It may have said so before, to nobody, or to a control that died before it was done.
        """
        worker = lease_owner(self._node, epoch)
        if told.is_first:
            self._told[worker] = set()
            self._told_whole.discard(worker)
        self._told[worker] |= {(lease_owner(self._node, epoch, key_id), user_id) for user_id, key_id in told.held}
        if told.is_last:
            self._told_whole.add(worker)

    async def flush(self) -> None:
        """Free what came back. Raises what the store raises."""
        if self._told_whole:
            await self._find_left()
        due = self._due()
        user_ids = {user_id for _, user_id in (*self._owed, *due)}
        if user_ids:
            async with self._store.writing() as connection:
                await connection.run_sync(self._free, user_ids)
            for key in [key for key, seen in due.items() if self._idle.get(key) == seen]:
                del self._idle[key]

    async def holders(self, user_id: str) -> set[str]:
        """Return the owners on all nodes that may have something unspent."""
        chosen = _is_pending(OWNER_PREFIX) & (table.c.account_id == credit_account(user_id))
        async with self._store.reading() as connection:
            return set(await connection.scalars(select(table.c.owner).where(chosen, table.c.remaining_nanousd > 0)))

    async def sweep(self, epochs: Iterable[str]) -> int:
        """End the leases of workers that are not among these; return how many.

        Only who was missing in the sweep before as well is dead: between two segments a worker has none.
        """
        living = {lease_owner(self._node, epoch) for epoch in epochs}
        query = select(table.c.owner).where(self._is_ours()).distinct()
        found = {row.owner for row in await self._store.look(query)}
        dead = {owner for owner in found if worker_of(owner) not in living}
        ended, self._suspects = dead & self._suspects, dead
        if time.monotonic() - self._renewed_s >= self.expiry_s / RENEWALS:
            await self._renew(found - dead)
            self._renewed_s = time.monotonic()
        return await self._end(ended) if ended else 0

    def forget_suspects(self) -> None:
        """Let the next sweep suspect, not end."""
        self._suspects = set()

    def _is_ours(self) -> ColumnElement[bool]:
        return _is_pending(lease_owner(self._node, ""))

    def _due(self) -> dict[Key, int]:
        return {key: seen for key, seen in self._idle.items() if self._passes() >= seen + PASSES}

    def _free(self, connection: Connection, user_ids: set[str]) -> None:
        """Free what came back of these customers, and all that is held for workers that have nothing left."""
        lock(connection, map(credit_account, user_ids))
        # Taken when locked: who waited for it frees nothing twice, and finds no worker idle that has asked meanwhile.
        wanted = {key: self._owed.pop(key) for key in list(self._owed) if key[1] in user_ids}
        wanted |= {key: AMOUNT_NANOUSD_MAX for key in self._due() if key[1] in user_ids}
        for (owner, user_id), amount in sorted(wanted.items()):
            hold = _of(connection, owner, credit_account(user_id))
            if hold is not None:
                holds.give_back(connection, hold.id, amount)

    async def _find_left(self) -> None:
        """Take for idle what is held for workers that have told that they have none of it."""
        query = select(table.c.owner, table.c.account_id).where(self._is_ours())
        async with self._store.reading() as connection:
            rows = (await connection.execute(query)).all()
        for owner, account_id in rows:
            key = (owner, account_id.removeprefix(credit_account("")))
            worker = worker_of(owner)
            if worker in self._told_whole and key not in self._told[worker]:
                self._idle.setdefault(key, self._passes())
        for worker in self._told_whole:
            del self._told[worker]
        self._told_whole.clear()

    async def _end(self, owners: set[str]) -> int:
        """Resolve the leases of workers that are gone, whose receipts are all settled."""
        ended = 0
        for owner in sorted(owners):
            count = ENDED_AT_ONCE
            while count == ENDED_AT_ONCE:
                async with self._store.writing() as connection:
                    count = await connection.run_sync(_end, owner)
                ended += count
        for key in [key for key in {**self._idle, **self._owed} if key[0] in owners]:
            self._idle.pop(key, None)
            self._owed.pop(key, None)
        logger.info("leases of workers that are gone were given back", owners=sorted(owners), lease_count=ended)
        return ended

    async def _renew(self, owners: set[str]) -> None:
        async with self._store.writing() as connection:
            await connection.run_sync(_renew, owners, self.expiry_s)
        async with self._store.writing() as connection:  # another: it locks accounts, which come before holds
            await connection.run_sync(holds.expire, datetime.now(UTC))


def worker_of(owner: str) -> str:
    """Return the owner of the leases for all keys, of the worker that owns those of one."""
    return owner.partition(KEY_MARK)[0]


def _is_pending(prefix: str) -> ColumnElement[bool]:
    return (table.c.state == "pending") & (table.c.owner >= prefix) & (table.c.owner < prefix + "\U0010ffff")


def _hold(connection: Connection, owner: str, ask: Lease, is_last: bool, expiry_s: float) -> tuple[int, Budget | None]:
    account_id = credit_account(ask.user_id)
    account = lock(connection, [account_id]).get(account_id)
    free = account.free_nanousd if account else 0
    left = room(connection, ask.user_id, ask.key_id)
    amount = share(min(free, left.nanousd), ask.least, ask.wanted, SHARE)
    if not amount:
        budget = left.tightest if left.nanousd < ask.least <= free else None
        if budget is not None and is_last:
            refused(connection, budget)
        return 0, budget
    expires_at = datetime.now(UTC) + timedelta(seconds=expiry_s)
    hold = _of(connection, owner, account_id)
    if hold is None:
        holds.place(connection, ask.user_id, amount, f"{owner}:{uuid4()}", owner, expires_at)
    elif not holds.extend(connection, hold.id, amount, expires_at):
        return 0, None
    return amount, None


def _of(connection: Connection, owner: str, account_id: str) -> holds.Hold | None:
    return next((hold for hold in holds.pending_of(connection, owner) if hold.account_id == account_id), None)


def _end(connection: Connection, owner: str) -> int:
    """Resolve holds of an owner, ENDED_AT_ONCE at most; return how many."""
    found = holds.pending_of(connection, owner)[:ENDED_AT_ONCE]
    lock(connection, {hold.account_id for hold in found})
    for hold in filter(None, [holds.get(connection, each.id) for each in found]):  # as they are now
        if hold.state == "pending" and hold.posted_nanousd:
            holds.settle(connection, hold.id, 0, "usage")
        elif hold.state == "pending":
            holds.void(connection, hold.id)
    return len(found)


def _renew(connection: Connection, owners: set[str], expiry_s: float) -> None:
    """Move the end of leases; of one that somebody changes now the next time, or both might wait for each other."""
    expires_at = datetime.now(UTC) + timedelta(seconds=expiry_s)
    chosen = (table.c.state == "pending") & table.c.owner.in_(sorted(owners))
    free = select(table.c.id).where(chosen).with_for_update(skip_locked=True)
    connection.execute(update(table).where(table.c.id.in_(free)).values(expires_at=expires_at))
