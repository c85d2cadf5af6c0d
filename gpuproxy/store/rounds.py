"""Work that comes round again and again while control runs, through outages of what it needs."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from gpuproxy.store.engine import fault_of


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


async def pause(seconds: float, *until: asyncio.Event) -> None:
    """Wait for so long, or until one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
