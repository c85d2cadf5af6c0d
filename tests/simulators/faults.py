"""Faults that a simulator commits on demand, and what it was asked.

A fault is for one operation ("create", "list", …) and so many calls. Some answer in place of the work, some spoil the
answer after it, some do the work wrongly; those the simulator itself understands.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

HTML = "<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fault:
    """So many calls of one operation go wrong in one way."""

    operation: str
    kind: str
    times: int = 1


@dataclass
class Asked:
    """One request as it came in."""

    operation: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any = None


@dataclass
class Faults:
    """The faults still to be committed, and all that was asked."""

    waiting: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def add(self, operation: str, kind: str, times: int = 1) -> None:
        """Commit a fault the next `times` times."""
        self.waiting.append(Fault(operation, kind, times))

    def take(self, operation: str, *kinds: str) -> str | None:
        """Use up and return the next fault for this operation, if it is one of `kinds` (none: any)."""
        for fault in self.waiting:
            if fault.operation == operation and fault.times and (not kinds or fault.kind in kinds):
                fault.times -= 1
                return fault.kind
        return None

    def count(self, operation: str) -> int:
        """Return how many calls of an operation came in."""
        return sum(1 for asked in self.asked if asked.operation == operation)


def html(status: int) -> web.Response:
    """Return what a proxy in front of the API says when that is down."""
    return web.Response(status=status, text=HTML, content_type="text/html")


async def spoil(kind: str, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Commit the faults every HTTP server can commit; others return the handler's answer."""
    if kind == "drop_before":
        return drop(request)
    if kind.startswith("html_") and kind != "html_after":
        return html(int(kind.removeprefix("html_")))
    if kind == "garbage":
        return web.Response(body=b'{"success": tru', headers={"Content-Type": "application/json"})
    if kind == "list_for_object":
        return web.Response(body=b"[]", headers={"Content-Type": "application/json"})
    answer = await handler(request)
    if kind == "drop_after":
        return drop(request)
    if kind == "hang_after":
        await asyncio.sleep(3_600)
    if kind == "html_after":
        return html(504)
    return answer


def drop(request: web.Request) -> web.Response:
    """Break the connection off without a word."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
