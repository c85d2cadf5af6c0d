"""The forwarder's tests run on the loop it is made for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gpuproxy.plugin import Registry
from gpuproxy.proxy.exchange import Exchange

from .harness import Gateway, running
from .wire import Listener


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test here on uvloop."""
    return {"uvloop": uvloop.new_event_loop}


class Serve:
    """Starts a gateway with sections of config; `last` is the one started last."""

    def __init__(self, stack: AsyncExitStack, directory: Path, started: list[Exchange]) -> None:
        self.last: Gateway | None = None
        self._stack = stack
        self._directory = directory
        self._started = started

    async def __call__(self, registry: Registry | None = None, **tree: Any) -> Gateway:
        """Start the test's gateway; it ends with the test."""
        self.last = await self._stack.enter_async_context(running(self._directory, self._started, registry, **tree))
        return self.last


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
        yield Serve(stack, tmp_path, started)


@pytest.fixture
async def gateway(serve: Serve) -> Gateway:
    """Run a gateway with the default config."""
    return await serve()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Listener, Listener]]:
    """Two scripted upstreams."""
    listeners = Listener(), Listener()
    yield listeners
    for listener in listeners:
        listener.close()
