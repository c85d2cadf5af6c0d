"""Work that comes round again and again while control runs, through outages of what it needs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from gpuproxy.store.engine import Store, fault_of


class Complain(Protocol):
    """Tells of a failure, as a logger's method with its message does."""

    def __call__(self, *, error: str) -> object:
        """Tell."""


async def rounds(
    work: Callable[[], Awaitable[object]],
    pause_s: float | Callable[[], float],
    stopping: asyncio.Event,
    complain: Complain,
    woken: asyncio.Event | None = None,
) -> None:
    """Do the work, pause, and again, until `stopping` is set; `woken` ends one pause.

    A failure is told when the work went well before, so an outage is one line however long it lasts.
    """
    ends = (stopping,) if woken is None else (stopping, woken)
    is_failing = False
    while not stopping.is_set():
        try:
            await work()
            is_failing = False
        except Exception as error:
            if not is_failing:
                complain(error=f"{type(error).__name__}: {fault_of(error)}")
            is_failing = True
        await pause(pause_s() if callable(pause_s) else pause_s, *ends)
        if woken is not None:
            woken.clear()


def unless_unchanged(
    store: Store, work: Callable[[], Awaitable[object]], again_s: float
) -> Callable[[], Awaitable[object]]:
    """Return `work` that is passed over as long as the store is as it was when it last found nothing to do.

    It found nothing if it returned something false. After `again_s` it is done anyway: time passes for the store too.
    While nobody knows whether the store has changed it is done every time.
    """
    seen: int | str | None = None
    done_s = 0.0

    async def look() -> None:
        nonlocal seen, done_s
        version, now_s = store.version(), time.monotonic()
        if version is not None and version == seen and now_s - done_s < again_s:
            return
        has_found = await work()
        seen, done_s = None if has_found else version, now_s

    return look


async def pause(seconds: float, *until: asyncio.Event) -> None:
    """Wait for so long, or until one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
