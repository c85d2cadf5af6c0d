"""What servers of a group say of their own accord: one stream for the client, in both eras."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from aiohttp import web
from mcp import MCPError
from mcp.client.subscriptions import ResourceUpdated, ToolsListChanged
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.types import ToolListChangedNotification

from .gateway import WAIT_S, Gateway, running_gateway, toml_table, upstream
from .mcp_server import OPEN, ToolServer
from .servers import LoopThread, serve_aiohttp, serve_asgi
from .test_mcp_group import LEGACY, MODERN, initialize, message, text, url_of
from .test_mcp_group import connected as connected_to

ROOTS = {"jsonrpc": "2.0", "id": 7, "method": "roots/list"}
FULL = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32603, "message": "Subscription limit reached"}}
UPDATED = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "shelf://a"}}


class Shelf:
    """A server of sessions by hand: it says on its streams what it is told to say."""

    def __init__(self) -> None:
        self.streams: dict[str, web.StreamResponse] = {}
        self.got: list[dict[str, Any]] = []
        self.resumed: list[str] = []
        self.app = web.Application()
        for path in ("/mcp", "/rack"):
            self.app.router.add_post(path, self.take)
            self.app.router.add_get(path, self.stream)
        self.app.router.add_post("/quiet", self.take)
        self.app.router.add_route("*", "/locked", self.refuse)
        self.app.router.add_route("*", "/busy", self.refuse)
        self.app.router.add_post("/full", self.fail)
        self.app.router.add_post("/mute", self.stream)

    async def take(self, request: web.Request) -> web.Response:
        told = await request.json()
        self.got.append(told)
        if told.get("method") == "initialize":
            capabilities = {"resources": {"subscribe": True}}
            result = {
                "protocolVersion": LEGACY,
                "capabilities": capabilities,
                "serverInfo": {"name": "s", "version": "1"},
            }
            return web.json_response(
                {"jsonrpc": "2.0", "id": told["id"], "result": result}, headers={"Mcp-Session-Id": "s"}
            )
        if "id" in told and "method" in told:
            return web.json_response({"jsonrpc": "2.0", "id": told["id"], "result": {}})
        return web.Response(status=202)

    async def refuse(self, request: web.Request) -> web.Response:
        return web.Response(status=401 if request.path == "/locked" else 429, headers={"WWW-Authenticate": "Bearer"})

    async def fail(self, request: web.Request) -> web.Response:
        body = f"event: message\ndata: {json.dumps(FULL)}\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.resumed.append(request.headers.get("Last-Event-ID", ""))
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        self.streams[request.path] = out
        self.ended = asyncio.Event()
        await self.ended.wait()
        return out

    async def say(self, event: str, path: str = "/mcp") -> None:
        """Write to the newest stream of a path."""
        await self.streams[path].write(event.encode())

    async def end(self) -> None:
        """End the newest stream."""
        self.ended.set()


class News:
    """A server that tells of changes in the words of both eras."""

    def __init__(self) -> None:
        self.mcp = MCPServer("news-of-the-tests")
        self.mcp.add_tool(self.change)
        self.mcp.resource("news://today")(self.today)

    def app(self) -> Any:
        return self.mcp.streamable_http_app(transport_security=OPEN)

    async def change(self, context: Context) -> str:
        """Tell that the tools and a resource have changed."""
        await context.notify_tools_changed()
        await context.notify_resource_updated("news://today")
        return "told"

    def today(self) -> str:
        """The news."""
        return "none"


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture(scope="module")
def shelf_thread(shelf: Shelf) -> Iterator[LoopThread]:
    with serve_aiohttp(shelf.app) as thread:
        yield thread


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, shelf_thread: LoopThread, dead_port: int) -> Iterator[Gateway]:
    with serve_asgi(ToolServer().app()) as tools, serve_asgi(News().app()) as news:
        ports = {"shelf": shelf_thread.port, "tools": tools.port, "news": news.port, "down": dead_port}
        settings = "".join(upstream(name, "mcp", f"http://127.0.0.1:{port}/mcp") for name, port in ports.items())
        for path in ("rack", "quiet", "locked", "busy", "full", "mute"):
            settings += upstream(path, "mcp", f"http://127.0.0.1:{ports['shelf']}/{path}")
        for name, servers in {
            "all": ["tools", "news", "down"],
            "shelves": ["shelf", "tools"],
            "racks": ["shelf", "rack"],
            "official": ["tools"],
            "silent": ["quiet"],
            "half": ["locked", "news", "busy"],
            "refusing": ["full"],
            "waiting": ["mute"],
        }.items():
            timeout_s = 0.5 if name == "waiting" else 10.0
            settings += toml_table("[[mcp_groups]]", {"name": name, "servers": servers, "timeout_s": timeout_s})
        with running_gateway(tmp_path_factory.mktemp("group"), settings, {}) as gateway:
            yield gateway


async def test_what_a_server_says_in_no_call_reaches_the_sessions_client(group: Gateway) -> None:
    heard = asyncio.Event()

    async def hear(told: Any) -> None:
        if isinstance(told, ToolListChangedNotification):
            heard.set()

    async with connected_to(group, "legacy", message_handler=hear) as client:
        while not heard.is_set():  # the client opens its stream in its own time
            await client.call_tool("tools__announce", {})
            await asyncio.sleep(0.01)


async def test_a_subscription_tells_of_changes_at_all_servers(group: Gateway) -> None:
    async with connected_to(group, MODERN) as client:
        uris = ["news+news://today", "tools+x://y"]
        async with client.listen(tools_list_changed=True, resource_subscriptions=uris) as subscription:
            assert subscription.honored.tools_list_changed
            assert sorted(subscription.honored.resource_subscriptions or ()) == sorted(uris)
            assert text(await client.call_tool("news__change", {})) == "told"
            told = [await asyncio.wait_for(anext(subscription), 5) for _ in range(2)]
    assert told == [ToolsListChanged(), ResourceUpdated("news+news://today")]


async def test_a_subscription_to_what_no_server_has_is_refused(group: Gateway) -> None:
    async with connected_to(group, MODERN) as client:
        with pytest.raises(MCPError, match=r"resources begin with server\+"):
            async with client.listen(resource_subscriptions=["news://today"]):
                pass


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_group_promises_to_tell_what_its_servers_tell(group: Gateway, mode: str) -> None:
    async with connected_to(group, mode) as client:
        capabilities = client.server_capabilities
        assert capabilities.tools is not None
        assert bool(capabilities.tools.list_changed) is (mode == "auto")


@pytest.mark.parametrize("mode", ["legacy", "auto", MODERN])
async def test_a_server_that_refuses_the_gateway_is_left_out(group: Gateway, mode: str) -> None:
    async with connected_to(group, mode, "half") as client:
        assert client.protocol_version == (LEGACY if mode == "legacy" else MODERN)
        assert [tool.name for tool in (await client.list_tools()).tools] == ["news__change"]


@pytest.mark.parametrize(("name", "status", "code"), [("refusing", 200, -32603), ("waiting", 502, -32066)])
def test_a_subscription_that_no_server_takes_is_an_error(group: Gateway, name: str, status: int, code: int) -> None:
    headers = {"X-API-Key": group.key, "Accept": "application/json, text/event-stream"}
    headers |= {"MCP-Protocol-Version": MODERN, "Mcp-Method": "subscriptions/listen"}
    asked = message("subscriptions/listen", notifications={"toolsListChanged": True})
    answer = httpx2.post(url_of(group, name), json=asked, headers=headers, timeout=WAIT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["content-type"].startswith("application/json")


# -- by hand ----------------------------------------------------------------------------------------------------


class Hand:
    """A client of sessions by hand, and its stream."""

    def __init__(self, group: Gateway, name: str) -> None:
        headers = {"X-API-Key": group.key, "Accept": "application/json, text/event-stream"}
        self.http = httpx2.Client(headers=headers, timeout=10)
        self.url = url_of(group, name)
        opened = initialize(self.http, self.url)
        self.capabilities = opened.json()["result"]["capabilities"]
        self.http.headers |= {"Mcp-Session-Id": opened.headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}

    def post(self, body: Any) -> httpx2.Response:
        return self.http.post(self.url, json=body)


@pytest.fixture
def hand(group: Gateway) -> Iterator[Hand]:
    hand = Hand(group, "shelves")
    yield hand
    hand.http.close()


def event_of(lines: Iterator[str]) -> dict[str, str]:
    """Return the fields of the next event that has data."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        fields[name] = value
        if not line and fields.get("data"):
            return fields
    raise AssertionError("the stream has ended")


