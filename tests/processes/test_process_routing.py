"""What routing owes callers of all workers together: models added under way, limits of calls at once."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from callers import CHAT, HELD, Caller
from clients.gateway import upstream
from conftest import MakeCaller, MakePlace
from gateways import Gateway, running, until
from inference import STREAM_BODY, Inference

ADMIN = "/api/v1/admin"


async def test_an_admin_adds_and_deletes_a_model_under_way(
    place: MakePlace, caller_of_each: Callable[[Gateway], Awaitable[list[Caller]]]
) -> None:
    here = place()
    here.command("user", "create", "admin@example.com", "--admin")
    made = here.command(
        "key", "create", "--user", "admin@example.com", "--scopes", "inference,admin", "--rpm", "0", "--json"
    )
    headers = {"X-API-Key": json.loads(made)["api_key"]}
    with running(here) as gateway:
        workers = gateway.workers()
        callers = await caller_of_each(gateway)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{gateway.port}", headers=headers) as session:

            async def call(method: str, path: str, body: Any = None) -> Any:
                async with session.request(method, ADMIN + path, json=body) as answer:
                    assert answer.status < 300, await answer.text()
                    return await answer.json()

            upstream = {"name": "more", "protocol": "openinference", "urls": [here.upstream_url]}
            await call("POST", "/upstreams", upstream)
            await call("POST", "/models", {"name": "new", "targets": [{"upstream": "more", "as": "there"}]})
            begun_s = time.monotonic()
            for caller in callers:
                while (await caller.post({"model": "new"})).status != 200:
                    assert time.monotonic() - begun_s < 20
            listed = await call("GET", "/upstreams")
            assert [(each["id"], each["source"]) for each in listed["data"]] == [("llm", "file"), ("more", "api")]

            seen: list[Any] = []

            async def look() -> bool:
                seen[:] = (await call("GET", "/upstreams"))["data"][1]["endpoints"]
                return {each["worker"] for each in seen if each["call_count"]} == {0, 1}

            while not await look():
                assert time.monotonic() - begun_s < 20, seen
            assert {each["state"] for each in seen} == {"closed"}
            await call("DELETE", "/models/new")
            for caller in callers:
                while (await caller.post({"model": "new"})).status != 404:
                    assert time.monotonic() - begun_s < 40
        assert gateway.workers() == workers, "no worker was started anew"
        assert gateway.stop() == 0


FEW = """[[models]]
name = "few"
queue_s = 30.0
targets = [{ upstream = "llm", as = "mock-model", concurrency_max = 3 }]
"""
FEW_HELD = {**HELD, "model": "few"}


async def test_a_limit_holds_over_all_workers_and_their_successors_and_one_may_use_it_all(
    place: MakePlace, inference: Inference, new_caller: MakeCaller
) -> None:
    here = place()
    here.configure(tail=FEW)
    streams: list[asyncio.Task[Any]] = []
    with running(here) as gateway:

        async def callers(count: int) -> list[Caller]:
            made = [new_caller(gateway) for _ in range(count)]
            for caller in made:
                await caller.post()
            return made

        async def begin(several: list[Caller]) -> None:
            begun = inference.held_count
            streams.extend(asyncio.create_task(caller.post(FEW_HELD)) for caller in several)
            await until(lambda: all(caller.is_sent.is_set() for caller in several), 10, "the calls")
            for caller in await callers(20):  # each worker has had time for what came before
                await caller.close()
            assert inference.held_count <= max(begun, 3)

        inference.hold()
        first, *others = await callers(12)
        same = [caller for caller in (first, *others) if caller.worker == first.worker]
        elsewhere = [caller for caller in others if caller.worker != first.worker]
        assert len(same) >= 3
        assert elsewhere
        await begin(same[:3])
        await until(lambda: inference.held_count == 3, 5, "one worker's calls use the whole limit")
        await begin(elsewhere[:2])
        before = set(gateway.workers())
        gateway.process.send_signal(signal.SIGHUP)
        await until(lambda: gateway.logged().count("configuration taken") == 1, 30, "the reload")
        assert len(set(gateway.workers()) - before) == 2
        await begin(await callers(4))
        assert inference.held_count == 3, "successors know of what their predecessors still serve"
        inference.release()
        answers = await asyncio.gather(*streams)
        assert {(answer.status, answer.body) for answer in answers} == {(200, STREAM_BODY)}
        assert inference.held_count == 9
        assert gateway.stop() == 0


async def test_what_one_worker_leaves_alone_the_others_do_too(
    place: MakePlace, caller_of_each: Callable[[Gateway], Awaitable[list[Caller]]]
) -> None:
    here = place()
    here.command("user", "create", "admin@example.com", "--admin")
    made = here.command("key", "create", "--user", "admin@example.com", "--scopes", "admin", "--json")
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # and never listens
        block = upstream("dead", "openinference", f"http://127.0.0.1:{dead.getsockname()[1]}")
        targets = 'targets = [{ upstream = "dead" }, { upstream = "llm", priority = 1, as = "mock-model" }]\n'
        here.configure(tail=block + '[[models]]\nname = "two"\n' + targets)
        with running(here) as gateway:
            caller, _ = await caller_of_each(gateway)
            for _ in range(5):
                assert (await caller.post({**CHAT, "model": "two"})).status == 200

            async def seen() -> dict[str, int]:
                headers = {"X-API-Key": json.loads(made)["api_key"]}
                async with aiohttp.request(
                    "GET", f"http://127.0.0.1:{gateway.port}{ADMIN}/upstreams", headers=headers
                ) as told:
                    listed = (await told.json())["data"]
                (found,) = [each["endpoints"] for each in listed if each["id"] == "dead"]
                return {each["call_count"]: each["state"] for each in found}

            begun_s = time.monotonic()
            while await seen() != {5: "open", 0: "open"}:
                assert time.monotonic() - begun_s < 4, await seen()
            assert gateway.stop() == 0
