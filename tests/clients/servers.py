"""Servers in threads of their own, so that synchronous and asynchronous clients can be tested alike."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from aiohttp import web

START_S = 10.0


class LoopThread:
    """An event loop in a thread that enters one async context manager and leaves it when told."""

    def __init__(self, open_server: Callable[[], AbstractAsyncContextManager[int]]) -> None:
        self._open = open_server
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._failure: BaseException | None = None
        self.loop: asyncio.AbstractEventLoop
        self.port = 0

    async def _main(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._open() as self.port:
                self._ready.set()
                await self._stop.wait()
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run `coroutine` on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(START_S)

    def __enter__(self) -> "LoopThread":
        self._thread.start()
        assert self._ready.wait(START_S), "the server did not start"
        self._raise_failure()
        return self

    def __exit__(self, *args: object) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@asynccontextmanager
async def _aiohttp_server(app: web.Application, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def serve_aiohttp(app: web.Application, tls: ssl.SSLContext | None = None) -> LoopThread:
    """Return a context manager that serves an aiohttp application on a free port."""
    return LoopThread(lambda: _aiohttp_server(app, tls))


@asynccontextmanager
async def _uvicorn_server(app: Any, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    factory = None if tls is None else lambda config, default: tls
    config = uvicorn.Config(
        app,
        log_level="error",
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=1,
        ssl_context_factory=factory,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.ensure_future(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        listener.close()


def serve_asgi(app: Any, tls: ssl.SSLContext | None = None) -> LoopThread:
    """Return a context manager that serves an ASGI application on a free port."""
    return LoopThread(lambda: _uvicorn_server(app, tls))


@contextmanager
def serving(server: LoopThread) -> Iterator[str]:
    """Run `server` and yield its base URL (http)."""
    with server:
        yield f"http://127.0.0.1:{server.port}"
