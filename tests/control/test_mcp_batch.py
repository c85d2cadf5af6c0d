"""The stream that answers several messages at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from msgspec import Raw

from gpuproxy.codec.mcp import Fields, raw
from gpuproxy.control.mcp_answers import RpcError
from gpuproxy.control.mcp_batch import Answer, Say, answered_together, messages_in

Serve = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]
ASKED: list[Fields] = [{"method": raw("ping"), "id": raw(number)} for number in (1, 2)]
DONE = {"jsonrpc": "2.0", "id": 7, "result": {}}


async def told(aiohttp_client: Serve, answer: Answer) -> tuple[int, list[Any]]:
    """Return the status and the messages that answer two questions."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await answered_together(request, ASKED, answer)

    app = web.Application()
    app.router.add_post("/", handle)
    client = await aiohttp_client(app)
    response = await client.post("/")
    lines = (await response.text()).splitlines()
    return response.status, [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


async def test_each_answer_has_the_id_that_was_asked_and_one_line(aiohttp_client: Serve) -> None:
    async def answer(message: Fields, say: Say) -> web.StreamResponse:
        return web.json_response(text=json.dumps(DONE, indent=1))

    status, messages = await told(aiohttp_client, answer)
    assert status == 200
    assert sorted(each["id"] for each in messages) == [1, 2]
    assert messages[0]["result"] == {}


@pytest.mark.parametrize("status", [200, 202, 502])
async def test_what_is_no_response_is_told_as_a_fault(aiohttp_client: Serve, status: int) -> None:
    async def answer(message: Fields, say: Say) -> web.StreamResponse:
        return web.Response(status=status, text="<p>")

    _, messages = await told(aiohttp_client, answer)
    assert [(each["id"], each["error"]["code"]) for each in messages] == [(1, -32603), (2, -32603)]


async def test_one_that_breaks_leaves_the_other(aiohttp_client: Serve) -> None:
    async def answer(message: Fields, say: Say) -> web.StreamResponse:
        if message["id"] == Raw(b"1"):
            raise ZeroDivisionError
        return web.json_response(DONE)

    _, messages = await told(aiohttp_client, answer)
    assert {each["id"]: "result" in each for each in messages} == {1: False, 2: True}


async def test_a_session_that_is_gone_is_told_by_the_status_and_stops_the_rest(aiohttp_client: Serve) -> None:
    stopped = asyncio.Event()

    async def answer(message: Fields, say: Say) -> web.StreamResponse:
        if message["id"] == Raw(b"1"):
            return web.json_response(DONE, status=404)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    assert await told(aiohttp_client, answer) == (404, [])
    assert stopped.is_set()


async def test_what_is_said_meanwhile_passes_before_the_answers(aiohttp_client: Serve) -> None:
    async def answer(message: Fields, say: Say) -> web.StreamResponse:
        await say(b'{"method":\n"notifications/progress"}')
        return web.json_response(DONE)

    _, messages = await told(aiohttp_client, answer)
    assert messages[0] == {"method": "notifications/progress"}
    assert len(messages) == 4


@pytest.mark.parametrize("body", [b"[1]", b"[", b'[{"a":1},null]'])
def test_what_is_no_batch_is_refused(body: bytes) -> None:
    with pytest.raises(RpcError, match="no JSON array of objects"):
        messages_in(body)
