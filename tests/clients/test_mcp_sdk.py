"""The official MCP SDK, client and server, in both eras: the gateway changes nothing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.types import ElicitRequestParams, ElicitResult, TextContent

from .conftest import Tools, ToolWay, Way

LEGACY, MODERN = "2025-11-25", "2026-07-28"
ERAS = {
    "sessions": ("tools", "legacy", LEGACY),
    "modern": ("tools", MODERN, MODERN),
    "discovers": ("tools", "auto", MODERN),
    "stateless-server": ("stateless", "legacy", LEGACY),
}


async def tell_address(context: Any, params: ElicitRequestParams) -> ElicitResult:
    assert params.message == "where to?"
    return ElicitResult(action="accept", content={"city": "Łódź"})


@asynccontextmanager
async def connected(tool_way: ToolWay, server: str, mode: str) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {tool_way.key}"}
    async with create_mcp_http_client(headers=headers) as http:
        transport = streamable_http_client(tool_way.urls[server], http_client=http)
        async with Client(transport, mode=mode, elicitation_callback=tell_address) as client:
            yield client


class Era(NamedTuple):
    """One pairing of server form and client mode."""

    tool_way: ToolWay
    server: str
    mode: str
    version: str

    def client(self) -> AbstractAsyncContextManager[Client]:
        """Return a client to enter within the test: the task that enters it must leave it."""
        return connected(self.tool_way, self.server, self.mode)


@pytest.fixture(params=ERAS)
def era(request: pytest.FixtureRequest, tool_way: ToolWay) -> Era:
    return Era(tool_way, *ERAS[request.param])


def text(result: Any) -> str:
    block = result.content[0]
    assert isinstance(block, TextContent)
    return block.text


async def test_tools_are_listed_and_called(era: Era) -> None:
    async with era.client() as client:
        assert client.protocol_version == era.version
        assert "add" in {tool.name for tool in (await client.list_tools()).tools}
        assert text(await client.call_tool("add", {"a": 2, "b": 3})) == "5"


async def test_a_failing_tool_is_a_tool_error(era: Era) -> None:
    async with era.client() as client:
        result = await client.call_tool("fail", {})
        assert result.is_error
        assert "fail" in text(result)


async def test_an_unknown_resource_is_a_json_rpc_error(era: Era) -> None:
    async with era.client() as client:
        with pytest.raises(MCPError):
            await client.read_resource("file:///no-such-thing")


async def test_a_large_result_arrives_whole(era: Era) -> None:
    async with era.client() as client:
        assert text(await client.call_tool("blob", {"size": 400_000})) == "x" * 400_000


async def test_parallel_calls_get_each_their_own_result(era: Era) -> None:
    async with era.client() as client:
        results = await asyncio.gather(*(client.call_tool("add", {"a": number, "b": 0}) for number in range(20)))
        assert [text(result) for result in results] == [str(number) for number in range(20)]


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_progress_arrives_in_order(tool_way: ToolWay, mode: str) -> None:
    seen: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async with connected(tool_way, "tools", mode) as client:
        result = await client.call_tool("count", {"to": 5}, progress_callback=note)
    assert text(result) == "done"
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_a_server_can_ask_the_client_back(tool_way: ToolWay, mode: str) -> None:
    async with connected(tool_way, "tools", mode) as client:
        assert text(await client.call_tool("order", {"what": "tea"})) == "tea goes to Łódź"


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_a_client_that_leaves_a_call_cancels_it(tool_way: ToolWay, tools: Tools, mode: str) -> None:
    tools.servers["tools"].cancelled.clear()
    started = asyncio.Event()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        started.set()

    async with connected(tool_way, "tools", mode) as client:
        call = asyncio.ensure_future(client.call_tool("wait", {}, progress_callback=note))
        await asyncio.wait_for(started.wait(), 5)
        call.cancel()
        assert await asyncio.to_thread(tools.servers["tools"].cancelled.wait, 5)
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_stream_closed_early_is_resumed(tool_way: ToolWay, tools: Tools) -> None:
    before = tools.servers["resumable"].events.resumed_count
    async with connected(tool_way, "resumable", "legacy") as client:
        assert text(await client.call_tool("polled", {})) == "resumed"
    assert tools.servers["resumable"].events.resumed_count > before


@pytest.fixture
def http(tool_way: ToolWay) -> Iterator[httpx2.Client]:
    headers = {"X-API-Key": tool_way.key, "Accept": "application/json, text/event-stream"}
    with httpx2.Client(headers=headers, timeout=10) as http:
        yield http


def initialize(http: httpx2.Client, url: str) -> httpx2.Response:
    params = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    return http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})


def test_a_session_is_opened_used_and_ended(http: httpx2.Client, tool_way: ToolWay) -> None:
    url = tool_way.urls["tools"]
    opened = initialize(http, url)
    session = {"Mcp-Session-Id": opened.headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}
    assert opened.headers["content-type"].startswith("text/event-stream")
    told = http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
    assert (told.status_code, told.content) == (202, b"")
    assert http.delete(url, headers=session).status_code == 200
    listed = http.post(url, json={"jsonrpc": "2.0", "id": 2, "method": "tools/list"}, headers=session)
    assert listed.status_code == 404


def test_an_unknown_session_is_not_found(http: httpx2.Client, tool_way: ToolWay) -> None:
    session = {"Mcp-Session-Id": "0" * 32, "MCP-Protocol-Version": LEGACY}
    body = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
    answer = http.post(tool_way.urls["tools"], json=body, headers=session)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == -32600


def test_a_second_standalone_stream_is_refused_until_the_first_is_left(http: httpx2.Client, tool_way: ToolWay) -> None:
    url = tool_way.urls["tools"]
    session = {
        "Mcp-Session-Id": initialize(http, url).headers["mcp-session-id"],
        "Accept": "text/event-stream",
    }
    with http.stream("GET", url, headers=session) as first:
        assert first.status_code == 200
        assert http.get(url, headers=session).status_code == 409


def test_what_the_client_does_not_accept_is_refused_by_the_server(http: httpx2.Client, tool_way: ToolWay) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}
    answer = http.post(tool_way.urls["tools"], json=body, headers={"Accept": "text/html"})
    assert answer.status_code == 406


def test_a_wrong_version_keeps_the_servers_own_answer(http: httpx2.Client, tool_way: ToolWay) -> None:
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2099-01-01",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    body = {"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": {"_meta": meta}}
    headers = {"MCP-Protocol-Version": "2099-01-01", "Mcp-Method": "tools/list"}
    answer = http.post(tool_way.urls["tools"], json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32022)


async def test_the_form_of_2024_11_05_works(sse_way: Way) -> None:
    transport = sse_client(sse_way.url, headers={"X-API-Key": sse_way.key})
    async with Client(transport, mode="legacy", read_timeout_seconds=2) as client:
        assert text(await client.call_tool("add", {"a": 2, "b": 3})) == "5"
