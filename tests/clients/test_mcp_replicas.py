"""The official MCP SDK over two servers behind one name and two workers, each call on a connection of its own."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, NamedTuple

import httpx2
import pytest
from aiohttp import web
from mcp import Client
from mcp.client.auth import TokenStorage
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from mcp.types import ToolListChangedNotification

from .gateway import Gateway, running_gateway, toml_table
from .mcp_server import ToolServer
from .servers import serve_aiohttp, serve_asgi
from .test_mcp_sdk import LEGACY, MODERN, tell_address, text

SESSIONS = 8
ONE_CALL_EACH = httpx2.Limits(max_keepalive_connections=0)  # so that any worker may get the next call
LIST = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}


class Issuer:
    """An authorization server that gives out one key of the gateway; `resources` are those it was asked for."""

    def __init__(self) -> None:
        self.key = ""
        self.url = ""
        self.resources: list[str] = []
        self.app = web.Application()
        self.app.router.add_get("/.well-known/oauth-authorization-server", self.describe)
        self.app.router.add_post("/token", self.give)

    async def describe(self, request: web.Request) -> web.Response:
        places = {name: f"{self.url}/{name.partition('_')[0]}" for name in ("authorization_endpoint", "token_endpoint")}
        return web.json_response({"issuer": self.url, "grant_types_supported": ["client_credentials"], **places})

    async def give(self, request: web.Request) -> web.Response:
        self.resources.append(str((await request.post())["resource"]))
        return web.json_response({"access_token": self.key, "token_type": "Bearer"})


class Tokens(TokenStorage):
    """A client's tokens, forgotten with it."""

    tokens: OAuthToken | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return None

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """The client has its credentials already."""


class Twins(NamedTuple):
    """Two servers, the gateway before them, and who gives out its keys."""

    servers: dict[str, ToolServer]
    gateway: Gateway
    issuer: Issuer

    def url(self, name: str) -> str:
        """Return the address of both under one name."""
        return f"{self.gateway.url}/api/v1/gpu/proxy/mcp/{name}"

    @property
    def headers(self) -> dict[str, str]:
        return {"X-API-Key": self.gateway.key, "Accept": "application/json, text/event-stream"}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    servers = {name: ToolServer(name) for name in ("first", "second")}
    with ExitStack() as stack:
        now = [stack.enter_context(serve_asgi(each.resumable_app())).port for each in servers.values()]
        old = [stack.enter_context(serve_asgi(each.sse_app())).port for each in servers.values()]
        urls = {"twins": [f"http://127.0.0.1:{port}/mcp" for port in now]}
        urls["old"] = [f"http://127.0.0.1:{port}" for port in old]
        blocks = [{"name": name, "protocol": "mcp", "urls": each} for name, each in urls.items()]
        issuer = Issuer()
        issuer.url = f"http://127.0.0.1:{stack.enter_context(serve_aiohttp(issuer.app)).port}"
        settings = toml_table("[mcp]", {"authorization_servers": [issuer.url]})
        settings += "".join(toml_table("[[upstreams]]", block) for block in blocks)
        gateway = stack.enter_context(running_gateway(tmp_path_factory.mktemp("twins"), settings, {}))
        issuer.key = gateway.key
        yield Twins(servers, gateway, issuer)


@asynccontextmanager
async def connected(twins: Twins, mode: str, **options: Any) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers=twins.headers, limits=ONE_CALL_EACH, timeout=20) as http:
        transport = streamable_http_client(twins.url("twins"), http_client=http)
        async with Client(transport, mode=mode, elicitation_callback=tell_address, **options) as client:
            yield client


async def who(client: Client) -> str:
    return text(await client.call_tool("who", {}))


async def test_each_session_stays_where_it_began_and_all_are_used(twins: Twins) -> None:
    async def use() -> set[str]:
        async with connected(twins, "legacy") as client:
            assert client.protocol_version == LEGACY
            return {await who(client) for _ in range(6)}

    met = await asyncio.gather(*(use() for _ in range(SESSIONS)))
    assert all(len(each) == 1 for each in met), met
    assert set().union(*met) == {"first", "second"}


async def test_a_server_asks_the_client_back_within_the_session(twins: Twins) -> None:
    for _ in range(4):
        async with connected(twins, "legacy") as client:
            assert text(await client.call_tool("order", {"what": "tea"})) == "tea goes to Łódź"


