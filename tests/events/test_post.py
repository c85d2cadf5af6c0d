"""One post: what is told of a receiver that cannot be spoken to, and what names that hang hold up."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from clients.tls import Authority

from gpuproxy import resolver
from gpuproxy.events.post import RESOLVER_THREADS, Bounds, Poster
from gpuproxy.guard import Guard

WAIT_S = 20.0


@asynccontextmanager
async def posting(ca_file: str = "", dns_s: float = WAIT_S) -> AsyncIterator[Poster]:
    poster = Poster(Bounds(WAIT_S, WAIT_S, dns_s, {}, Guard(("127.0.0.0/8",)), ca_file))
    yield poster
    poster.close()


@asynccontextmanager
async def receiver(context: ssl.SSLContext | None) -> AsyncIterator[str]:
    """Serve by TLS with a context, without it plainly; yield its port."""

    async def take(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    server = TestServer(app, host="127.0.0.1", scheme="https" if context else "http")
    await server.start_server(ssl=context)
    try:
        yield str(server.port)
    finally:
        await server.close()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda authority: authority.context("localhost"), ""),
        (lambda authority: authority.context("example.com"), "its certificate is not believed: Hostname mismatch"),
        (lambda authority: authority.stranger, "its certificate is not believed: unable to get local issuer"),
        (lambda authority: None, "TLS failed: wrong version number"),
    ],
    ids=["well", "of another name", "of another authority", "plain"],
)
async def test_why_tls_fails_is_told(
    tmp_path: Path, make: Callable[[Authority], ssl.SSLContext | None], told: str
) -> None:
    authority = Authority(tmp_path)
    (tmp_path / "other").mkdir()
    authority.stranger = Authority(tmp_path / "other").context("localhost")  # type: ignore[attr-defined]
    async with receiver(make(authority)) as port, posting(str(authority.ca_file)) as poster:
        outcome = await poster.post(f"https://localhost:{port}/", {}, b"{}")
        assert (outcome.error[: len(told)], outcome.status) == (told, 0 if told else 200)


async def test_a_receiver_that_ends_the_handshake_is_told_from_one_that_is_not_there() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with posting() as poster:
        assert (
            await poster.post(f"https://localhost:{port}/", {}, b"{}")
        ).error == "TLS failed: it ended the handshake"
        server.close()
        assert (await poster.post(f"https://localhost:{port}/", {}, b"{}")).error == "no connection could be made"


async def test_a_name_that_hangs_holds_one_thread_however_often_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end, asked = threading.Event(), []

    def look_up(host: str) -> list[str]:
        asked.append(host)
        if host.startswith("hangs"):
            end.wait(WAIT_S)
        return ["127.0.0.1"]

    monkeypatch.setattr(resolver, "look_up", look_up)
    try:
        async with receiver(None) as port, posting(dns_s=0.05) as poster:
            urls = [f"http://hangs-{n % 3}.example:{port}/" for n in range(2 * RESOLVER_THREADS)]
            for outcome in await asyncio.gather(*(poster.post(url, {}, b"{}") for url in urls)):
                assert "was not resolved in time" in outcome.error
            assert len(asked) == 3
        async with receiver(None) as port, posting() as poster:
            outcomes = await asyncio.gather(*(poster.post(f"http://fine.example:{port}/", {}, b"{}") for _ in range(3)))
            assert [outcome.status for outcome in outcomes] == [200] * 3
            await poster.post(f"http://fine.example:{port}/", {}, b"{}")
            assert asked.count("fine.example") == 2  # each is asked for anew
    finally:
        end.set()
