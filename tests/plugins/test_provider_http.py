"""Calls to a provider's API: spaced, sent once, bounded, without showing the credential."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from gpuproxy_plugins import provider_http
from gpuproxy_plugins.provider_http import ProviderHttp, Spacing
from gpuproxy_plugins.vast import Vast

from gpuproxy.plugin import InvalidAnswer, ProviderError, ProviderSettings, ProviderUnavailable, RateLimited

Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]
SECRET = "hunter2-secret"


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve with one handler."""
    servers = []

    async def start(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", handler)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        return str(server.make_url("")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


def client(url: str, timeout_s: float = 20.0) -> ProviderHttp:
    """Return a client with a credential."""
    settings = ProviderSettings(api_key=SECRET, timeout_s=timeout_s)
    return ProviderHttp("moon.gpu", url, {"X-Key": SECRET}, settings)


def test_calls_of_one_kind_take_turns_and_others_need_not_wait() -> None:
    now = [100.0]
    spacing = Spacing({"search": 6.0}, lambda: now[0])
    assert [spacing.take("search", 30.0) for _ in range(3)] == [(True, 0.0), (True, 6.0), (True, 12.0)]
    assert spacing.take("list", 30.0) == (True, 0.0)
    now[0] += 20.0
    assert spacing.take("search", 30.0) == (True, 0.0)


def test_a_turn_that_is_too_far_away_is_not_taken() -> None:
    now = [100.0]
    spacing = Spacing({"search": 6.0}, lambda: now[0])
    spacing.hold("search", 3_600.0)
    assert spacing.take("search", 30.0) == (False, 3_600.0)
    now[0] += 3_590.0
    assert spacing.take("search", 30.0) == (True, 10.0)


async def test_a_call_that_would_wait_too_long_is_refused() -> None:
    spacing, http = Spacing({}), client("http://127.0.0.1:9", timeout_s=5.0)
    spacing.hold("create", 100.0)
    with pytest.raises(RateLimited, match="come back then") as raised:
        await http.wait_turn(spacing, "create", "create")
    assert not raised.value.may_have_worked
    assert raised.value.retry_after_s == pytest.approx(100.0, abs=1.0)


async def test_a_put_is_sent_once_even_if_the_server_closes_on_it(serve: Serve) -> None:
    seen = []

    async def drop_the_second(request: web.Request) -> web.Response:
        seen.append(request.method)
        if len(seen) > 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(text="{}")

    http = client(await serve(drop_the_second))
    await http.call("create", "PUT", "/a", body={})
    with pytest.raises(ProviderUnavailable) as raised:
        await http.call("create", "PUT", "/a", body={})
    assert raised.value.may_have_worked
    assert seen == ["PUT", "PUT"]
    await http.close()


async def test_a_server_that_is_not_there_has_done_nothing() -> None:
    http = client("http://127.0.0.1:1")
    with pytest.raises(ProviderUnavailable, match=r"moon\.gpu: no connection to http://127\.0\.0\.1:1") as raised:
        await http.call("create", "PUT", "/a", body={})
    assert not raised.value.may_have_worked
    assert raised.value.is_retryable
    await http.close()


async def test_a_redirect_is_not_followed(serve: Serve) -> None:
    seen = []

    async def redirect(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    http = client(await serve(redirect))
    answer = await http.call("read", "GET", "/a")
    assert (answer.status, seen) == (302, ["/a"])
    await http.close()


async def test_an_endless_answer_is_cut(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_http, "ANSWER_BYTES_MAX", 1_000)

    async def talk(_request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1_001)

    http = client(await serve(talk))
    with pytest.raises(InvalidAnswer, match="over 1000 bytes"):
        await http.call("read", "GET", "/a")
    await http.close()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "javascript:1", "", "http://", "http://a b/"])
async def test_only_web_addresses_are_fetched(url: str) -> None:
    http = client("http://127.0.0.1:1")
    with pytest.raises(ProviderError):
        await http.fetch("logs", url)
    await http.close()


async def test_a_credential_is_neither_logged_nor_shown(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def echo(request: web.Request) -> web.Response:
        said = f"you sent {request.headers['Authorization']}\x1b[31m"
        return web.json_response({"success": False, "error": "failed", "msg": said}, status=400)

    caplog.set_level(logging.DEBUG)
    vast = Vast(ProviderSettings(api_key=SECRET, base_url=await serve(echo), spacing_s=0.0))
    said = []
    for call in (vast.list(), vast.get("1"), vast.destroy("1"), vast.check(), vast.charges(0, 1)):
        with pytest.raises(ProviderError) as raised:
            await call
        said.append(f"{raised.value} {raised.value!r} {vars(raised.value)}")
    assert "you sent Bearer ***" in said[0]
    assert SECRET not in " ".join(said)
    assert SECRET not in caplog.text
    assert SECRET not in repr(vars(vast))
    assert "\x1b" not in said[0]
    await vast.close()


def test_workers_do_not_import_an_http_client_because_of_a_provider() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from gpuproxy.plugin import load_plugins;"
        "found = load_plugins(['https', 'simulated', 'vast']).providers;"
        "sys.exit('aiohttp' in sys.modules or len(found) < 2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
