"""A real browser without a window, led over its DevTools protocol: opens a page and tells what the page logs."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
START_S = STOP_S = 30.0
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self._is_loaded = False
        self.said: list[str] = []

    async def open(self, url: str) -> None:
        """Open a new page and listen to what it logs."""
        target = await self._do("Target.createTarget", url="about:blank")
        attached = await self._do("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        await self._do("Runtime.enable")
        await self._do("Page.enable")
        await self._do("Page.navigate", url=url)

    async def until_loaded(self) -> None:
        """Wait until the page is there."""
        while not self._is_loaded:
            self._note(await self._socket.receive_json())

    async def run(self, script: str) -> None:
        """Run a script in the page; what it waits for is not waited for."""
        await self._do("Runtime.evaluate", expression=script)

    async def until(self, word: str) -> list[str]:
        """Return all that the page has logged once a line with `word` is among it."""
        while not any(word in line for line in self.said):
            self._note(await self._socket.receive_json())
        return self.said

    async def _do(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **self._session})
        while (told := await self._socket.receive_json()).get("id") != number:
            self._note(told)
        assert "result" in told, told
        return told["result"]

    def _note(self, told: Any) -> None:
        if told.get("method") == "Runtime.consoleAPICalled":
            self.said.append(" ".join(map(_text, told["params"]["args"])))
        elif told.get("method") == "Page.loadEventFired":
            self._is_loaded = True
        elif told.get("method") == "Runtime.exceptionThrown":
            self.said.append(f"exception: {told['params']['exceptionDetails']['text']}")


def _text(argument: Any) -> str:
    if "preview" in argument:
        return ", ".join(f"{each['name']}: {each.get('value')}" for each in argument["preview"]["properties"])
    return str(argument.get("value", argument.get("description", "")))


@asynccontextmanager
async def browsing(directory: Path) -> AsyncIterator[Page]:
    """Run a browser with an empty profile in `directory`, and end it."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER, *OPTIONS, f"--user-data-dir={directory}", "about:blank",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(START_S):
            url = await _devtools(process)
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            yield Page(socket)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()


async def _devtools(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode(errors="replace"):
        if "DevTools listening on " in line:
            return line.rpartition(" ")[2].strip()
    raise AssertionError(f"the browser ended with {await process.wait()}")
