"""A receiver of webhooks that behaves as its paths say, and remembers what it took."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.test_utils import TestServer


class Taken(NamedTuple):
    """One delivery that arrived, taken or not."""

    path: str
    id: str
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """Serves ``/ok…``, ``/fail{n}…``, ``/hang{n}…``, ``/redirect…``, ``/gone…``, ``/reset…``, ``/huge…``, ``/busy…``,
    which wants nothing for an hour.

    With a number, only the first n tries of each delivery fare so, and the next is taken.
    """

    def __init__(self) -> None:
        self.tried: list[Taken] = []
        self.taken: list[Taken] = []
        self.canary_count = 0
        self.tries: Counter[tuple[str, str]] = Counter()
        self.hanging = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Receiver"]:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._serve)
        app.router.add_get("/{path:.*}", self._canary)
        async with TestServer(app, host="127.0.0.1") as server:
            self.url = str(server.make_url("")).rstrip("/")
            yield self

    def of(self, path: str) -> list[Taken]:
        return [each for each in self.taken if each.path == path]

    def is_due(self, path: str, event_id: str, tries: int = 0) -> bool:
        """Tell whether the next try of a delivery fares as its path says; -1: the one that is counted already."""
        _, times = _behaviour(path)
        return not times or self.tries[path, event_id] + tries < int(times)

    async def _canary(self, request: web.Request) -> web.Response:
        self.canary_count += 1
        return web.Response()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        taken = Taken(request.path, headers["webhook-id"], headers, await request.read())
        self.tried.append(taken)
        self.tries[taken.path, taken.id] += 1
        name, _ = _behaviour(taken.path)
        if self.is_due(taken.path, taken.id, -1) and (refusal := await self._refusal(request, name)) is not None:
            return refusal
        self.taken.append(taken)
        return web.Response(status=204)

    async def _refusal(self, request: web.Request, name: str) -> web.StreamResponse | None:
        if name == "fail":
            return web.Response(status=500, text="no")
        if name == "busy":
            return web.Response(status=503, headers={"Retry-After": "3600"})
        if name == "gone":
            return web.Response(status=410)
        if name == "redirect":
            return web.Response(status=307, headers={"Location": f"{self.url}/canary"})
        if name == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        if name == "hang":
            self.hanging += 1
            try:
                await asyncio.sleep(60)
            finally:
                self.hanging -= 1
            return web.Response(status=500)
        if name == "huge":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(1_000):
                await response.write(b"x" * 65_536)
            return response
        return None


def _behaviour(path: str) -> tuple[str, str]:
    """Return what a path says: how tries fare, and how many of each delivery, "" for all."""
    behaviour = path.strip("/").split("-")[0]
    name = behaviour.rstrip("0123456789")
    return name, behaviour[len(name) :]
