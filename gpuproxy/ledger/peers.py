"""Leases that other nodes hold: a node that lacks some asks them over the bus to give back what is not in use.

A question is answered when the workers there have given back and all can see it; a node that does not answer is not
waited for again for a while.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from uuid import uuid4

import msgspec
from msgspec import Struct

from gpuproxy.ledger.windows import Subject
from gpuproxy.link.messages import LeaseKind
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import fault_of

ANSWER_S = 0.75  # a quarter of a second for the workers there, the rest for two words and a transaction
SILENT_S = 5.0  # how long a node that did not answer is not asked
NODES_MAX = 100  # asked at once; their names must fit into a word
ANSWERS_MAX = 1_000  # being prepared at once; more questions go unanswered

GiveBack = Callable[[Subject, LeaseKind], Awaitable[None]]

logger = get_logger(__name__)


class Question(Struct):
    """Give back what you hold of this; `nodes` are meant."""

    id: str
    asker: str
    nodes: list[str]
    subject: Subject
    kind: LeaseKind


class Answer(Struct):
    """A node has given back what it could."""

    id: str
    asker: str
    node: str


_question = msgspec.json.Decoder(Question).decode
_answer = msgspec.json.Decoder(Answer).decode


class Peers:
    """The other nodes on this bus. `give_back` does here what others ask for."""

    def __init__(self, bus: Bus, node: str) -> None:
        self.give_back: GiveBack | None = None
        self._bus = bus
        self._node = node
        self._waiting: dict[str, tuple[set[str], asyncio.Event]] = {}
        self._silent: dict[str, float] = {}  # node: asked again from then on
        self._working: set[asyncio.Task[None]] = set()
        bus.on("recall", self._asked)
        bus.on("recalled", self._answered)

    async def recall(self, nodes: Iterable[str], subject: Subject, kind: LeaseKind) -> bool:
        """Ask these nodes to give back; True if any did within ANSWER_S."""
        now_s = time.monotonic()
        asked = [node for node in nodes if self._silent.get(node, 0.0) <= now_s][:NODES_MAX]
        if not asked:
            return False
        question = Question(uuid4().hex, self._node, asked, subject, kind)
        missing, answered = set(asked), asyncio.Event()
        self._waiting[question.id] = missing, answered
        try:
            if not await self._bus.tell("recall", msgspec.json.encode(question).decode()):
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    await answered.wait()
        finally:
            del self._waiting[question.id]
        self._silent.update(dict.fromkeys(missing, now_s + SILENT_S))
        return len(missing) < len(asked)

    def _asked(self, text: str) -> None:
        question = _question(text) if text else None
        if question is None or self._node not in question.nodes or len(self._working) >= ANSWERS_MAX:
            return
        task = asyncio.get_running_loop().create_task(self._give(question))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _give(self, question: Question) -> None:
        try:
            if self.give_back is not None:
                await self.give_back(question.subject, question.kind)
        except Exception as error:  # what the store raises; the asker waits no longer than it would for a dead node
            logger.warning("cannot give back what another node asks for", error=fault_of(error))
            return
        answer = Answer(question.id, question.asker, self._node)
        await self._bus.tell("recalled", msgspec.json.encode(answer).decode())

    def _answered(self, text: str) -> None:
        answer = _answer(text) if text else None
        if answer is None or answer.asker != self._node:
            return
        self._silent.pop(answer.node, None)
        missing, answered = self._waiting.get(answer.id, (set(), None))
        missing.discard(answer.node)
        if answered is not None and not missing:
            answered.set()
