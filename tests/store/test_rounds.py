"""Work that comes round: paused, woken, ended, and complained of once."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import insert

from gpuproxy.store import rounds as module
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import pause, rounds, unless_unchanged
from gpuproxy.store.schema import changes

WAIT_S = 5.0
LONG_S = 3_600.0


class Work:
    """Fails in the rounds named; ends after `count` rounds. Each pause is noted and takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, *failing: int) -> None:
        self.stopping = asyncio.Event()
        self.paused: list[float] = []
        self.complaints: list[str] = []
        self.done = 0
        self._count = count
        self._failing = failing
        monkeypatch.setattr(module, "pause", self._pause)

    async def __call__(self) -> int:
        self.done += 1
        if self.done == self._count:
            self.stopping.set()
        if self.done in self._failing:
            raise ValueError(f"round {self.done}")
        return self.done

    def complain(self, *, error: str) -> None:
        self.complaints.append(error)

    async def _pause(self, seconds: float, *until: asyncio.Event) -> None:
        assert self.stopping in until
        self.paused.append(seconds)


async def test_work_is_done_with_pauses_until_it_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch, 3)
    await rounds(work, 7.0, work.stopping, work.complain)
    assert (work.done, work.paused, work.complaints) == (3, [7.0] * 3, [])
    await rounds(work, 7.0, work.stopping, work.complain)
    assert work.done == 3


async def test_a_pause_may_depend_on_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch, 3)
    await rounds(work, lambda: float(work.done), work.stopping, work.complain)
    assert work.paused == [1.0, 2.0, 3.0]


async def test_a_failure_is_told_once_until_the_work_goes_well_again(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch, 7, 2, 3, 4, 6)
    await rounds(work, 1.0, work.stopping, work.complain)
    assert (work.done, work.complaints) == (7, ["ValueError: round 2", "ValueError: round 6"])


@pytest.mark.parametrize("end", ["stop", "wake"])
async def test_a_pause_ends_when_there_is_reason_to(end: str) -> None:
    stopping, woken, begun = asyncio.Event(), asyncio.Event(), asyncio.Queue[None]()
    running = asyncio.create_task(rounds(lambda: begun.put(None), LONG_S, stopping, lambda error: None, woken))
    async with asyncio.timeout(WAIT_S):
        await begun.get()
        if end == "wake":
            woken.set()
            await begun.get()
            assert begun.empty()
            assert not woken.is_set()
        stopping.set()
        await running


async def test_a_pause_leaves_nothing_behind() -> None:
    events = asyncio.Event(), asyncio.Event()
    ends: tuple[Callable[[], None], ...] = (events[0].set, events[1].set, lambda: None)
    for end, seconds in zip(ends, (LONG_S, LONG_S, 0.0), strict=True):
        end()
        async with asyncio.timeout(WAIT_S):
            await pause(seconds, *events)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        for event in events:
            event.clear()


class Looks:
    """Counts; finds what it is told to find."""

    def __init__(self) -> None:
        self.count = 0
        self.found = 0

    async def __call__(self) -> int:
        self.count += 1
        return self.found


async def write(store: Store) -> None:
    async with store.writing() as connection:
        await connection.execute(insert(changes).values(kind="key_revoked", subject_id="k", at=datetime.now(UTC)))


async def test_an_unchanged_store_is_looked_at_no_more(store: Store) -> None:
    looks = Looks()
    look = unless_unchanged(store, looks, LONG_S)
    for _ in range(3):
        await look()
    assert looks.count == (1 if store.is_sqlite else 3)
    before = looks.count
    await write(store)
    await look()
    assert looks.count == before + 1


async def test_who_has_found_something_looks_again(store: Store) -> None:
    looks = Looks()
    look = unless_unchanged(store, looks, LONG_S)
    looks.found = 500
    await look()
    await look()
    assert looks.count == 2


async def test_what_is_written_during_a_look_is_seen_by_the_next(store: Store) -> None:
    count = 0

    async def work() -> None:
        nonlocal count
        count += 1
        if count == 1:
            await write(store)

    look = unless_unchanged(store, work, LONG_S)
    await look()
    await look()
    assert count == 2


async def test_time_alone_makes_it_look_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, now_s = Looks(), 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    look = unless_unchanged(store, looks, 1.0)
    await look()
    now_s = 101.0
    await look()
    assert looks.count == 2


async def test_a_look_that_failed_is_done_again(store: Store) -> None:
    looks = Looks()

    async def work() -> int:
        if await looks() == 0 and looks.count == 1:
            raise ValueError("away")
        return 0

    look = unless_unchanged(store, work, LONG_S)
    with pytest.raises(ValueError, match="away"):
        await look()
    await look()
    assert looks.count == 2
