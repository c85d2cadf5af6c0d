"""Where the gateway is for who calls: by its own address, behind one proxy and behind two, and with a public URL."""

from pathlib import Path
from typing import Any

import pytest

from gpuproxy.config import Config, build

from .conftest import PASSWORD, Api

SIGN_IN = "/dashboard/sign-in"
TWO_PROXIES = {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "gw.example.com, inner:8080"}
NAMED = {"server": {"public_url": "https://gw.example.com"}}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: where the gateway is does not depend on the kind."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def settings(request: pytest.FixtureRequest) -> Config:
    """Return the configuration."""
    marked = request.node.get_closest_marker("parametrize")
    tree: dict[str, Any] = request.getfixturevalue("tree") if marked and "tree" in marked.args[0] else {}
    return build({"rates": {"requests_per_minute": 0}, **tree})


async def sign_in(api: Api, headers: dict[str, str]) -> tuple[int, str]:
    """Send the form; return the status and the cookie that is set."""
    form = {"email": (await api.person()).email, "password": PASSWORD}
    async with api.client.post(SIGN_IN, data=form, headers=headers, allow_redirects=False) as answer:
        return answer.status, answer.headers.get("Set-Cookie", "")


async def test_behind_two_proxies_the_one_at_the_client_counts(api: Api) -> None:
    status, cookie = await sign_in(api, TWO_PROXIES | {"Origin": "https://gw.example.com"})
    assert (status, cookie.partition("=")[0]) == (303, "__Host-gpuproxy")
    for theirs in ("https://inner:8080", "https://elsewhere.example", "https://gw.example.com, inner:8080"):
        assert await sign_in(api, TWO_PROXIES | {"Origin": theirs}) == (403, "")
    async with api.client.get("/", headers=TWO_PROXIES | {"Accept": "text/html"}) as answer:
        assert "https://gw.example.com/api/v1/gpu/proxy/v1" in await answer.text()


@pytest.mark.parametrize("host", ["gw.example.com:80", "GW.example.com"])
async def test_a_proxy_may_write_the_standing_port_and_any_case(api: Api, host: str) -> None:
    assert (await sign_in(api, {"X-Forwarded-Host": host, "Origin": "http://gw.example.com"}))[0] == 303


@pytest.mark.parametrize("origin", ["http://[::1", "http://", "://", "null", "x", ""])
async def test_an_origin_that_is_none_is_refused(api: Api, origin: str) -> None:
    assert (await sign_in(api, {"Origin": origin}))[0] == 403


@pytest.mark.parametrize("tree", [NAMED], ids=["public_url"])
async def test_the_public_url_is_shown_and_its_pages_are_ours(api: Api, tree: dict[str, Any]) -> None:
    rewritten = {"X-Forwarded-Host": "inner:8080"}  # what a proxy calls that says nothing of what it was called
    async with api.client.get("/", headers=rewritten | {"Accept": "text/html"}) as answer:
        assert "https://gw.example.com/api/v1/gpu/proxy/v1" in await answer.text()
    assert (await sign_in(api, rewritten | {"Origin": "https://gw.example.com"}))[0] == 303
    assert (await sign_in(api, rewritten | {"Origin": "http://inner:8080"}))[0] == 303  # past the proxy
    assert (await sign_in(api, rewritten | {"Origin": "http://gw.example.com"}))[0] == 403


@pytest.mark.parametrize("tree", [NAMED], ids=["public_url"])
async def test_the_cookie_is_secure_where_the_public_url_is_called(api: Api, tree: dict[str, Any]) -> None:
    for host, name in (("gw.example.com", "__Host-gpuproxy"), ("inner:8080", "gpuproxy")):
        headers = {"X-Forwarded-Host": host, "X-Forwarded-Proto": "http", "Sec-Fetch-Site": "same-origin"}
        _, cookie = await sign_in(api, headers)
        assert (cookie.partition("=")[0], "Secure" in cookie) == (name, name.startswith("__Host"))
