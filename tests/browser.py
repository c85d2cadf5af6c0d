"""A headless Chromium, driven over the DevTools protocol as far as a test needs it."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
START_S, ANSWER_S = 40.0, 20.0


def find_browser() -> str | None:
    """Return where a Chromium is; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """An open tab. `problems` are what the page's console complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)

    async def command(self, method: str, **params: Any) -> Any:
        """Send a command and return what it gives."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            told = json.loads(await self._socket.receive_str(timeout=ANSWER_S))
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.problems.append(json.dumps(told["params"])[:500])
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page; of a promise, what it becomes."""
        told = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str) -> Any:
        """Return the value of an expression once it is true, also over the change to another page."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                told = await self.command("Runtime.evaluate", expression=script, returnByValue=True)
                if value := told["result"].get("value"):
                    return value
                await asyncio.sleep(0.02)

    async def go(self, url: str) -> None:
        """Open a page and wait until it is there."""
        await self.command("Page.navigate", url=url)
        await self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    async def picture(self, path: Path) -> None:
        """Write what the tab shows, in full height, as PNG."""
        told = await self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))


@asynccontextmanager
async def tab(browser: str, profile: Path) -> AsyncIterator[Tab]:
    """Start a browser with a profile of its own and yield its tab."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                url = next(each["webSocketDebuggerUrl"] for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(url, max_msg_size=1 << 26) as socket:
                opened = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await opened.command(f"{domain}.enable")
                yield opened
    finally:
        process.terminate()
        process.wait(timeout=ANSWER_S)


async def _port(path: Path, process: "subprocess.Popen[bytes]") -> str:
    async with asyncio.timeout(START_S):
        while not (path.exists() and path.read_text().count("\n")):
            assert process.poll() is None, "the browser ended"
            await asyncio.sleep(0.05)
    return path.read_text().split()[0]
