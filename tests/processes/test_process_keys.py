"""Keys made and taken back by the command line while the gateway runs."""

import asyncio
from collections.abc import Awaitable, Callable

from callers import HELD, Caller, all_refused
from conftest import MakeCaller, MakePlace
from gateways import Gateway, kill, running, until
from inference import STREAM_BODY, Inference

from gpuproxy.access.accounts import set_active
from gpuproxy.store.engine import open_store

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


async def test_a_blocked_user_is_out_within_a_second(
    place: MakePlace, new_caller: MakeCaller, caller_of_each: CallerOfEach
) -> None:
    here = place()
    with running(here) as gateway:
        callers = await caller_of_each(gateway)
        await asyncio.to_thread(here.command, "user", "block", "caller@example.com")
        await all_refused(callers, 1.0)
        assert gateway.stop() == 0


async def test_a_user_let_in_again_stays_in_when_workers_restart(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place(server={"workers": 1})
    with running(here) as gateway:
        store = open_store(f"sqlite:///{here.database}")
        caller = new_caller(gateway)
        assert (await caller.post()).status == 200
        await set_active(store, "caller@example.com", False)
        await all_refused([caller], 1.0)
        await set_active(store, "caller@example.com", True)
        await store.close()
        old = gateway.workers()
        kill(old[0])
        await until(lambda: gateway.workers() not in ([], old), 5, "the worker is back")
        assert {(await caller.post()).status for _ in range(20)} == {200}
        assert gateway.stop() == 0
