"""One server's stream in that of a group."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from gpuproxy.control import mcp_listen
from gpuproxy.control.mcp_listen import TAKEN_TRIES_MAX, Source

Serve = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]


@pytest.mark.parametrize(("conflict_count", "is_open"), [(TAKEN_TRIES_MAX - 1, True), (TAKEN_TRIES_MAX, False)])
async def test_a_server_is_asked_again_until_it_has_seen_the_last_stream_go(
    aiohttp_client: Serve, monkeypatch: pytest.MonkeyPatch, conflict_count: int, is_open: bool
) -> None:
    monkeypatch.setattr(mcp_listen, "LOOK_S", 0)
    statuses = [409] * conflict_count + [200]

    async def listen(request: web.Request) -> web.Response:
        return web.Response(status=statuses.pop(0), text="data: {}\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_get("/", listen)
    client = await aiohttp_client(app)
    async with AsyncExitStack() as stack:
        source = await Source("web").open(stack, partial(client.session.get, client.make_url("/")), 10, False)
        assert (source.is_open, source.told.status) == (is_open, 200 if is_open else 409)
        assert not is_open or await source.next_event() == b"data: {}\n\n"
