"""One of two servers is killed in each phase of a call; the other stands in where that is still possible."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from callers import CHAT, Caller, CutError
from clients.gateway import upstream
from conftest import MakeCaller, MakePlace
from gateways import Gateway, running
from mortal import Mortal


@pytest.fixture
def servers() -> Iterator[tuple[Mortal, Mortal]]:
    made = Mortal("first"), Mortal("second")
    yield made
    for server in made:
        server.kill()


@pytest.fixture
def gateway(place: MakePlace, servers: tuple[Mortal, Mortal]) -> Iterator[Gateway]:
    here = place()
    blocks = [upstream(each.name, "openinference", f"http://127.0.0.1:{each.port}") for each in servers]
    targets = 'targets = [{ upstream = "first" }, { upstream = "second", priority = 1 }]\n'
    here.configure(tail="".join(blocks) + '[[models]]\nname = "two"\n' + targets)
    with running(here) as gateway:
        yield gateway
        assert gateway.stop() == 0


async def served_by(caller: Caller, user: str = "") -> str:
    answer = await caller.post({**CHAT, "model": "two", "user": user})
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["served_by"])


async def test_one_of_two_servers_is_killed_in_each_phase_of_a_call(
    gateway: Gateway, servers: tuple[Mortal, Mortal], new_caller: MakeCaller
) -> None:
    first, _ = servers
    caller = new_caller(gateway)
    assert await served_by(caller) == "first"

    stream = json.dumps({**CHAT, "model": "two", "user": "half", "stream": True}).encode()
    await caller.send(b"POST /v1/chat/completions", stream)
    await asyncio.to_thread(first.await_call)
    first.kill()
    with pytest.raises(CutError):
        await caller.receive()
    await caller.close()

    assert await served_by(caller) == "second", "no connection could be made"

    first.start()
    muted = asyncio.create_task(served_by(caller, "mute"))
    await asyncio.to_thread(first.await_call)
    first.kill()
    assert await muted == "second", "it had got the call and not answered"
    first.start()

    columns = "upstream, status, outcome, error, attempts, output_tokens, usage_source"
    while len(found := gateway.place.query(f"SELECT {columns} FROM receipts ORDER BY started_ns")) < 4:
        await asyncio.sleep(0.02)
    assert found == [
        ("first", 200, "ok", "", 1, 4, "provider"),
        ("first", 200, "upstream_failed", "UPSTREAM_INVALID", 1, 2, "estimated"),
        ("second", 200, "ok", "", 2, 4, "provider"),
        ("second", 200, "ok", "", 2, 4, "provider"),
    ]
