"""A worker's end of the link: asks control about keys and hears of revocations; reconnects by itself."""

import asyncio
from collections.abc import Callable
from typing import cast

from gpuproxy.link.messages import (
    AskMachines,
    Authorize,
    Authorized,
    BreakerMove,
    ForgetMachines,
    FrameReader,
    FreeSeats,
    Hello,
    Lease,
    Leased,
    LeaseKind,
    Machine,
    Machines,
    Prices,
    Recall,
    Renew,
    Return,
    Revoke,
    Routing,
    SealKeys,
    Seats,
    Told,
    Unavailable,
    decode_from_control,
    frame,
)
from gpuproxy.observe.logs import get_logger
from gpuproxy.pricing import Price
from gpuproxy.types import Grant

_log = get_logger("gpuproxy.link")

RECONNECT_S = 0.2
RETRY_S = 0.2
KEEP_S = 2.0  # how long questions wait for control to come back: a reload replaces it within a moment
QUESTIONS_MAX = 10_000  # open at once; control answers a question in under a millisecond

Answer = Callable[[Grant | None, bool], None]
LeaseAnswer = Callable[[Leased | None], None]
MachinesAnswer = Callable[[tuple[Machine, ...] | None], None]


class LinkClient(asyncio.Protocol):
    """The link. `ask` calls back with (grant or None, whether control could tell)."""

    def __init__(self, path: str, hello: Hello) -> None:
        self.on_revoke: Callable[[tuple[str, ...]], None] = lambda key_ids: None
        self.on_renew: Callable[[tuple[str, ...]], None] = lambda key_ids: None
        self.on_reconnect: Callable[[], None] = lambda: None
        self.on_recall: Callable[[Recall], None] = lambda recall: None
        self.on_prices: Callable[[list[Price]], None] = lambda prices: None
        self.on_forget_machines: Callable[[tuple[str, ...]], None] = lambda user_ids: None
        self.on_routing: Callable[[Routing], None] = lambda routing: None
        self.on_seal_keys: Callable[[tuple[bytes, ...]], None] = lambda keys: None
        self.on_seats: Callable[[Seats], None] = lambda seats: None
        self.on_free_seats: Callable[[FreeSeats], None] = lambda wish: None
        self.on_breaker_move: Callable[[BreakerMove], None] = lambda move: None
        self.connected = asyncio.Event()
        self._path = path
        self._hello = hello
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._questions: dict[int, tuple[bytes, Answer]] = {}
        self._leases: dict[int, tuple[bytes, LeaseAnswer]] = {}  # with the frame that asks
        self._machines: dict[int, tuple[bytes, MachinesAnswer]] = {}
        self._returns: list[bytes] = []  # of credit, to be told when control is back
        self._is_awaited = False  # it is here, or has been gone for less than KEEP_S
        self._patience: asyncio.TimerHandle | None = None
        self._prices: list[Price] = []  # of the messages so far
        self._next_id = 0
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Keep connected until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._lost.clear()
            try:
                await loop.create_unix_connection(lambda: self, self._path)
                await self._lost.wait()
            except OSError as error:
                _log.debug("link cannot connect", reason=str(error))
            await asyncio.sleep(RECONNECT_S)

    def ask(self, digest: bytes, answer: Answer) -> int:
        """Ask about the key with this digest; while control is away the question is kept until `give_up`."""
        if len(self._questions) >= QUESTIONS_MAX:
            answer(None, False)
            return -1
        self._next_id += 1
        self._questions[self._next_id] = digest, answer
        if self._transport is not None:
            self._transport.write(frame(Authorize(self._next_id, digest)))
        return self._next_id

    def lease(
        self, user_id: str, key_id: str, kind: LeaseKind, least: int, wanted: int, answer: LeaseAnswer, limit: int = 0
    ) -> None:
        """Ask for a lease; `answer` gets None, later, when control stays away or cannot tell."""
        if not self._is_awaited or len(self._leases) >= QUESTIONS_MAX:
            asyncio.get_running_loop().call_soon(answer, None)  # never from within the question
            return
        self._next_id += 1
        question = frame(Lease(self._next_id, user_id, key_id, kind, least, wanted, limit))
        self._leases[self._next_id] = question, answer
        self._write(question)

    def ask_machines(self, user_id: str, answer: MachinesAnswer) -> None:
        """Ask for a user's machines; `answer` gets None, later, when control stays away or cannot tell."""
        if not self._is_awaited or len(self._machines) >= QUESTIONS_MAX:
            asyncio.get_running_loop().call_soon(answer, None)  # never from within the question
            return
        self._next_id += 1
        question = frame(AskMachines(self._next_id, user_id))
        self._machines[self._next_id] = question, answer
        self._write(question)

    def send(self, message: Told) -> None:
        """Tell control something that needs no answer; while it is away it is told nothing.

        Credit that goes back is told later, if control comes back: a successor reads from the ledger what is held.
        """
        if self._transport is not None:
            self._transport.write(frame(message))
        elif self._is_awaited and isinstance(message, Return) and message.kind == "nanousd":
            self._returns.append(frame(message))

    def give_up(self, question: int) -> None:
        """Stop waiting for an answer and report that control could not tell."""
        self._answer(question, None, False)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce this worker and ask what is still open."""
        self._transport = cast(asyncio.Transport, transport)
        self._reader = FrameReader()
        if self._patience is not None:
            self._patience.cancel()
        self._is_awaited = True
        self.connected.set()
        self._transport.write(frame(self._hello))
        for question, (digest, _) in self._questions.items():
            self._transport.write(frame(Authorize(question, digest)))
        returns, self._returns = self._returns, []
        kept = [*returns, *(asked for asked, _ in (*self._leases.values(), *self._machines.values()))]
        self.on_reconnect()
        self._transport.writelines(kept)  # only now: control must know what is held here when it answers

    def data_received(self, data: bytes) -> None:
        """Handle every whole message."""
        for body in self._reader.feed(data):
            message = decode_from_control(body)
            match message:
                case Authorized():
                    self._answer(message.id, message.grant, True)
                case Unavailable():
                    asyncio.get_running_loop().call_later(RETRY_S, self._repeat, message.id)
                    self._leased(message.id, None)
                    self._told_machines(message.id, None)
                case Leased():
                    self._leased(message.id, message)
                case Recall():
                    self.on_recall(message)
                case Revoke():
                    self.on_revoke(message.key_ids)
                case Machines():
                    self._told_machines(message.id, message.machines)
                case ForgetMachines():
                    self.on_forget_machines(message.user_ids)
                case Renew():
                    self.on_renew(message.key_ids)
                case Routing():
                    self.on_routing(message)
                case BreakerMove():
                    self.on_breaker_move(message)
                case Seats():
                    self.on_seats(message)
                case FreeSeats():
                    self.on_free_seats(message)
                case SealKeys():
                    self.on_seal_keys(message.keys)
                case Prices():
                    self._take_prices(message)

    def connection_lost(self, error: Exception | None) -> None:
        """Keep questions for the next connection: those about keys until they are given up, the others for a while."""
        self._transport = None
        self._patience = asyncio.get_running_loop().call_later(KEEP_S, self._await_no_more)
        self.connected.clear()
        self._lost.set()

    def _await_no_more(self) -> None:
        """Control stays away: nobody can promise anything."""
        self._is_awaited = False
        self._returns.clear()
        for question in list(self._leases):
            self._leased(question, None)
        for question in list(self._machines):
            self._told_machines(question, None)

    def _write(self, question: bytes) -> None:
        """Ask now, or when control is back."""
        if self._transport is not None:
            self._transport.write(question)

    def _take_prices(self, message: Prices) -> None:
        self._prices = [*([] if message.is_first else self._prices), *message.prices]
        if message.is_last:
            self.on_prices(self._prices)

    def _repeat(self, question: int) -> None:
        # a control that is being replaced or has lost its store for a moment: whoever waits has time until `give_up`
        if question in self._questions and self._transport is not None:
            self._transport.write(frame(Authorize(question, self._questions[question][0])))

    def _leased(self, question: int, leased: Leased | None) -> None:
        _, answer = self._leases.pop(question, (b"", None))
        if answer is not None:
            answer(leased)

    def _told_machines(self, question: int, machines: tuple[Machine, ...] | None) -> None:
        _, answer = self._machines.pop(question, (b"", None))
        if answer is not None:
            answer(machines)

    def _answer(self, question: int, grant: Grant | None, is_known: bool) -> None:
        _, answer = self._questions.pop(question, (b"", None))
        if answer is not None:
            answer(grant, is_known)
