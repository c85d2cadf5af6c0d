"""A key's limit of streams open at once, over all workers of a gateway."""

import asyncio
import time
from collections import Counter
from contextlib import suppress

from callers import HELD, STREAM, Caller, ClosedError, CutError
from conftest import MakeCaller, MakePlace
from gateways import Gateway, kill, running, until
from inference import Inference

LIMIT, CALLERS = 3, 12
WAIT_S = 20.0


async def _round(callers: list[Caller], inference: Inference) -> Counter[int]:
    """Open a held stream with every caller; let them go on when all others are refused."""
    inference.hold()
    calls = [asyncio.create_task(caller.post(HELD)) for caller in callers]
    async with asyncio.timeout(WAIT_S):
        while sum(call.done() for call in calls) < CALLERS - LIMIT or inference.held_count < LIMIT:
            await asyncio.sleep(0.01)
    inference.release()
    answers = await asyncio.gather(*calls)
    assert {answer.code for answer in answers if answer.status != 200} == {"rate_limit_exceeded"}
    return Counter(answer.status for answer in answers)


async def _statuses_until(wanted: int, new_caller: MakeCaller, gateway: Gateway) -> set[int]:
    """Open streams until one is answered with this status; return all statuses."""
    found: set[int] = set()
    begun_s = time.monotonic()
    while wanted not in found:
        assert time.monotonic() - begun_s < WAIT_S, f"no {wanted}, but {found}"
        with suppress(ClosedError, CutError):  # by a worker that is killed
            found.add((await new_caller(gateway).post(STREAM)).status)
        await asyncio.sleep(0.02)
    return found


async def test_no_more_streams_than_the_limit_are_open_over_all_workers(
    place: MakePlace, new_caller: MakeCaller, inference: Inference
) -> None:
    here = place(server={"workers": 2})
    with running(here) as gateway:
        terms = ("--rpm", "0", "--streams", str(LIMIT))
        here.key = here.command("key", "create", "--user", "caller@example.com", *terms)
        callers = [new_caller(gateway) for _ in range(CALLERS)]
        try:
            for _ in range(3):
                assert await _round(callers, inference) == {200: LIMIT, 429: CALLERS - LIMIT}
                assert len({caller.worker for caller in callers}) == 2
        finally:
            inference.release()
        assert gateway.stop() == 0


async def test_a_new_control_knows_which_streams_are_open_and_a_killed_worker_has_none(
    place: MakePlace, new_caller: MakeCaller, inference: Inference
) -> None:
    here = place(server={"workers": 2})
    with running(here) as gateway:
        terms = ("--rpm", "0", "--streams", "1")
        here.key = here.command("key", "create", "--user", "caller@example.com", *terms)
        inference.hold()
        try:
            held = asyncio.create_task(new_caller(gateway).post(HELD))
            await until(lambda: inference.held_count == 1, WAIT_S, "a stream is open")
            old = gateway.control()
            kill(old)
            await until(lambda: gateway.control() not in (0, old), WAIT_S, "a new control")
            assert await _statuses_until(429, new_caller, gateway) <= {503, 429}
            for worker in gateway.workers():
                kill(worker)
            outcome = (await asyncio.gather(held, return_exceptions=True))[0]
            assert isinstance(outcome, CutError)
            inference.release()
            assert await _statuses_until(200, new_caller, gateway) <= {429, 503, 200}
        finally:
            inference.release()
        assert gateway.stop() == 0
