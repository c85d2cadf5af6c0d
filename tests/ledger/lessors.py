"""Leases of a node and the workers it can reach, for the tests of both kinds."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.ledger import holds
from gpuproxy.ledger.leases import Leases
from gpuproxy.ledger.peers import Peers
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.slots import Slots
from gpuproxy.ledger.windows import Windows
from gpuproxy.link.messages import Lease, LeaseKind, Recall, Return
from gpuproxy.link.wallet import Wallet
from gpuproxy.store.engine import Store

Writing = AbstractAsyncContextManager[AsyncConnection]


class Site:
    """Leases of a node, and the workers it can reach."""

    def __init__(
        self,
        store: Store,
        node: str = "here",
        windows: Windows | None = None,
        peers: Peers | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self.limit = 10
        self.passes = 0
        self.workers: dict[str, Worker] = {}
        self.leases = Leases(
            store, node, self._limit_of, self._push, lambda: self.passes, windows, peers, Slots(grace_s)
        )

    async def ask(self, epoch: str, user_id: str, least: int, wanted: int = 0, kind: LeaseKind = "nanousd") -> int:
        return (await self.leases.grant(epoch, Lease(1, user_id, "", kind, least, wanted))).amount

    def give(self, epoch: str, user_id: str, amount: int, kind: LeaseKind = "nanousd") -> None:
        self.leases.take_back(epoch, Return(user_id, "", kind, amount, 1))

    async def _limit_of(self, user_id: str, key_id: str) -> int:
        return self.limit

    def _push(self, epoch: str, recall: Recall) -> bool:
        if epoch in self.workers:
            asyncio.get_running_loop().call_soon(self.workers[epoch].recalled, recall)
        return epoch in self.workers


class Worker:
    """A worker with one wallet of a user."""

    def __init__(self, site: Site, epoch: str, user_id: str, kind: LeaseKind = "nanousd") -> None:
        self.wallet = Wallet(self._ask, self._give)
        self._site, self._epoch, self._user_id, self._kind = site, epoch, user_id, kind
        self._ids = 0
        self._questions: deque[asyncio.Task[None]] = deque()
        site.workers[epoch] = self

    async def call(self, amount: int) -> bool:
        """Take an amount, wherever it comes from, and use all of it."""
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if not self.wallet.take(amount, self._site.leases.now_ns(), answered.set_result):
            return await answered == "taken"
        return True

    def recalled(self, recall: Recall) -> None:
        self.wallet.recall(self._site.leases.now_ns())
        self._site.leases.take_back(self._epoch, Return(self._user_id, "", self._kind, 0, 0, recall.id))

    def _ask(self, least: int, wanted: int) -> None:
        self._questions.append(asyncio.get_running_loop().create_task(self._question(least, wanted)))

    async def _question(self, least: int, wanted: int) -> None:
        self._ids += 1
        ask = Lease(self._ids, self._user_id, "", self._kind, least, wanted)
        leased = await self._site.leases.grant(self._epoch, ask)
        self.wallet.refill(leased.id, leased.amount, leased.until_ns, self._site.leases.now_ns())

    def _give(self, lease_id: int, amount: int) -> None:
        self._site.leases.take_back(self._epoch, Return(self._user_id, "", self._kind, amount, lease_id))


async def held(store: Store, epoch: str) -> int:
    """Return what the ledger holds for a worker."""
    async with store.reading() as connection:
        return sum(
            hold.remaining_nanousd for hold in await connection.run_sync(holds.pending_of, lease_owner("here", epoch))
        )


@asynccontextmanager
async def committed_unheard(writing: Callable[[], Writing]) -> AsyncIterator[AsyncConnection]:
    """Write, but lose the answer to the commit."""
    async with writing() as connection:
        yield connection
    raise ConnectionResetError("the answer to COMMIT was lost")
