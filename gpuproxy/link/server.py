"""Control's end of the link: answers workers' questions about keys and leases and pushes revocations.

A worker that was away hears on its return what was revoked meanwhile; an answer read from the store before a
revocation but sent after it is corrected on the way out. So no worker is left with a key that was taken back.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, cast

import msgspec
from msgspec import structs

from gpuproxy.link.breakers import Breakers
from gpuproxy.link.messages import (
    AskMachines,
    Authorize,
    Authorized,
    BreakerMove,
    EndpointState,
    ForgetMachines,
    FrameReader,
    FromControl,
    FromWorker,
    GiveSeats,
    HeldCredit,
    HeldStreams,
    Hello,
    HoldSeats,
    Lease,
    Leased,
    Machine,
    Machines,
    Prices,
    Renew,
    Return,
    Revoke,
    Routing,
    SealKeys,
    States,
    Unavailable,
    WantSeats,
    decode_from_worker,
    frame,
)
from gpuproxy.link.seating import Seating
from gpuproxy.observe.logs import get_logger
from gpuproxy.pricing import Price
from gpuproxy.types import Grant

Authorizer = Callable[[bytes], Awaitable[Grant | None]]
MachinesOf = Callable[[str], Awaitable[tuple[Machine, ...]]]

QUESTIONS_MAX = 4_096  # open at once per worker; more are answered Unavailable
UNSENT_BYTES_MAX = 4 << 20  # of a worker that does not read; it is cut off and will come back
REVOKE_KEYS_MAX = 1_000  # in one message: 40 KB
PRICES_AT_ONCE = 1_000  # in one message: up to 600 KB
GONE_S = 1.0  # a worker that has not come back by then is dead: several times what it waits before it connects again
COMPLAINT_S = 10.0  # between two log lines about a store that fails

logger = get_logger(__name__)


class Lessor(Protocol):
    """Hands out and takes back leases of a worker, which is named by its epoch."""

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        """Answer a question. May raise: then nobody knows."""

    def take_back(self, epoch: str, returned: Return) -> None:
        """Take what a worker does not need, in the order it gives."""

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        """Note what a worker holds that has been linked."""


class LinkServer:
    """All workers' links. `authorize` returns the grant for a digest and may raise: then nobody knows.

    Revocations are remembered for `remember_s`, which must cover the longest life of a grant in a worker. Before
    a worker on its return is told of them, `refresh` is awaited, so that none is out of date.
    """

    def __init__(self, authorize: Authorizer, timeout_s: float, remember_s: float) -> None:
        self.links: set[WorkerLink] = set()
        self.lessor: Lessor | None = None
        self.machines_of: MachinesOf | None = None
        self.refresh: Callable[[], Awaitable[object]] | None = None
        self.seal_keys: tuple[bytes, ...] = ()
        self.breakers = Breakers()
        self.seating = Seating(self.push)
        self.seating_after_s = GONE_S  # from the first worker's word: until then others may tell what they hold
        self._authorize = authorize
        self._timeout_s = timeout_s
        self._remember_s = remember_s
        self._revoked: dict[str, float] = {}  # key id to monotonic time, oldest first
        self._prices: tuple[Price, ...] = ()
        self._routing: Routing | None = None
        self._server: asyncio.Server | None = None
        self._complained_s = -COMPLAINT_S

    async def start(self, listener: socket.socket) -> None:
        """Accept workers on a listening Unix socket."""
        loop = asyncio.get_running_loop()
        # not create_unix_server: since Python 3.13 that removes the path at its end, and a successor listens on it
        self._server = await loop.create_server(lambda: WorkerLink(self), sock=listener)

    def revoke(self, key_ids: Iterable[str]) -> None:
        """Tell every worker, now and on its return, to forget these keys."""
        now = time.monotonic()
        fresh = tuple(key_ids)
        for key_id in fresh:
            self._revoked.pop(key_id, None)
            self._revoked[key_id] = now
        self._forget_before(now - self._remember_s)
        for link in list(self.links):
            link.send_revoked(fresh)

    def readmit(self, key_ids: Iterable[str]) -> None:
        """Forget that these keys were revoked: they are good again."""
        for key_id in key_ids:
            self._revoked.pop(key_id, None)

    def renew(self, key_ids: Iterable[str]) -> None:
        """Let every worker that is linked ask about these keys again; others do so when they come back."""
        wanted = tuple(key_ids)
        for link in list(self.links):
            for start in range(0, len(wanted), REVOKE_KEYS_MAX):
                link.send(Renew(wanted[start : start + REVOKE_KEYS_MAX]))

    def publish(self, prices: Iterable[Price]) -> None:
        """Tell every worker, now if they have changed and each on its return, what calls cost."""
        before, self._prices = self._prices, tuple(prices)
        if self._prices != before:
            for link in list(self.links):
                link.send_prices(self._prices)

    def publish_routing(self, routing: Routing) -> None:
        """Tell every worker, now and on its return, which upstreams and models there are."""
        self._routing = routing
        for link in list(self.links):
            link.send(routing)

    @property
    def routing(self) -> Routing | None:
        """Return what was published last."""
        return self._routing

    def states(self) -> list[EndpointState]:
        """Return what the workers that are linked now have told of their endpoints."""
        return [state for link in self.links for state in link.states]

    def waiting(self) -> list[tuple[str, int]]:
        """Return what they have told of calls that wait: a model, and how many of it in one worker."""
        return [waiting for link in self.links for waiting in link.waiting]

    @property
    def prices(self) -> tuple[Price, ...]:
        """Return what was published last."""
        return self._prices

    async def close(self) -> None:
        """Stop accepting and end every link."""
        if self._server is not None:
            self._server.close()
        for link in list(self.links):
            link.close()
        if self._server is not None:
            await self._server.wait_closed()

    async def answer(self, question: Authorize) -> Authorized | Unavailable:
        """Ask the store, for at most `timeout_s`."""
        asked_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                grant = await self._authorize(question.digest)
        except Exception as error:
            self._complain(error)
            return Unavailable(question.id)
        if grant is not None and self._revoked.get(grant.key_id, -1.0) >= asked_s:
            grant = None  # the store may have been read before the key was revoked
        return Authorized(question.id, question.digest, grant)

    async def lease(self, epoch: str, ask: Lease) -> Leased | Unavailable:
        """Ask the lessor, for at most `timeout_s`; what it grants to nobody who waits goes back to it."""
        if self.lessor is None or not epoch:
            return Unavailable(ask.id)
        work = asyncio.ensure_future(self.lessor.grant(epoch, ask))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: self._take_back(epoch, ask, done))
            raise
        except Exception as error:
            work.add_done_callback(lambda done: self._take_back(epoch, ask, done))
            self._complain(error)
            return Unavailable(ask.id)

    async def machines(self, question: AskMachines) -> Machines | Unavailable:
        """Ask the store which machines a user has, for at most `timeout_s`."""
        if self.machines_of is None:
            return Machines(question.id, question.user_id, ())
        try:
            async with asyncio.timeout(self._timeout_s):
                return Machines(question.id, question.user_id, await self.machines_of(question.user_id))
        except Exception as error:
            self._complain(error)
            return Unavailable(question.id)

    def forget_machines(self, user_ids: Iterable[str]) -> None:
        """Tell every worker that these users have other machines now; one that is away forgets all on its return."""
        told = tuple(user_ids)
        for start in range(0, len(told), REVOKE_KEYS_MAX):
            for link in list(self.links):
                link.send(ForgetMachines(told[start : start + REVOKE_KEYS_MAX]))

    def push(self, epoch: str, message: FromControl) -> bool:
        """Send to the worker with this epoch; False if it is not linked."""
        for link in self.links:
            if link.epoch == epoch:
                link.send(message)
                return True
        return False

    def linked(self, newest: "WorkerLink") -> None:
        """Let a worker's new link stand for the one it had; hand out seats a while after the first one is linked."""
        for link in self.links - {newest}:
            link.epoch = link.epoch if link.epoch != newest.epoch else ""
        self.seating.linked(newest.epoch)
        if self.seating_after_s:
            asyncio.get_running_loop().call_later(self.seating_after_s, self.seating.open)
            self.seating_after_s = 0.0

    def lost(self, epoch: str) -> None:
        """Free the seats of a worker, unless it comes back."""
        asyncio.get_running_loop().call_later(GONE_S, self.seating.gone, epoch, self.epochs)

    def pass_on(self, sender: "WorkerLink", move: BreakerMove) -> None:
        """Tell all other workers."""
        self.breakers.note(move)
        for link in self.links - {sender}:
            link.send(move)

    def epochs(self) -> set[str]:
        """Return the epochs of the workers that are linked now."""
        return {link.epoch for link in self.links if link.epoch}

    def _take_back(self, epoch: str, ask: Lease, done: "asyncio.Future[Leased]") -> None:
        """Return what was granted too late."""
        if done.cancelled() or done.exception() is not None or self.lessor is None:
            return
        self.lessor.take_back(epoch, Return(ask.user_id, ask.key_id, ask.kind, done.result().amount, ask.id))

    def remembered(self) -> tuple[str, ...]:
        """Return the keys revoked lately."""
        return tuple(self._revoked)

    async def remembered_now(self) -> tuple[str, ...]:
        """Return the keys revoked lately, by what the store says now; if it is away, by what it said last."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self.refresh is not None:
                    await self.refresh()
        except Exception as error:
            self._complain(error)
        return self.remembered()

    def _forget_before(self, limit_s: float) -> None:
        while self._revoked and next(iter(self._revoked.values())) < limit_s:
            del self._revoked[next(iter(self._revoked))]

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_s >= COMPLAINT_S:
            self._complained_s = now
            logger.error("workers' questions cannot be answered", error=f"{type(error).__name__}: {error}")


class WorkerLink(asyncio.Protocol):
    """The link to one worker."""

    def __init__(self, server: LinkServer) -> None:
        self.epoch = ""
        self.states: tuple[EndpointState, ...] = ()
        self.waiting: tuple[tuple[str, int], ...] = ()
        self._slot = -1
        self._server = server
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._answers: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the links that hear of revocations."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        self._server.links.add(self)

    def data_received(self, data: bytes) -> None:
        """Handle every whole message; end a link that breaks the format."""
        try:
            for body in self._reader.feed(data):
                self._take(decode_from_worker(body))
        except (ValueError, msgspec.MsgspecError) as error:
            logger.error("worker sent what is no link message", error=str(error))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Leave; nobody waits for the open answers any more."""
        self._transport = None
        self._server.links.discard(self)
        self._server.lost(self.epoch)
        for task in self._answers:
            task.cancel()

    def send_revoked(self, key_ids: tuple[str, ...]) -> None:
        """Tell this worker to forget these keys."""
        for start in range(0, len(key_ids), REVOKE_KEYS_MAX):
            self.send(Revoke(key_ids[start : start + REVOKE_KEYS_MAX]))

    def send_prices(self, prices: tuple[Price, ...]) -> None:
        """Tell this worker what calls cost, even if that is nothing."""
        for start in range(0, max(1, len(prices)), PRICES_AT_ONCE):
            end = start + PRICES_AT_ONCE
            self.send(Prices(prices[start:end], start == 0, end >= len(prices)))

    def close(self) -> None:
        """End the link at once."""
        if self._transport is not None:
            self._transport.abort()

    def _take(self, message: FromWorker) -> None:
        match message:
            case Hello():
                self.epoch = message.epoch
                self._slot = message.slot
                logger.debug("worker linked", slot=message.slot, worker_pid=message.pid)
                if self._server.seal_keys:
                    self.send(SealKeys(self._server.seal_keys))
                if self._server.routing is not None:
                    self.send(self._server.routing)
                for move in self._server.breakers.remembered():
                    self.send(move)
                self.send_prices(self._server.prices)  # before any grant: no call may pass unpriced
                self._start(self._welcome())
                self._server.linked(self)
            case Authorize():
                self._ask(message)
            case Lease():
                self._ask(message)
            case AskMachines():
                self._ask(message)
            case States():
                self.states = tuple(structs.replace(state, worker=self._slot) for state in message.endpoints)
                self.waiting = message.waiting
            case BreakerMove():
                self._server.pass_on(self, message)
            case HoldSeats():
                self._server.seating.hold(self.epoch, message.place, message.count)
            case WantSeats():
                self._server.seating.want(self.epoch, message.place, message.count, message.is_urgent)
            case GiveSeats():
                self._server.seating.give(self.epoch, message.place, message.count)
            case HeldStreams() | HeldCredit():
                if self._server.lessor is not None and self.epoch:
                    self._server.lessor.hold(self.epoch, message)
            case Return():
                if self._server.lessor is not None and self.epoch:
                    self._server.lessor.take_back(self.epoch, message)

    def _ask(self, question: Authorize | Lease | AskMachines) -> None:
        if len(self._answers) >= QUESTIONS_MAX:
            self.send(Unavailable(question.id))
            return
        self._start(self._answer(question))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _welcome(self) -> None:
        self.send_revoked(await self._server.remembered_now())

    async def _answer(self, question: Authorize | Lease | AskMachines) -> None:
        if isinstance(question, Authorize):
            self.send(await self._server.answer(question))
        elif isinstance(question, AskMachines):
            self.send(await self._server.machines(question))
        else:
            self.send(await self._server.lease(self.epoch, question))

    def send(self, message: FromControl) -> None:
        """Send, if the worker is still there; cut off one that does not read."""
        if self._transport is None:
            return
        self._transport.write(frame(message))
        if self._transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            logger.error("worker does not read its link, cut off", unsent_bytes_max=UNSENT_BYTES_MAX)
            self.close()
