"""Reads the table of events once for everybody who listens now, and again for who comes back.

On PostgreSQL an event may come after one with a higher `seq`, see `store.cursor`. What came late so is remembered: who
returns with an event after it as the last seen has not seen it. On SQLite, with its one writer, there is none.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from msgspec import Struct
from sqlalchemy import ColumnElement, and_, func, or_, select

from gpuproxy.config import Events
from gpuproxy.events.webhooks import forget_old
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.cursor import GAPS_MAX, Cursor
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds, unless_unchanged
from gpuproxy.store.schema import events

LATE_MAX = 1_000
READ_MAX = 500  # rows at once
BEGINNING = "evt_0"  # stands before the oldest event that is kept
FORGET_S = 60.0
FORGET_MAX = 1_000  # rows in one transaction, so that nobody waits long

logger = get_logger(__name__)


class Event(Struct, frozen=True):
    """A row of the table. `user_id` is None for what concerns everybody."""

    seq: int
    id: str
    name: str
    user_id: str | None
    data: Mapping[str, Any]
    at: datetime


class Place(Struct, frozen=True):
    """Where a listener has got to: the last event it has seen."""

    seq: int
    at: datetime


class Mark(Struct, frozen=True):
    """What was published when somebody began to listen: all to `seq` but for `gaps`; `late` came after its turn."""

    seq: int
    gaps: frozenset[int]
    late: tuple[Place, ...]


COLUMNS = tuple(events.c[field] for field in Event.__struct_fields__)


class Stream:
    """One node's reader; `publish` is called with each event, once. Before the first `poll_once` call `start`."""

    def __init__(self, store: Store, publish: Callable[[Event], None], settings: Events) -> None:
        self._store = store
        self._publish = publish
        self._settings = settings
        self._cursor = Cursor(0)
        self._late: deque[Place] = deque(maxlen=LATE_MAX)  # `at` is when it came
        self._forgot_s = time.monotonic()
        self._is_behind = False
        self._polling = asyncio.Lock()

    async def start(self) -> None:
        """Begin at the end of the table, where something may still be under way."""
        async with self._store.reading() as connection:
            newest = await connection.scalar(select(func.max(events.c.seq))) or 0
            near = select(events.c.seq).where(events.c.seq > newest - GAPS_MAX)
            seen = (await connection.scalars(near)).all()
        self._cursor = Cursor(max(0, newest - GAPS_MAX))
        self._cursor.advance(seen)

    @property
    def seq(self) -> int:
        """Return the number of the newest event that was published."""
        return self._cursor.seq

    async def poll_once(self) -> int:
        """Publish what is new, in the order of `seq` but for what comes late; return how many."""
        async with self._polling:
            return await self._poll()

    async def catch_up(self, seq: int) -> None:
        """Publish all up to an event that somebody has seen already, at another node."""
        while self.seq < seq and await self.poll_once():
            pass

    async def _poll(self) -> int:
        query = select(*COLUMNS).where(self._cursor.unread(events.c.seq)).order_by(events.c.seq).limit(READ_MAX)
        found = [Event(**row._mapping) for row in await self._store.look(query)]
        now = datetime.now(UTC)
        self._late += (Place(event.seq, now) for event in found if event.seq < self.seq)
        self._cursor.advance(event.seq for event in found)
        for event in found:
            self._publish(event)
        return len(found)

    def mark(self) -> Mark:
        """Return what is published now; all else is published later."""
        return Mark(self.seq, frozenset(self._cursor.gaps), tuple(self._late))

    async def newest(self, mark: Mark, user_id: str | None) -> str:
        """Return the id of the newest published event that the user may see, from which to go on after a break.

        If there is none, BEGINNING for an account, and nothing for who has none: what all may hear is much.
        """
        newest = (
            select(events.c.seq, events.c.id).where(events.c.seq <= mark.seq).order_by(events.c.seq.desc()).limit(1)
        )
        owners = [events.c.user_id.is_(None)] + [events.c.user_id == user_id] * (user_id is not None)
        async with self._store.reading() as connection:
            rows = [(await connection.execute(newest.where(owner))).first() for owner in owners]
        found = [(row.seq, row.id) for row in rows if row is not None]
        return str(max(found)[1]) if found else BEGINNING if user_id is not None else ""

    async def place_of(self, event_id: str, user_id: str | None) -> Place | None:
        """Return where an event stands that the user may see; None if it is unknown or no longer kept."""
        if event_id == BEGINNING and user_id is not None:
            return Place(0, datetime.min.replace(tzinfo=UTC))
        query = select(events.c.seq, events.c.at).where(events.c.id == event_id, _may_see(user_id))
        async with self._store.reading() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else Place(row.seq, row.at)

    async def missed(self, place: Place, mark: Mark, user_id: str | None, names: Collection[str]) -> list[Event]:
        """Return what came late, so that who stopped at `place` has missed it although its number is lower."""
        late = [each.seq for each in mark.late if each.seq < place.seq and each.at >= place.at]
        return await self._read(events.c.seq.in_(late), user_id, names) if late else []

    async def after(self, seq: int, mark: Mark, user_id: str | None, names: Collection[str]) -> list[Event]:
        """Return the next events of these names that the user may see and that were published at `mark`, READ_MAX at
        most.
        """
        gaps = [number for number in mark.gaps if number > seq]
        chosen = and_(events.c.seq > seq, events.c.seq <= mark.seq)
        return await self._read(and_(chosen, events.c.seq.not_in(gaps)) if gaps else chosen, user_id, names)

    async def _read(self, chosen: ColumnElement[bool], user_id: str | None, names: Collection[str]) -> list[Event]:
        is_asked = and_(chosen, _may_see(user_id), events.c.name.in_(names))
        query = select(*COLUMNS).where(is_asked).order_by(events.c.seq).limit(READ_MAX)
        async with self._store.reading() as connection:
            return [Event(**row) for row in (await connection.execute(query)).mappings()]

    async def forget(self) -> None:
        """Delete what is older than it is kept, once in a while."""
        if time.monotonic() - self._forgot_s < FORGET_S:
            return
        self._forgot_s = time.monotonic()
        before = datetime.now(UTC) - timedelta(seconds=self._settings.kept_s)
        count = FORGET_MAX
        while count == FORGET_MAX:
            async with self._store.writing() as connection:
                count = await forget_old(connection, before, FORGET_MAX)

    async def run(self, stopping: asyncio.Event) -> None:
        """Poll until `stopping` is set, through outages of the store."""
        poll_s = self._settings.poll_s
        complain = partial(logger.error, "events cannot be read, will go on")
        look = unless_unchanged(self._store, self._round, FORGET_S)
        await rounds(look, lambda: 0.0 if self._is_behind else poll_s, stopping, complain)

    async def _round(self) -> bool:
        self._is_behind = False
        self._is_behind = await self.poll_once() == READ_MAX
        await self.forget()
        return self._is_behind


def _may_see(user_id: str | None) -> ColumnElement[bool]:
    everybodys = events.c.user_id.is_(None)
    return everybodys if user_id is None else or_(everybodys, events.c.user_id == user_id)