def test_resources_are_watched_at_their_server(hand: Hand, shelf: Shelf, shelf_thread: LoopThread) -> None:
    assert hand.capabilities["resources"] == {"subscribe": True}
    with hand.http.stream("GET", hand.url) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        for method in ("resources/subscribe", "resources/unsubscribe"):
            assert hand.post(message(method, uri="shelf+shelf://a")).json()["result"] == {}
            assert (shelf.got[-1]["method"], shelf.got[-1]["params"]) == (method, {"uri": "shelf://a"})
        shelf_thread.call(shelf.say(f"id: 4\ndata: {json.dumps(UPDATED)}\n\n"))
        event = event_of(stream.iter_lines())
        assert event["id"] == "~shelf=4"
        assert json.loads(event["data"])["params"] == {"uri": "shelf+shelf://a"}


def test_a_question_in_no_call_is_answered_to_who_asked(hand: Hand, shelf: Shelf, shelf_thread: LoopThread) -> None:
    with hand.http.stream("GET", hand.url) as stream:
        shelf_thread.call(shelf.say(f"data: {json.dumps(ROOTS)}\n\n"))
        asked = json.loads(event_of(stream.iter_lines())["data"])
        answer = {"jsonrpc": "2.0", "id": asked["id"], "result": {"roots": []}}
        assert hand.post(answer).status_code == 202
    assert shelf.got[-1] == answer | {"id": 7}


