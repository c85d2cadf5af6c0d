"""The forwarder's tests run on the loop it is made for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import uvloop

from gpuproxy.plugin import Registry
from gpuproxy.proxy.exchange import Exchange

from .harness import Gateway, running


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test here on uvloop."""
    return {"uvloop": uvloop.new_event_loop}


class Serve(Protocol):
    """Starts a gateway with sections of config."""

    async def __call__(self, registry: Registry | None = None, **tree: Any) -> Gateway: ...


@pytest.fixture
async def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serve]:
    """Start one gateway that ends with the test; every exchange it starts is noted."""
    started: list[Exchange] = []
    start_exchange = Exchange.start

    def watched_start(exchange: Exchange) -> None:
        started.append(exchange)
        start_exchange(exchange)

    monkeypatch.setattr(Exchange, "start", watched_start)
    async with AsyncExitStack() as stack:

        async def start(registry: Registry | None = None, **tree: Any) -> Gateway:
            return await stack.enter_async_context(running(tmp_path, started, registry, **tree))

        yield start


@pytest.fixture
async def gateway(serve: Serve) -> Gateway:
    """Run a gateway with the default config."""
    return await serve()
