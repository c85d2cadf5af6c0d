"""Hands workers parts of limits and balances, so that both hold exactly without a question for every call.

The less is left the smaller the leases, down to what one call needs; before a call is refused, the other workers, of
this machine and of others, are asked to give back what they do not use. See `credit_leases`, `windows` and `slots`.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import count
from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

from gpuproxy.ledger.credit_leases import OWNER_PREFIX, CreditLeases, worker_of
from gpuproxy.ledger.peers import Peers
from gpuproxy.ledger.settle import lease_owner
from gpuproxy.ledger.slots import Slots
from gpuproxy.ledger.windows import LocalWindows, Part, Subject, Windows
from gpuproxy.link.messages import STREAMS, TOKENS, HeldCredit, HeldStreams, Lease, Leased, LeaseKind, Recall, Return
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store

MOMENT_S = 0.05  # longer than a worker has no segment between two
RECALL_S = 0.25  # how long a worker may take to give back what another needs
LIMIT_TTL_S = 1.0  # a changed limit holds after this long
LIMIT_ANSWER_S = 1.0  # half of what a worker waits
LIMITS_MAX = 100_000  # remembered for a store that is away
MARKS = {"requests": "", "tokens": TOKENS, "streams": STREAMS}  # before the key id of a subject

LimitOf = Callable[[str, str], Awaitable[int]]
Push = Callable[[str, Recall], bool]

logger = get_logger(__name__)


class Leases:
    """The leases of the workers of one data directory.

    ``limit_of(user_id, key_id)`` returns requests per minute, of the user if key_id is empty; 0 is no limit. Where
    TOKENS stands before it: tokens per minute; STREAMS: streams at once, which `slots` count.
    ``push(epoch, message)`` sends to a worker and tells whether it is there. ``passes()`` counts how often the journal
    was read to its end. `windows` count requests, `peers` are the other nodes.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        limit_of: LimitOf,
        push: Push,
        passes: Callable[[], int] = lambda: 1 << 62,
        windows: Windows | None = None,
        peers: Peers | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.now_ns: Callable[[], int] = time.monotonic_ns
        self.limit_stale_s = 3_600.0  # how long a limit holds that cannot be read again
        self.credit = CreditLeases(store, node, passes)
        self._node = node
        self._limit_of = limit_of
        self._push = push
        self._locks: WeakValueDictionary[Subject, asyncio.Lock] = WeakValueDictionary()
        self._windows = windows or LocalWindows()
        self._peers = peers
        self._slots = slots or Slots()
        self._limits: dict[Subject, tuple[int, float]] = {}  # and when it was read
        self._limits_away_until_s = 0.0
        self._recalls: dict[int, tuple[set[str], asyncio.Event]] = {}
        self._recall_ids = count(1)
        if peers is not None:
            peers.give_back = self.give_back

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        """Answer a worker's question. Raises what the store raises."""
        subject = subject_of(ask)
        async with self._locks.setdefault(subject, asyncio.Lock()):
            answer, elsewhere = await self._grant(epoch, ask, subject)
            if not answer.amount and ask.least:
                await self._slots.ready()  # a control that has just started cannot ask those that are not linked yet
                was_recalled = await self._recall(epoch, ask.kind, subject, elsewhere)
                if was_recalled or answer.budget_ends_ns:
                    answer, _ = await self._grant(epoch, ask, subject, is_last=True)
        return answer

    async def left(self, subject: Subject) -> tuple[int, Part] | None:
        """Return the limit of a subject and what nobody was given of it; None if nothing limits it."""
        limit = await self._limit(subject)
        if not limit:
            return None
        return limit, await self._windows.grant(subject, ("", 0), limit, 0, 0, self.now_ns())

    async def streams_left(self, user_id: str, key_id: str) -> tuple[int, int] | None:
        """Return the limit of streams of a key or user and how many no worker holds; None if nothing limits them."""
        subject = user_id, STREAMS + key_id
        limit = await self._limit(subject)
        return (limit, self._slots.left(subject, limit)) if limit else None

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        """Note which streams a worker holds, or of whom it has credit, that has been linked."""
        if isinstance(told, HeldCredit):
            self.credit.restate(epoch, told)
            return
        held = [((user_id, STREAMS + key_id), amount) for user_id, key_id, amount in told.held]
        self._slots.restate(epoch, held, told.is_first)

    async def give_back(self, subject: Subject, kind: LeaseKind) -> None:
        """Let the workers here give back what they do not use, and all nodes see it. Raises what the store raises."""
        await self._recall_here("", await self._holders(kind, subject), subject, kind)
        await self.flush()

    def take_back(self, epoch: str, returned: Return) -> None:
        """Note what a worker gives back; all can have it with the next grant or `flush`, within a moment."""
        if returned.kind == "streams":
            self._slots.take_back(subject_of(returned), epoch, returned.amount)
        elif returned.kind != "nanousd":
            self._windows.take_back(subject_of(returned), (epoch, returned.lease_id), returned.amount)
        else:
            self.credit.take_back(epoch, returned)
        self._note_answer(epoch, returned.recall_id)

    async def flush(self) -> None:
        """Free what came back. Raises what the store raises."""
        await self._windows.flush()
        await self.credit.flush()

    async def sweep(self, linked: Iterable[str], journaled: Iterable[str]) -> int:
        """End the leases of workers that are neither linked nor have a journal, see `CreditLeases`; return how many."""
        linked = set(linked)
        self._slots.sweep(linked)
        await self.flush()
        self._windows.sweep(self.now_ns())
        self._forget_limits()
        return await self.credit.sweep((*linked, *journaled))

    async def close(self, journaled: Callable[[], set[str]]) -> int:
        """End the leases of the workers of this node that are gone, at once; return how many. Raises as `sweep`.

        For a node that is stopped: its journal has been read to the end. A worker that lives has a segment there, but
        for a moment.
        """
        living = journaled()
        await asyncio.sleep(MOMENT_S)
        self.credit.forget_suspects()
        await self.sweep((), living | journaled())
        return await self.sweep((), living | journaled())

    async def _grant(
        self, epoch: str, ask: Lease, subject: Subject, is_last: bool = False
    ) -> tuple[Leased, AbstractSet[str]]:
        """Answer from what is free; also say which other nodes may hold requests, as far as that is known."""
        if ask.kind == "streams":
            return await self._grant_streams(epoch, ask, subject), frozenset()
        if ask.kind != "nanousd":
            return await self._grant_requests(epoch, ask, subject)
        amount, budget = await self.credit.grant(epoch, ask, is_last)
        budget_ends_ns = budget.ends_ns(time.time()) if budget is not None else 0
        return Leased(ask.id, amount, budget_ends_ns=budget_ends_ns), frozenset()

    async def _grant_requests(self, epoch: str, ask: Lease, subject: Subject) -> tuple[Leased, AbstractSet[str]]:
        limit = await self._limit(subject)
        if limit:
            limit = max(limit, ask.limit)
        else:
            return Leased(ask.id, max(ask.least, ask.wanted)), frozenset()
        now_ns = self.now_ns()
        part = await self._windows.grant(subject, (epoch, ask.id), limit, ask.least, ask.wanted, now_ns)
        return Leased(ask.id, part.amount, part.until_ns, limit, part.left, part.reset_ns), part.elsewhere

    async def _grant_streams(self, epoch: str, ask: Lease, subject: Subject) -> Leased:
        await self._slots.ready()
        limit = await self._limit(subject)
        amount = self._slots.grant(subject, epoch, limit, ask.least, ask.wanted)
        return Leased(ask.id, amount, limit=limit)

    async def _limit(self, subject: Subject) -> int:
        """Return the limit, while the store is away the one it had, within `limit_stale_s`."""
        now_s = time.monotonic()
        limit, read_s = self._limits.get(subject, (0, -math.inf))
        is_usable = now_s < read_s + self.limit_stale_s
        if now_s < read_s + LIMIT_TTL_S or (is_usable and now_s < self._limits_away_until_s):
            return limit
        try:
            async with asyncio.timeout(LIMIT_ANSWER_S):
                limit = await self._limit_of(*subject)
        except Exception:
            self._limits_away_until_s = now_s + LIMIT_TTL_S  # others need not find out for themselves
            if not is_usable:
                raise
            return limit
        self._limits[subject] = limit, now_s
        return limit

    async def _recall(self, epoch: str, kind: LeaseKind, subject: Subject, elsewhere: AbstractSet[str]) -> bool:
        """Ask the others to give back; True if any was there to be asked."""
        owners = await self._holders(kind, subject)
        nodes = {*elsewhere, *(owner.removeprefix(OWNER_PREFIX).partition("/")[0] for owner in owners)} - {self._node}
        here = self._recall_here(epoch, owners, subject, kind)
        there = self._peers.recall(nodes, subject, kind) if self._peers is not None and nodes else _nobody()
        return any(await asyncio.gather(here, there))

    async def _recall_here(self, epoch: str, owners: set[str], subject: Subject, kind: LeaseKind) -> bool:
        """Ask those of the owners that are workers here, but for `epoch`."""
        prefix = lease_owner(self._node, "")
        recall_id = next(self._recall_ids)
        message = Recall(recall_id, *subject, kind)
        missing = {worker_of(owner).removeprefix(prefix) for owner in owners if owner.startswith(prefix)} - {epoch}
        answered = asyncio.Event()
        self._recalls[recall_id] = missing, answered
        try:
            missing -= {other for other in missing if not self._push(other, message)}
            if not missing:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(RECALL_S):
                    await answered.wait()
            return True
        finally:
            del self._recalls[recall_id]

    async def _holders(self, kind: LeaseKind, subject: Subject) -> set[str]:
        """Return the owners that may have something unspent: of limits those here, of credit those everywhere."""
        if kind == "streams":
            return {lease_owner(self._node, epoch) for epoch in self._slots.holders(subject)}
        if kind != "nanousd":
            return {lease_owner(self._node, epoch) for epoch in self._windows.holders(subject, self.now_ns())}
        return await self.credit.holders(subject[0])

    def _note_answer(self, epoch: str, recall_id: int) -> None:
        missing, answered = self._recalls.get(recall_id, (set(), None))
        missing.discard(epoch)
        if answered is not None and not missing:
            answered.set()

    def _forget_limits(self) -> None:
        oldest_s = time.monotonic() - self.limit_stale_s
        kept = [(subject, held) for subject, held in self._limits.items() if held[1] > oldest_s]
        self._limits = dict(kept[-LIMITS_MAX:])


async def _nobody() -> bool:
    return False


def subject_of(message: Lease | Return) -> Subject:
    """Return what a message is about: a user's credit, or a limit of a user or key."""
    if message.kind == "nanousd":
        return message.user_id, ""
    return message.user_id, MARKS[message.kind] + message.key_id


def node_id(data_dir: Path) -> str:
    """Return the name of a data directory, made up when first asked: it tells nodes on one store apart."""
    path = data_dir / "node"
    data_dir.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), path.open("x") as file:
        file.write(uuid4().hex)
    return path.read_text().strip()


def journaled_epochs(directory: Path) -> set[str]:
    """Return the worker processes that have a segment in the journal, written or being written."""
    with suppress(FileNotFoundError):
        return {path.stem.rpartition("-")[0] for path in directory.iterdir() if path.suffix in (".log", ".new")}
    return set()
