"""The guide's WebSocket sample in a browser, as it is printed but for the port, from a page of another origin."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from .browser import BROWSER, browsing
from .gateway import running_gateway
from .guide import filled, sample
from .servers import serve_aiohttp
from .test_websocket_sample import happen

WAIT_S = 60.0


def page_with(script: str) -> web.Application:
    async def serve(_request: web.Request) -> web.Response:
        return web.Response(text=f"<!doctype html><script>{script}</script>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", serve)
    return app


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
async def test_the_websocket_sample_of_the_guide_runs_in_a_browser(tmp_path: Path) -> None:
    with running_gateway(tmp_path, "", {}) as gateway:
        code = filled(sample("WebSocket Streaming"), gateway.url.removeprefix("http://"))
        with serve_aiohttp(page_with(code)) as page_server:
            async with asyncio.timeout(WAIT_S), browsing(tmp_path / "profile") as page:
                await page.open(f"http://127.0.0.1:{page_server.port}/")
                await page.until("subscribed")
                await happen(tmp_path, "gpu.available", {"provider": "vast.ai"})
                said = await page.until("gpu_available")
    assert any(line.startswith("Event: error") and "billing_events is private" in line for line in said)
    assert "Event: gpu_available provider: vast.ai" in said
