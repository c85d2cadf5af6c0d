"""The servers, the gateway before them, and the ways to reach a model: directly and through the gateway."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from .servers import LoopThread, serve_aiohttp
from .upstreams import SECRET, ModelServer

START_S = 20.0


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
