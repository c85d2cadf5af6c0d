"""Keys made and taken back by the command line while the gateway runs."""

import asyncio
from collections.abc import Awaitable, Callable

from callers import HELD, Caller, all_refused
from conftest import MakeCaller
from gateways import Gateway, until
from inference import STREAM_BODY, Inference

CallerOfEach = Callable[[Gateway], Awaitable[list[Caller]]]


async def test_a_key_made_while_the_gateway_runs_works_at_once(gateway: Gateway, caller_of_each: CallerOfEach) -> None:
    callers = await caller_of_each(gateway)
    key, _ = gateway.place.new_key()
    for caller in callers:
        caller.key = key
        assert (await caller.post()).status == 200


async def test_a_revoked_key_is_dead_on_every_connection_of_every_worker_within_a_second(
    gateway: Gateway, new_caller: MakeCaller, inference: Inference
) -> None:
    key, key_id = gateway.place.new_key()
    callers = [new_caller(gateway) for _ in range(12)]
    streaming = new_caller(gateway)
    for caller in (*callers, streaming):
        caller.key = key
        assert (await caller.post()).status == 200
    assert len({caller.worker for caller in callers}) == 2
    inference.hold()
    stream = asyncio.create_task(streaming.post(HELD))
    await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
    await asyncio.to_thread(gateway.place.command, "key", "revoke", key_id)
    await all_refused(callers, 1.0)
    inference.release()
    assert (await stream).body == STREAM_BODY
    assert (await streaming.post()).status == 401


async def test_a_blocked_user_is_out_within_a_second_and_back_when_unblocked(
    gateway: Gateway, caller_of_each: CallerOfEach
) -> None:
    callers = await caller_of_each(gateway)
    await asyncio.to_thread(gateway.place.command, "user", "block", "caller@example.com")
    await all_refused(callers, 1.0)
    await asyncio.to_thread(gateway.place.command, "user", "unblock", "caller@example.com")
    for caller in callers:
        await until_served(caller)


async def until_served(caller: Caller) -> None:
    """Wait until the caller is let in; workers remember for a while that a key was no good."""
    for _ in range(1_000):
        if (await caller.post()).status == 200:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("still refused after 10 s")