def test_a_stream_that_ends_is_opened_again_at_all_from_where_it_ended(
    hand: Hand, shelf: Shelf, shelf_thread: LoopThread
) -> None:
    with hand.http.stream("GET", hand.url) as stream:
        shelf_thread.call(shelf.say("id: 9\nretry: 10\ndata:\n\n"))
        lines = stream.iter_lines()
        assert [next(lines), next(lines)] == ["id: ~shelf=9", "retry: 10"]
        shelf_thread.call(shelf.end())
        assert list(lines)[-1] == "", "it ends for the client too, and cleanly"
    with hand.http.stream("GET", hand.url, headers={"Last-Event-ID": "~shelf=9"}) as stream:
        assert stream.status_code == 200
    assert shelf.resumed[-2:] == ["", "9"]


def test_who_resumes_a_stream_misses_nothing_of_any_server(
    group: Gateway, shelf: Shelf, shelf_thread: LoopThread
) -> None:
    hand = Hand(group, "racks")
    with hand.http.stream("GET", hand.url) as stream:
        lines = stream.iter_lines()
        for path, event_id, shown in [("/mcp", "3", "~shelf=3"), ("/rack", "a&b", "~shelf=3&rack=a%26b")]:
            shelf_thread.call(shelf.say(f"id: {event_id}\ndata: {json.dumps(UPDATED)}\n\n", path))
            assert event_of(lines)["id"] == shown
    with hand.http.stream("GET", hand.url, headers={"Last-Event-ID": shown}) as stream:
        shelf_thread.call(shelf.say(f"id: 4\ndata: {json.dumps(UPDATED)}\n\n"))
        assert event_of(stream.iter_lines())["id"] == "~rack=a%26b&shelf=4"
    hand.http.close()
    assert sorted(shelf.resumed[-2:]) == ["3", "a&b"]


def test_the_streams_at_the_servers_end_with_the_clients(group: Gateway) -> None:
    hand = Hand(group, "official")  # whose server has but one stream for a session
    with hand.http.stream("GET", hand.url) as stream:
        assert (stream.status_code, hand.http.get(hand.url).status_code) == (200, 409)
    deadline_s = time.monotonic() + WAIT_S
    status = 409
    while status == 409 and time.monotonic() < deadline_s:
        with hand.http.stream("GET", hand.url) as stream:
            status = stream.status_code
    hand.http.close()
    assert status == 200


def test_servers_that_have_no_stream_say_so(group: Gateway) -> None:
    hand = Hand(group, "silent")
    answer = hand.http.get(hand.url)
    hand.http.close()
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("event_id", ["~web=1", "~shelf", "web__1", "x"])
def test_a_place_in_a_stream_that_is_not_ours_is_refused(hand: Hand, event_id: str) -> None:
    assert hand.http.get(hand.url, headers={"Last-Event-ID": event_id}).status_code == 400


def test_revisions_without_sessions_have_no_stream_to_get(group: Gateway, hand: Hand) -> None:
    answer = hand.http.get(hand.url, headers={"MCP-Protocol-Version": MODERN})
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_gateway_that_reloads_ends_the_stream_as_a_server_may(group: Gateway, hand: Hand) -> None:
    with hand.http.stream("GET", hand.url, timeout=3 * WAIT_S) as stream:  # a new generation starts before
        group.command("reload")
        assert list(stream.iter_lines()) == []
    with hand.http.stream("GET", hand.url) as stream:
        assert stream.status_code == 200
