"""Words between the nodes on one PostgreSQL (LISTEN, NOTIFY): there is something new in the store, give back a lease.

A word is a topic and a text. It is a hint and may be lost, with the connection or with a pooler in between that
passes no LISTEN: whoever acts on words also looks at the store now and then. Triggers tell of new rows in `changes`
and `events` when their transaction commits, whoever wrote them; the topic is the name of the table, the text empty.

The connection also serves to see whether anybody has written, for `Store.version`: who looks at the store several times
a second need not when nobody has. PostgreSQL numbers transactions that write, and none ends without another snapshot.

On SQLite one control process is all there is, so `tell` reaches its own listeners and nobody else.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store, connect_postgresql, fault_of
from gpuproxy.store.rounds import pause, rounds

CHANNEL = "gpuproxy"
TELL_S = 1.0
CHECK_S = 0.2  # between two looks at the snapshot; one that takes longer leaves it unknown
ALIVE_S = 5.0  # for a look to be answered: who takes a slow PostgreSQL's connection for lost only makes it slower
RECONNECT_S = 0.5
TEXT_BYTES_MAX = 7_000  # PostgreSQL takes 8,000 with the topic

Heard = Callable[[str], None]

logger = get_logger(__name__)


class Bus:
    """One process's ear and voice. Add listeners with `on` before `run`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listeners: dict[str, list[Heard]] = {}
        self._connection: Any = None
        self._speaking = asyncio.Lock()  # asyncpg takes one statement at a time
        self._lost = asyncio.Event()

    def on(self, topic: str, heard: Heard) -> None:
        """Call `heard` with the text of every word of this topic, and with "" whenever some may have been missed."""
        self._listeners.setdefault(topic, []).append(heard)

    async def tell(self, topic: str, text: str = "") -> bool:
        """Tell every node, this one too; False if the word cannot get out now."""
        if len(text.encode()) > TEXT_BYTES_MAX:
            raise ValueError(f"a word of {len(text)} characters on {topic!r} is too long for {TEXT_BYTES_MAX} bytes")
        if self._store.is_sqlite:
            asyncio.get_running_loop().call_soon(self._hear, topic, text)
            return True
        return await self._ask(TELL_S, "SELECT pg_notify($1, $2)", CHANNEL, f"{topic} {text}") is not None

    async def run(self, stopping: asyncio.Event) -> None:
        """Listen until `stopping` is set, through outages."""
        if self._store.is_sqlite:
            await stopping.wait()
            return
        complain = partial(logger.warning, "cannot listen to other nodes, will go on")
        await rounds(partial(self._connected, stopping), RECONNECT_S, stopping, complain)

    async def _connected(self, stopping: asyncio.Event) -> None:
        try:
            await self._connect()
            await self._listen(stopping)
        finally:
            self._drop()

    async def _connect(self) -> None:
        self._lost.clear()
        connection = await connect_postgresql(self._store)
        connection.add_termination_listener(lambda _: self._lost.set())
        self._connection = connection
        await connection.add_listener(CHANNEL, self._notified)
        for topic in self._listeners:
            self._hear(topic, "")

    async def _listen(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set() and not self._lost.is_set():
            late = asyncio.get_running_loop().call_later(CHECK_S, self._know_nothing)
            rows = await self._ask(ALIVE_S, "SELECT txid_current_snapshot()::text")
            late.cancel()
            if rows is None:
                return
            self._store.snapshot = rows[0][0]
            await pause(CHECK_S, stopping, self._lost)

    async def _ask(self, within_s: float, statement: str, *words: str) -> Any:
        """Run a statement on the connection and return its rows, None if that fails or takes longer.

        A connection that fails is given up; whether one that is slow is alive, `_listen` finds.
        """
        try:
            async with asyncio.timeout(within_s), self._speaking:
                return await self._connection.fetch(statement, *words) if self._connection is not None else None
        except TimeoutError:
            return None
        except Exception as error:  # asyncpg raises errors of its own, of the system, and of its own faults
            logger.debug("word is lost", error=fault_of(error))
            self._lost.set()
            return None

    def _know_nothing(self) -> None:
        self._store.snapshot = None

    def _drop(self) -> None:
        self._know_nothing()
        if self._connection is not None:
            self._connection.terminate()
        self._connection = None

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: str) -> None:
        topic, _, text = payload.partition(" ")
        self._know_nothing()  # who is woken by this must look
        self._hear(topic, text)

    def _hear(self, topic: str, text: str) -> None:
        for heard in self._listeners.get(topic, ()):
            heard(text)
