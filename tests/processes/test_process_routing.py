"""An upstream and a model that an admin adds serve calls on every worker within two seconds, and are seen there."""

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from callers import Caller
from conftest import MakePlace
from gateways import Gateway, running

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
