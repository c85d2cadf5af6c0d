"""A session that one node began goes on at another, and over a restart: nodes share the secret, and nothing else."""

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from clients.gateway import toml_table
from clients.mcp_server import ToolServer
from clients.servers import serve_asgi
from cluster import Cluster, cluster
from gateways import Gateway, Origin, running

SECRET = "GPUPROXY_TEST_SECRET"
VERSION = "2025-11-25"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Cluster]:
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv(SECRET, "s" * 32)
        ports = [stack.enter_context(serve_asgi(ToolServer(name).app())).port for name in ("first", "second")]
        urls = [f"http://127.0.0.1:{port}/mcp" for port in ports]
        tail = toml_table("[[upstreams]]", {"name": "twins", "protocol": "mcp", "urls": urls})
        auth = {"jwt_secret_env": SECRET}
        yield stack.enter_context(cluster(tmp_path_factory.mktemp("nodes"), origin, tail, auth=auth))


def post(gateway: Gateway, body: object, **session: str) -> httpx.Response:
    headers = {"X-API-Key": gateway.place.key, "Accept": "application/json, text/event-stream", **session}
    return httpx.post(f"http://127.0.0.1:{gateway.port}/api/v1/gpu/proxy/mcp/twins", json=body, headers=headers)


def begin(gateway: Gateway) -> dict[str, str]:
    params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    opened = post(gateway, {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})
    session = {"Mcp-Session-Id": opened.headers["mcp-session-id"], "MCP-Protocol-Version": VERSION}
    assert post(gateway, {"jsonrpc": "2.0", "method": "notifications/initialized"}, **session).status_code == 202
    return session


def who(gateway: Gateway, session: dict[str, str]) -> str:
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "who", "arguments": {}}}
    answer = post(gateway, call, **session)
    assert answer.status_code == 200, answer.text
    return next(name for name in ("first", "second") if name in answer.text)


def test_a_session_goes_on_at_any_node(nodes: Cluster) -> None:
    sessions = [begin(nodes.gateways[0]) for _ in range(4)]
    met = [{who(gateway, session) for gateway in nodes.gateways for _ in range(2)} for session in sessions]
    assert all(len(each) == 1 for each in met), met
    assert set().union(*met) == {"first", "second"}


def test_a_session_outlives_its_node(nodes: Cluster) -> None:
    session = begin(nodes.gateways[0])
    before = who(nodes.gateways[0], session)
    assert nodes.gateways[0].stop() == 0
    assert who(nodes.gateways[1], session) == before
    with running(nodes.gateways[0].place) as again:
        assert who(again, session) == before
