"""Work that comes round: paused, woken, ended, and complained of once."""

import asyncio
from collections.abc import Callable

import pytest

from gpuproxy.store import rounds as module
from gpuproxy.store.rounds import pause, rounds

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
