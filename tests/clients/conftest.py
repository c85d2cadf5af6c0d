"""The servers, the gateway before them, and the ways to reach a model: directly and through the gateway."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pytest

from .files import FileServer
from .gateway import Gateway, running_gateway, toml_table, upstream
from .inference import MODELS as NATIVE_MODELS
from .inference import InferenceServer
from .mcp_server import ToolServer
from .servers import LoopThread, serve_aiohttp, serve_asgi
from .tls import Authority
from .upstreams import MODELS, SECRET, ModelServer


class Files(NamedTuple):
    """The file server and the thread it runs in."""

    server: FileServer
    thread: LoopThread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.thread.port}"


class Way(NamedTuple):
    """How a client reaches the models: the URL it is given and the key it holds."""

    name: str
    url: str
    key: str


class Models(NamedTuple):
    """The model server and the thread it runs in."""

    server: ModelServer
    thread: LoopThread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.thread.port}"


@pytest.fixture(scope="session")
def models() -> Iterator[Models]:
    server = ModelServer()
    with serve_aiohttp(server.app) as thread:
        yield Models(server, thread)


@pytest.fixture(params=["direct", "gateway"])
def way(request: pytest.FixtureRequest, models: Models) -> Way:
    if request.param == "direct":
        return Way("direct", models.url, SECRET)
    gateway = request.getfixturevalue("gateway")
    return Way("gateway", f"{gateway.url}/api/v1/gpu/proxy", gateway.key)


class Tools(NamedTuple):
    """A tool server in each of its four forms, and the port of each."""

    servers: dict[str, ToolServer]
    ports: dict[str, int]

    def url(self, name: str) -> str:
        """Return the address of one form: its MCP endpoint, or for the old form the server itself."""
        return f"http://127.0.0.1:{self.ports[name]}" + ("" if name == "sse" else "/mcp")


@pytest.fixture(scope="session")
def tools() -> Iterator[Tools]:
    forms: dict[str, Callable[[ToolServer], Any]] = {
        "tools": ToolServer.app,
        "stateless": partial(ToolServer.app, stateless_http=True),
        "resumable": ToolServer.resumable_app,
        "sse": ToolServer.sse_app,
    }
    with ExitStack() as stack:
        servers = {name: ToolServer() for name in forms}
        threads = {name: stack.enter_context(serve_asgi(form(servers[name]))) for name, form in forms.items()}
        yield Tools(servers, {name: thread.port for name, thread in threads.items()})


class ToolWay(NamedTuple):
    """How a client reaches the MCP servers."""

    key: str
    urls: dict[str, str]


@pytest.fixture(params=["direct", "gateway"])
def tool_way(request: pytest.FixtureRequest, tools: Tools) -> ToolWay:
    if request.param == "direct":
        return ToolWay("none", {name: tools.url(name) for name in tools.ports})
    gateway = request.getfixturevalue("gateway")
    return ToolWay(gateway.key, {name: f"{gateway.url}/api/v1/gpu/proxy/mcp/{name}" for name in tools.ports})


@pytest.fixture(params=["direct", "gateway"])
def sse_way(request: pytest.FixtureRequest, tools: Tools) -> Way:
    if request.param == "direct":
        return Way("direct", f"http://127.0.0.1:{tools.ports['sse']}/sse", "none")
    gateway = request.getfixturevalue("gateway")
    return Way("gateway", f"{gateway.url}/api/v1/gpu/proxy/mcp/sse/sse", gateway.key)


@pytest.fixture(scope="session")
def files() -> Iterator[Files]:
    server = FileServer()
    with serve_aiohttp(server.app) as thread:
        yield Files(server, thread)


@pytest.fixture(params=["direct", "gateway"])
def file_way(request: pytest.FixtureRequest, files: Files) -> Way:
    if request.param == "direct":
        return Way("direct", files.url, "none")
    gateway = request.getfixturevalue("gateway")
    return Way("gateway", f"{gateway.url}/api/v1/gpu/proxy/upstreams/files", gateway.key)


class Native(NamedTuple):
    """The server of the other shapes of inference and the thread it runs in."""

    server: InferenceServer
    thread: LoopThread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.thread.port}"


@pytest.fixture(scope="session")
def native() -> Iterator[Native]:
    server = InferenceServer()
    with serve_aiohttp(server.app) as thread:
        yield Native(server, thread)


@pytest.fixture(params=["direct", "gateway"])
def native_way(request: pytest.FixtureRequest, native: Native) -> Way:
    if request.param == "direct":
        return Way("direct", native.url, "none")
    gateway = request.getfixturevalue("gateway")
    return Way("gateway", f"{gateway.url}/api/v1/gpu/proxy", gateway.key)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def example_hosts(authority: Authority) -> Iterator[dict[str, int]]:
    """The hosts the integration guide calls, over TLS on loopback: name to port."""
    inference = ModelServer(key="", models=("gpt-4",))
    servers = {
        "api.example.com": partial(serve_aiohttp, FileServer().app),
        "mcp.example.com": partial(serve_asgi, ToolServer().app()),
        "inference.example.com": partial(serve_aiohttp, inference.app),
    }
    with ExitStack() as stack:
        yield {host: stack.enter_context(serve(authority.context(host))).port for host, serve in servers.items()}


@pytest.fixture(scope="session")
def dead_port() -> Iterator[int]:
    """A port nobody listens on: bound, so that nobody can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(scope="session")
def gateway(
    tmp_path_factory: pytest.TempPathFactory,
    models: Models,
    tools: Tools,
    files: Files,
    native: Native,
    authority: Authority,
    example_hosts: dict[str, int],
    dead_port: int,
) -> Iterator[Gateway]:
    upstreams = [
        upstream("llm", "openinference", models.url, models=MODELS, api_key_env="LLM_KEY"),
        upstream("native", "openinference", native.url, models=NATIVE_MODELS),
        upstream("files", "https", files.url),
        upstream("nobody", "https", f"http://127.0.0.1:{dead_port}"),
        *(upstream(name, "mcp", tools.url(name)) for name in tools.ports),
    ]
    connect_to = {f"{host}:443": f"127.0.0.1:{port}" for host, port in example_hosts.items()}
    connect_to["other.example.com:443"] = connect_to["api.example.com:443"]
    egress = toml_table("[egress]", {"allow": ["127.0.0.0/8"], "ca_file": str(authority.ca_file)})
    settings = egress + toml_table("[egress.connect_to]", connect_to) + "".join(upstreams)
    with running_gateway(tmp_path_factory.mktemp("gateway"), settings, {"LLM_KEY": SECRET}) as gateway:
        yield gateway
