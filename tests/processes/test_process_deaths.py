"""What callers notice when a process of the gateway is killed: as little as can be."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from callers import HELD, Caller, ClosedError, CutError, Load, all_refused
from conftest import MakeCaller, MakePlace
from gateways import Gateway, children, is_alive, kill, process, running, until
from inference import Inference

BACK_S = 2.0
CallerOfEach = Callable[[Gateway], Awaitable[list[Caller]]]


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Stop processes for as long as the block runs."""
    for pid in pids:
        kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            kill(pid, signal.SIGCONT)


@contextmanager
def control_away(gateway: Gateway) -> Iterator[None]:
    """Kill control, and keep the supervisor from starting another while the block runs."""
    with stopped(gateway.process.pid):
        kill(gateway.control())
        yield


async def control_is_back(gateway: Gateway, caller: Caller) -> None:
    """Wait until the management plane answers."""
    begun_s = time.monotonic()
    while (await caller.get("/health")).status != 200:
        assert time.monotonic() - begun_s < 10, "control does not come back"
        await asyncio.sleep(0.01)


async def test_a_killed_worker_is_back_within_two_seconds_and_the_others_go_on(
    gateway: Gateway, new_caller: MakeCaller, caller_of_each: CallerOfEach
) -> None:
    callers = await caller_of_each(gateway)
    before = {caller.worker for caller in callers}
    async with Load(gateway.port, gateway.place.key) as load:
        load.add(8, pause_s=0.005)
        load.add(4, is_kept_alive=False, pause_s=0.005)
        await until(lambda: len(load.answers) > 200, 5, "the load runs")
        kill(gateway.workers()[0])
        killed_s = time.monotonic()
        answers = await asyncio.gather(*(new_caller(gateway).post() for _ in range(16)))
        back_s = time.monotonic() - killed_s
    survivors = before & {(await caller.post()).worker for caller in callers}
    assert len(survivors) == 1
    assert back_s < BACK_S
    assert len({answer.worker for answer in answers} - survivors) == 1
    assert {answer.status for answer in answers} == {200}
    assert not [answer for answer in load.answers if answer.status != 200]
    assert not [failure for failure in load.failures if failure.worker in survivors], load.failures


async def test_connections_in_the_backlog_of_killed_workers_are_served(
    gateway: Gateway, new_caller: MakeCaller
) -> None:
    workers = gateway.workers()
    with stopped(*workers):
        callers = [new_caller(gateway) for _ in range(20)]
        calls = [asyncio.create_task(caller.post()) for caller in callers]
        for caller in callers:
            await caller.is_sent.wait()
        for pid in workers:
            kill(pid)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*calls)
    assert {answer.status for answer in answers} == {200}
    assert not set(gateway.workers()) & set(workers)


async def test_known_keys_are_served_while_control_is_away(
    gateway: Gateway, new_caller: MakeCaller, caller_of_each: CallerOfEach
) -> None:
    callers = await caller_of_each(gateway)
    manager, stranger = new_caller(gateway), new_caller(gateway)
    with control_away(gateway):
        stranger.key, _ = gateway.place.new_key()
        for _ in range(20):
            assert {(await caller.post()).status for caller in callers} == {200}
        refused = await stranger.post()
        waiting = asyncio.create_task(manager.get("/health"))
        assert {(await caller.post()).status for caller in callers} == {200}
    assert refused.status == 503, "a valid key must not become a 401 because control is away"
    assert refused.code == "UNAVAILABLE"
    assert (await waiting).status in (200, 503)
    await control_is_back(gateway, manager)
    assert (await stranger.post()).status == 200


async def test_a_key_revoked_while_control_was_away_dies_with_its_return(
    gateway: Gateway, new_caller: MakeCaller, caller_of_each: CallerOfEach
) -> None:
    place = gateway.place
    key, key_id = place.new_key()
    callers = await caller_of_each(gateway)
    for caller in callers:
        caller.key = key
        assert (await caller.post()).status == 200
    with control_away(gateway):
        await asyncio.to_thread(place.command, "key", "revoke", key_id)
        assert {(await caller.post()).status for caller in callers} == {200}
    await control_is_back(gateway, new_caller(gateway))
    await all_refused(callers, 1.0)


async def test_calls_go_on_without_an_error_while_control_dies_again_and_again(gateway: Gateway) -> None:
    async with Load(gateway.port, gateway.place.key) as load:
        load.add(6, pause_s=0.002)
        load.add(2, is_kept_alive=False, pause_s=0.002)
        for _ in range(2):
            control = gateway.control()
            kill(control)
            await until(lambda died=control: gateway.control() not in (0, died), 5, "control runs again")
    assert load.faults == {}


async def test_children_go_with_a_killed_supervisor_and_a_new_gateway_takes_over(
    place: MakePlace, inference: Inference, new_caller: MakeCaller
) -> None:
    here = place()
    inference.hold()
    with process(here) as started:
        gateway = Gateway.announced(here, started)
        caller, streaming = new_caller(gateway), new_caller(gateway)
        seen = [(await caller.post()).request_id for _ in range(20)]
        stream = asyncio.create_task(streaming.post(HELD))
        await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
        pids = children(started.pid)
        kill(started.pid)
        inference.release()
        seen.append((await stream).request_id)
        await until(lambda: not any(is_alive(pid) for pid in pids), 5, "the children are gone")
    here.configure(server={"port": gateway.port})
    with running(here) as successor:
        assert (await new_caller(successor).post()).status == 200
        assert successor.stop() == 0
    told = [receipt.request_id for receipt in here.receipts()]
    assert len(pids) == 3
    assert sorted(set(seen) - set(told)) == []
    assert len(told) == len(set(told)) == len(seen) + 1


async def test_a_stream_of_a_killed_worker_breaks_off_visibly(
    gateway: Gateway, inference: Inference, new_caller: MakeCaller
) -> None:
    inference.hold()
    caller = new_caller(gateway)
    stream = asyncio.create_task(caller.post(HELD))
    await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
    await until(lambda: caller.worker, 5, "the stream has begun")
    for pid in gateway.workers():
        kill(pid)
    with pytest.raises((CutError, ClosedError)):
        await stream
    assert caller.reopened_count == 0
    inference.release()
    assert (await caller.post()).status == 200
