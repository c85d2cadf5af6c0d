"""The official MCP SDK against a group: several servers behind one endpoint, in both eras, one of them down."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.types import ElicitRequestParams, ElicitResult, TextContent, TextResourceContents

from .conftest import Tools
from .gateway import WAIT_S, Gateway, running_gateway, toml_table, upstream
from .mcp_server import OPEN
from .servers import serve_asgi

BATCHING, LEGACY, MODERN = "2025-03-26", "2025-11-25", "2026-07-28"
MODES = [("legacy", LEGACY), (MODERN, MODERN), ("auto", MODERN)]


class Library:
    """A second server: a tool of a name the first one has too, a prompt, resources."""

    def __init__(self) -> None:
        self.mcp = MCPServer("library-of-the-tests", instructions="Ask for books.")
        self.mcp.add_tool(self.add)
        self.mcp.add_tool(self.blob)
        self.mcp.add_tool(self.lend)
        self.mcp.prompt()(self.greet)
        self.mcp.resource("book://one")(self.one)
        self.mcp.resource("book://{name}/page")(self.page)

    def app(self) -> Any:
        """Return the ASGI application for Streamable HTTP at /mcp."""
        return self.mcp.streamable_http_app(transport_security=OPEN)

    async def add(self, book: str) -> str:
        """Add a book."""
        return f"added {book}"

    async def lend(self, book: str) -> str:
        """Lend a book; it has a price."""
        return f"lent {book}"

    async def blob(self) -> str:
        """Return a long text."""
        return "y" * 200_000

    def greet(self, name: str) -> str:
        """Greet somebody."""
        return f"Hello {name}!"

    def one(self) -> str:
        """The one book."""
        return "text of one"

    def page(self, name: str) -> str:
        """A page of a book."""
        return f"page of {name}"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, tools: Tools, dead_port: int) -> Iterator[Gateway]:
    with serve_asgi(Library().app()) as library:
        settings = "".join(
            [
                upstream("tools", "mcp", tools.url("tools")),
                upstream("resumable", "mcp", tools.url("resumable")),
                upstream("library", "mcp", f"http://127.0.0.1:{library.port}/mcp"),
                upstream("down", "mcp", f"http://127.0.0.1:{dead_port}/mcp"),
                toml_table("[[prices]]", {"tool": "lend", "upstream": "library", "per_request_usd": "0.01"}),
                toml_table("[[mcp_groups]]", {"name": "all", "servers": ["tools", "library"]}),
                toml_table("[[mcp_groups]]", {"name": "some", "servers": ["down", "library", "missing"]}),
                toml_table("[[mcp_groups]]", {"name": "none", "servers": ["down"], "timeout_s": 5.0}),
                toml_table("[[mcp_groups]]", {"name": "again", "servers": ["resumable", "library"]}),
            ]
        )
        with running_gateway(tmp_path_factory.mktemp("group"), settings, {}) as gateway:
            yield gateway


def url_of(group: Gateway, name: str = "all") -> str:
    return f"{group.url}/api/v1/gpu/proxy/mcp/{name}"


async def tell_address(context: Any, params: ElicitRequestParams) -> ElicitResult:
    return ElicitResult(action="accept", content={"city": "Łódź"})


@asynccontextmanager
async def connected(
    group: Gateway, mode: str = "auto", name: str = "all", key: str = "", **options: Any
) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {key or group.key}"}
    async with create_mcp_http_client(headers=headers) as http:
        transport = streamable_http_client(url_of(group, name), http_client=http)
        async with Client(transport, mode=mode, elicitation_callback=tell_address, **options) as client:
            yield client


def text(result: Any) -> str:
    block = result.content[0]
    assert isinstance(block, TextContent)
    return block.text


@pytest.mark.parametrize(("mode", "version"), MODES)
async def test_tools_of_all_servers_are_listed_and_called_by_their_server(
    group: Gateway, mode: str, version: str
) -> None:
    async with connected(group, mode) as client:
        assert client.protocol_version == version
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"tools__add", "tools__count", "library__add", "library__blob"} <= names
        assert text(await client.call_tool("tools__add", {"a": 2, "b": 3})) == "5"
        assert text(await client.call_tool("library__add", {"book": "Faust"})) == "added Faust"
        assert (await client.call_tool("tools__fail", {})).is_error
        assert text(await client.call_tool("library__blob", {})) == "y" * 200_000


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_prompts_and_resources_are_found_by_their_server(group: Gateway, mode: str) -> None:
    async with connected(group, mode) as client:
        assert [prompt.name for prompt in (await client.list_prompts()).prompts] == ["library__greet"]
        told = await client.get_prompt("library__greet", {"name": "Ann"})
        assert told.messages[0].content.text == "Hello Ann!"  # type: ignore[union-attr]
        assert [str(each.uri) for each in (await client.list_resources()).resources] == ["library+book://one"]
        templates = (await client.list_resource_templates()).resource_templates
        assert [each.uri_template for each in templates] == ["library+book://{name}/page"]
        (content,) = (await client.read_resource("library+book://faust/page")).contents
        assert isinstance(content, TextResourceContents)
        assert (str(content.uri), content.text) == ("library+book://faust/page", "page of faust")


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_a_tool_without_a_server_is_unknown(group: Gateway, mode: str) -> None:
    async with connected(group, mode) as client:
        with pytest.raises(MCPError, match="names begin with server__"):
            await client.call_tool("add", {})


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_progress_and_questions_of_a_server_pass_through(group: Gateway, mode: str) -> None:
    seen: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async with connected(group, mode) as client:
        await client.call_tool("tools__count", {"to": 5}, progress_callback=note)
        assert seen == [1, 2, 3, 4, 5]
        assert text(await client.call_tool("tools__order", {"what": "tea"})) == "tea goes to Łódź"


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_a_client_that_leaves_a_call_cancels_it(group: Gateway, tools: Tools, mode: str) -> None:
    cancelled = tools.servers["tools"].cancelled
    cancelled.clear()
    started = asyncio.Event()

    async def note(progress: float, total: float | None, message: str | None) -> None:
        started.set()

    async with connected(group, mode) as client:
        call = asyncio.ensure_future(client.call_tool("tools__wait", {}, progress_callback=note))
        await asyncio.wait_for(started.wait(), 5)
        call.cancel()
        assert await asyncio.to_thread(cancelled.wait, 5)
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_stream_closed_early_is_resumed_at_its_server(group: Gateway, tools: Tools) -> None:
    before = tools.servers["resumable"].events.resumed_count
    async with connected(group, "legacy", "again") as client:
        assert text(await client.call_tool("resumable__polled", {})) == "resumed"
    assert tools.servers["resumable"].events.resumed_count > before


@pytest.mark.parametrize("mode", ["legacy", MODERN, "auto"])
async def test_a_server_that_is_down_is_left_out_and_logged(group: Gateway, mode: str) -> None:
    async with connected(group, mode, "some") as client:
        assert client.protocol_version == (LEGACY if mode == "legacy" else MODERN)
        assert {tool.name for tool in (await client.list_tools()).tools} == {
            "library__add",
            "library__blob",
            "library__lend",
        }
        assert text(await client.call_tool("library__add", {"book": "Faust"})) == "added Faust"
    assert "a server of an MCP group is left out" in group.log.read_text()


async def test_inner_calls_are_the_callers_own_with_receipts_by_tool(group: Gateway) -> None:
    key = group.new_key("group@example.com")
    async with connected(group, MODERN, key=key) as client:
        await client.call_tool("tools__add", {"a": 1, "b": 1})
        await client.call_tool("library__add", {"book": "x"})
    assert await asyncio.to_thread(used_tools, group, key) == [("library/add", 1), ("tools/add", 1)]


def used_tools(group: Gateway, key: str) -> list[tuple[str, int]]:
    """Return which tools a key has called, and how often, as soon as that is two."""
    deadline_s = time.monotonic() + WAIT_S
    with httpx2.Client(headers={"X-API-Key": key}) as http:
        while True:
            groups = http.get(f"{group.url}/api/v1/user/usage?group_by=tool").json()["groups"]
            if len(groups) >= 2 or time.monotonic() > deadline_s:
                return [(each["tool"], each["requests"]) for each in groups]


async def test_a_tool_with_a_price_is_paid_for_and_without_credit_not_called(group: Gateway) -> None:
    key = await asyncio.to_thread(group.new_key, "reader@example.com")
    await asyncio.to_thread(group.command, "credits", "add", "reader@example.com", "0.015")
    async with connected(group, MODERN, key=key) as client:
        assert text(await client.call_tool("library__lend", {"book": "Faust"})) == "lent Faust"
        with pytest.raises(MCPError, match="more than the account has left"):
            await client.call_tool("library__lend", {"book": "Faust"})
    costs = await asyncio.to_thread(costs_of_tools, group, key)
    assert costs == [("lend", "refused", 0), ("lend", "ok", 10_000_000)]


def costs_of_tools(group: Gateway, key: str) -> list[tuple[str, str, int]]:
    """Return tool, outcome and cost of a key's two newest calls of tools, as soon as there are two."""
    deadline_s = time.monotonic() + WAIT_S
    with httpx2.Client(headers={"X-API-Key": key}) as http:
        while True:
            calls = http.get(f"{group.url}/api/v1/user/usage/calls").json()["data"]
            found = [each for each in calls if each["rpc_method"] == "tools/call"]
            if len(found) >= 2 or time.monotonic() > deadline_s:
                return [(each["rpc_name"], each["outcome"], each["cost_nanousd"]) for each in found]


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_the_tools_of_a_key_hold_in_a_group(group: Gateway, mode: str) -> None:
    words = ("key", "create", "--user", "caller@example.com", "--rpm", "0", "--tools", "library/add,tools/c*")
    key = (await asyncio.to_thread(group.command, *words)).strip()
    async with connected(group, mode, key=key) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"library__add", "tools__count"} <= names
        assert not names & {"library__blob", "tools__add"}
        with pytest.raises(MCPError, match="may not use tool 'tools/add'"):
            await client.call_tool("tools__add", {"a": 2, "b": 3})


