"""A journal at its bound, or not on disk: no call is taken, nothing is lost, and it heals by itself."""

import asyncio
import signal
import time
from typing import Any

import pytest
from callers import Answer, Caller
from conftest import MakeCaller, MakePlace
from gateways import kill, running, until

BOUND_BYTES = 20_000


@pytest.mark.parametrize(
    "segment_bytes",
    [
        pytest.param(4096, id="small_segments"),
        pytest.param(67108864, id="a_segment_may_be_larger_than_the_bound"),
    ],
)
async def test_a_full_journal_refuses_calls_until_control_is_back(
    place: MakePlace, new_caller: MakeCaller, segment_bytes: int
) -> None:
    here = place(server={"workers": 1}, journal={"bytes_max": BOUND_BYTES, "segment_bytes": segment_bytes})
    with running(here) as gateway:
        caller = new_caller(gateway)
        answers = [await caller.post()]
        control = gateway.control()
        kill(control, signal.SIGSTOP)
        try:
            refusal = await until_status(caller, 503, answers)
            assert refusal.code == "JOURNAL_FULL"
            for _ in range(20):
                assert (await caller.post()).status == 503
        finally:
            kill(control, signal.SIGCONT)
        await until_status(caller, 200, answers)
        served = {answer.request_id for answer in answers if answer.status == 200}
        await until(lambda: served <= stored(here), 5, "every call that was served is stored")
        assert gateway.stop() == 0
    told = [receipt.request_id for receipt in here.receipts() if receipt.status == 200]
    assert sorted(told) == sorted(served)
    assert "journal full" in here.log.read_text()
    assert "journal takes receipts again" in here.log.read_text()


async def test_after_a_failed_sync_calls_are_refused_until_all_is_stored(
    place: MakePlace, new_caller: MakeCaller
) -> None:
    here = place(server={"workers": 1})
    with running(here) as gateway:
        caller = new_caller(gateway)
        answers = [await caller.post()]
        control = gateway.control()
        kill(control, signal.SIGSTOP)
        try:
            for segment in here.journal.glob("*.log"):
                segment.chmod(0o400)  # so control tells
            assert (await until_status(caller, 503, answers)).code == "JOURNAL_FULL"
        finally:
            kill(control, signal.SIGCONT)
        await until_status(caller, 200, answers)
        served = {answer.request_id for answer in answers if answer.status == 200}
        await until(lambda: served <= stored(here), 5, "every call that was served is stored")
        assert gateway.stop() == 0
    assert "journal is not on disk" in here.log.read_text()


def stored(here: Any) -> set[str]:
    return {receipt.request_id for receipt in here.receipts()}


async def until_status(caller: Caller, status: int, answers: list[Answer]) -> Answer:
    """Call until the answer has this status; keep every answer."""
    begun_s = time.monotonic()
    while True:
        answers.append(await caller.post())
        if answers[-1].status == status:
            return answers[-1]
        assert time.monotonic() - begun_s < 8, f"after 8 s of calls no {status}, but {answers[-1]}"
        await asyncio.sleep(0.001 if status != 200 else 0.02)
