"""The guide's WebSocket sample in a browser, as it is printed but for the port, from a page of another origin."""

import asyncio
import json
from pathlib import Path

import pytest
import requests
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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
async def test_a_page_of_the_gateway_logs_in_and_hears_of_its_account(tmp_path: Path) -> None:
    """No script sees the cookie; the browser shows it to /ws by itself."""
    person = {"email": "ann@example.com", "password": "correct horse battery"}
    script = f"""(async () => {{
        const body = JSON.stringify({json.dumps({**person, "cookie": True})});
        const answer = await fetch('/api/v1/auth/login', {{method: 'POST', body}});
        console.log('status', answer.status, 'cookie', '[' + document.cookie + ']');
        const ws = new WebSocket('ws://' + location.host + '/ws');
        ws.onopen = () => ws.send(JSON.stringify({{type: 'subscribe', channels: ['billing_events']}}));
        ws.onmessage = (message) => console.log(message.data);
    }})()"""
    with running_gateway(tmp_path, "", {}) as gateway:
        requests.post(f"{gateway.url}/api/v1/auth/register", json=person, timeout=WAIT_S).raise_for_status()
        async with asyncio.timeout(WAIT_S), browsing(tmp_path / "profile") as page:
            await page.open(f"{gateway.url}/health")
            await page.until_loaded()
            await page.run(script)
            await page.until('"type":"subscribed"')
            gateway.command("credits", "add", "ann@example.com", "5")
            said = await page.until("credits_added")
    assert said[0] == "status 200 cookie []"
    assert '"amount":5.0' in said[-1]