# -- by hand ----------------------------------------------------------------------------------------------------


@pytest.fixture
def http(group: Gateway) -> Iterator[httpx2.Client]:
    headers = {"X-API-Key": group.key, "Accept": "application/json, text/event-stream"}
    with httpx2.Client(headers=headers, timeout=10) as http:
        yield http


def message(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def initialize(http: httpx2.Client, url: str, revision: str = LEGACY) -> httpx2.Response:
    params = {"protocolVersion": revision, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    return http.post(url, json=message("initialize", **params))


def test_a_session_is_one_for_all_and_ends_for_all(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    opened = initialize(http, url)
    told = opened.json()["result"]
    assert (told["protocolVersion"], told["serverInfo"]["name"]) == (LEGACY, "gpuproxy/all")
    assert {"tools", "prompts", "resources"} <= told["capabilities"].keys()
    assert told["capabilities"]["tools"] == {}
    assert told["instructions"] == "library: Ask for books."
    session = {"Mcp-Session-Id": opened.headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}
    assert session["Mcp-Session-Id"].isascii()
    noted = http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
    assert (noted.status_code, noted.content) == (202, b"")
    assert http.post(url, json=message("ping"), headers=session).json()["result"] == {}
    assert http.post(url, json=message("tools/list"), headers=session).status_code == 200
    assert http.delete(url, headers=session).status_code == 200
    assert http.post(url, json=message("tools/list"), headers=session).status_code == 404


@pytest.mark.parametrize("session", ["x", "A" * 200, "é"], ids=["short", "long", "not-ascii"])
def test_a_session_that_is_not_ours_is_not_found(group: Gateway, http: httpx2.Client, session: str) -> None:
    headers = {"Mcp-Session-Id": session.encode(), "MCP-Protocol-Version": LEGACY.encode()}
    assert http.post(url_of(group), json=message("tools/list"), headers=headers).status_code == 404


def test_a_session_of_another_group_or_key_is_not_found(group: Gateway, http: httpx2.Client) -> None:
    session = {"Mcp-Session-Id": initialize(http, url_of(group)).headers["mcp-session-id"]}
    assert http.post(url_of(group, "again"), json=message("tools/list"), headers=session).status_code == 404
    other = session | {"X-API-Key": group.new_key("other@example.com")}
    assert http.post(url_of(group), json=message("tools/list"), headers=other).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"no json", 400, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":5}', 400, -32600),
        (json.dumps([message("ping")]).encode(), 400, -32600),
        (json.dumps(message("tools/list")).encode(), 400, -32600),
        (b"x" * (33 << 20), 413, -32600),
    ],
    ids=["no-json", "no-method", "batch", "no-session", "too-long"],
)
def test_what_cannot_be_served_is_a_json_rpc_error(
    group: Gateway, http: httpx2.Client, body: bytes, status: int, code: int
) -> None:
    answer = http.post(url_of(group), content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def begun(http: httpx2.Client, url: str, revision: str) -> dict[str, str]:
    """Begin a session; return the fields that its calls have."""
    answer = initialize(http, url, revision)
    assert answer.json()["result"]["protocolVersion"] == revision
    return {"Mcp-Session-Id": answer.headers["mcp-session-id"]}


def test_a_batch_is_answered_message_by_message(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    batch = [
        message("ping") | {"id": "é"},
        message("tools/call", name="tools__count", arguments={"to": 2}, _meta={"progressToken": 1}) | {"id": 2},
        message("tools/call", name="library__add", arguments={"book": "Ø"}) | {"id": 3},
        {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"},
        message("tools/call", name="nobody__add") | {"id": 4},
        message("initialize") | {"id": 5},
    ]
    answer = http.post(url, json=batch, headers=begun(http, url, BATCHING))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [each["params"]["progress"] for each in told if "method" in each] == [1, 2]
    found = {each["id"]: each for each in told if "method" not in each}
    assert len(found) == len(told) - 2 == 5
    assert found["é"]["result"] == {}
    assert [found[rpc_id]["result"]["content"][0]["text"] for rpc_id in (2, 3)] == ["done", "added Ø"]
    assert [found[rpc_id]["error"]["code"] for rpc_id in (4, 5)] == [-32602, -32600]


def test_a_batch_that_asks_for_nothing_gets_no_answer(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    batch = [
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": "tools__1", "result": {}},
    ]
    answer = http.post(url, json=batch, headers=begun(http, url, BATCHING))
    assert (answer.status_code, answer.content) == (202, b"")


@pytest.mark.parametrize("count", [0, 33])
def test_a_batch_is_bounded(group: Gateway, http: httpx2.Client, count: int) -> None:
    url = url_of(group)
    answer = http.post(url, json=[message("ping")] * count, headers=begun(http, url, BATCHING))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32600)


def test_revisions_without_batches_get_none(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    answer = http.post(url, json=[message("ping")], headers=begun(http, url, LEGACY))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32600)


def test_a_batch_of_a_session_that_has_ended_is_not_found(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    session = begun(http, url, BATCHING)
    http.delete(url, headers=session)
    assert http.post(url, json=[message("tools/list")] * 2, headers=session).status_code == 404


def test_what_no_server_has_is_told_as_they_tell_it(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group, "some")
    session = {"Mcp-Session-Id": initialize(http, url).headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}
    named = {"type": "ref/prompt", "name": "library__greet"}
    asked = message("completion/complete", ref=named, argument={"name": "name", "value": "A"})
    for body in (asked, message("logging/setLevel", level="nonsense")):
        answer = http.post(url, json=body, headers=session)
        told = answer.text[answer.text.index("{") :]
        assert json.loads(told)["error"]["code"] in (-32601, -32602), told
        assert "gpuproxy" not in told


@pytest.mark.parametrize("method", ["tasks/get", "nothing"])
def test_an_unknown_method_is_not_found(group: Gateway, http: httpx2.Client, method: str) -> None:
    headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": method}
    answer = http.post(url_of(group), json=message(method), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, -32601)


@pytest.mark.parametrize(
    ("told", "status"), [("tools__add", 200), ("=?base64?dG9vbHNfX2FkZA==?=", 200), ("other", 400)]
)
def test_a_header_must_say_what_the_message_says(group: Gateway, http: httpx2.Client, told: str, status: int) -> None:
    meta = {"io.modelcontextprotocol/protocolVersion": MODERN, "io.modelcontextprotocol/clientCapabilities": {}}
    body = message("tools/call", name="tools__add", arguments={"a": 1, "b": 1}, _meta=meta)
    headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": told}
    answer = http.post(url_of(group), json=body, headers=headers)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["code"] == -32020


def test_without_a_key_the_answer_is_that_of_a_server(group: Gateway) -> None:
    with httpx2.Client() as http:
        answer = initialize(http, url_of(group))
    assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
    assert answer.json()["error"]["data"]["code"] == "UNAUTHORIZED"


def test_a_page_that_may_not_call_a_server_may_not_call_the_group(group: Gateway, http: httpx2.Client) -> None:
    headers = {"Origin": "https://evil.example"}
    params = message("initialize", protocolVersion=LEGACY, capabilities={}, clientInfo={"name": "t", "version": "1"})
    assert http.post(url_of(group), json=params, headers=headers).status_code == 403
    for method in ("GET", "DELETE"):
        assert http.request(method, url_of(group), headers=headers).status_code == 403


def test_a_page_can_read_whatever_a_group_answers(group: Gateway, http: httpx2.Client) -> None:
    url = url_of(group)
    http.headers["Origin"] = "http://localhost:3000"
    session = begun(http, url, BATCHING)
    noted = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    posted = [noted, message("ping"), message("nothing"), message("tools/list"), [message("ping")], [noted]]
    answers = [http.post(url, json=body, headers=session) for body in posted]
    answers += [http.post(url, json=message("ping")), http.get(url), http.delete(url, headers=session)]
    assert [each.status_code for each in answers] == [202, 200, 200, 200, 200, 202, 400, 400, 200]
    for each in answers:
        assert each.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "Mcp-Session-Id" in each.headers["access-control-expose-headers"]
        assert each.headers["vary"] == "Origin"


def test_a_group_whose_servers_are_all_down_says_so(group: Gateway, http: httpx2.Client) -> None:
    answer = initialize(http, url_of(group, "none"))
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == -32066


def test_the_configuration_of_a_group_is_checked(tmp_path: Path, group: Gateway) -> None:
    assert "mcp_groups[1].servers: no upstream 'missing' here" in group.command("check-config")