async def test_the_standalone_stream_is_the_sessions_own(twins: Twins) -> None:
    for _ in range(4):
        heard = asyncio.Event()

        async def hear(message: Any, heard: asyncio.Event = heard) -> None:
            if isinstance(message, ToolListChangedNotification):
                heard.set()

        async with connected(twins, "legacy", message_handler=hear) as client:
            while not heard.is_set():  # the client opens its stream in its own time
                await client.call_tool("announce", {})
                await asyncio.sleep(0.01)


async def test_a_stream_that_was_broken_off_is_resumed_where_it_broke(twins: Twins) -> None:
    before = sum(server.events.resumed_count for server in twins.servers.values())
    for _ in range(4):
        async with connected(twins, "legacy") as client:
            assert text(await client.call_tool("polled", {})) == "resumed"
    assert sum(server.events.resumed_count for server in twins.servers.values()) >= before + 4


async def test_calls_without_a_session_are_spread(twins: Twins) -> None:
    async with connected(twins, MODERN) as client:
        assert client.protocol_version == MODERN
        met = Counter([await who(client) for _ in range(20)])
    assert set(met) == {"first", "second"}, met


async def test_streams_of_2024_11_05_get_their_answers(twins: Twins) -> None:
    async def use() -> set[str]:
        transport = sse_client(twins.url("old") + "/sse", headers={"X-API-Key": twins.gateway.key})
        async with Client(transport, mode="legacy", read_timeout_seconds=10) as client:
            return {await who(client) for _ in range(4)}

    met = await asyncio.gather(*(use() for _ in range(SESSIONS)))
    assert all(len(each) == 1 for each in met), met
    assert set().union(*met) == {"first", "second"}


async def test_a_client_without_a_key_gets_one_where_the_gateway_says(twins: Twins) -> None:
    url, issuer = twins.url("twins"), twins.issuer
    auth = ClientCredentialsOAuthProvider(url, Tokens(), "client", "secret", issuer=issuer.url)
    async with httpx2.AsyncClient(auth=auth, timeout=20) as http:
        transport = streamable_http_client(url, http_client=http)
        async with Client(transport, mode="legacy") as client:
            assert await who(client) in ("first", "second")
    assert set(issuer.resources) == {url}


# -- without the SDK ----------------------------------------------------------------------------------------------


@pytest.fixture
def http(twins: Twins) -> Iterator[httpx2.Client]:
    with httpx2.Client(headers=twins.headers, limits=ONE_CALL_EACH, timeout=20) as http:
        yield http


def begin(http: httpx2.Client, url: str) -> dict[str, str]:
    params = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    opened = http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})
    session = {"Mcp-Session-Id": opened.headers["mcp-session-id"], "MCP-Protocol-Version": LEGACY}
    http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
    return session


def calls_at_all_workers(http: httpx2.Client, url: str, session: dict[str, str]) -> set[int]:
    """Call until both workers have served the session; return the statuses."""
    workers: set[str] = set()
    statuses: set[int] = set()
    for _ in range(200):
        answer = http.post(url, json=LIST, headers=session)
        statuses.add(answer.status_code)
        workers.add(answer.headers["x-request-id"][:-10])  # the rest is a count
        if len(workers) == 2:
            return statuses
    raise AssertionError("200 connections reached one worker only")


def test_every_worker_knows_every_session_until_it_ends(twins: Twins, http: httpx2.Client) -> None:
    url = twins.url("twins")
    sessions = [begin(http, url) for _ in range(4)]
    for session in sessions:
        assert calls_at_all_workers(http, url, session) == {200}
    assert http.delete(url, headers=sessions[0]).status_code == 200
    assert calls_at_all_workers(http, url, sessions[0]) == {404}
    assert calls_at_all_workers(http, url, sessions[1]) == {200}


def test_another_account_does_not_find_the_session(twins: Twins, http: httpx2.Client) -> None:
    session = begin(http, twins.url("twins"))
    stranger = {"X-API-Key": twins.gateway.new_key("stranger@example.com")}
    answer = http.post(twins.url("twins"), json=LIST, headers={**session, **stranger})
    assert (answer.status_code, answer.json()["error"]["data"]["code"]) == (404, "SESSION_GONE")


def test_sessions_outlive_the_workers(twins: Twins, http: httpx2.Client) -> None:
    url = twins.url("twins")
    session = begin(http, url)
    twins.gateway.command("reload")
    for _ in range(5_000):
        assert http.post(url, json=LIST, headers=session).status_code == 200
        if "configuration taken" in twins.gateway.log.read_text():
            break
    assert calls_at_all_workers(http, url, session) == {200}
