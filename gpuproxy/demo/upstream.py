"""The inference server inside ``gpuproxy demo``: OpenAI shapes, Open Inference (V2) and MCP on one port.

It stands in for the GPUs, so that the gateway in front of it can be tried on any machine; it brings its words
one by one, with a model's pauses, and counts tokens rightly.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from gpuproxy.demo.mcp import McpServer
from gpuproxy.demo.openai import CHAT, EMBED, OpenAi
from gpuproxy.demo.openinference import IRIS, OpenInference
from gpuproxy.demo.wire import tell_refusals

MODELS = (CHAT, EMBED, IRIS)
TOKEN_DELAY_S = 0.03
BODY_BYTES_MAX = 4 << 20


def application(token_delay_s: float = TOKEN_DELAY_S) -> web.Application:
    """Return the server's application; `token_delay_s` is the mean pause before a token."""
    app = web.Application(middlewares=[tell_refusals], client_max_size=BODY_BYTES_MAX)
    for side in (OpenAi(token_delay_s), OpenInference(token_delay_s), McpServer()):
        app.add_routes(side.routes())
    return app


@contextmanager
def running(token_delay_s: float = TOKEN_DELAY_S) -> Iterator[str]:
    """Serve on a free loopback port in a thread of its own; yields the base URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application(token_delay_s), shutdown_timeout=0.1)
    thread = threading.Thread(target=loop.run_forever, name="demo-upstream", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(_start(runner), loop).result(timeout=10)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


async def _start(runner: web.AppRunner) -> str:
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"
