"""The session cookie: what it opens, what ends it, and from where it is heeded."""

from pathlib import Path

import pytest
from aiohttp import WSMsgType

from gpuproxy.access.tokens import COOKIE, Claims, claims_for, read, sign
from gpuproxy.config import Config, build
from gpuproxy.control.events import watch_once
from gpuproxy.control.parts import STREAM
from gpuproxy.errors import ConfigError

from .conftest import KEYRING, PASSWORD, Api, Person

PROFILE = "/api/v1/user/profile"
APP = {"Origin": "https://app.example.com", "Sec-Fetch-Site": "same-site"}
OURS = {"Sec-Fetch-Site": "same-origin"}
HERE = {"Origin": "http://here:1", "X-Forwarded-Host": "here:1"}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: cookies do not depend on the kind."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


def claims_of(person: Person) -> Claims:
    return read(KEYRING, person.access_token)


def cookie_of(person: Person, name: str = "gpuproxy", lifetime_s: float = 60) -> dict[str, str]:
    claims = claims_for(person.id, claims_of(person).sid, lifetime_s, COOKIE)
    return {"Cookie": f"{name}={sign(KEYRING, claims)}"}


async def subscribed(api: Api, headers: dict[str, str]) -> str:
    await api.client.app[STREAM].start()
    async with api.client.ws_connect("/ws", headers=headers) as socket:
        await socket.send_json({"type": "subscribe", "channels": ["billing_events"]})
        return str((await socket.receive_json(timeout=20))["type"])


@pytest.mark.parametrize("ours", [OURS, HERE], ids=["sec-fetch-site", "origin"])
async def test_a_page_of_ours_hears_of_the_account_that_is_signed_in(api: Api, ours: dict[str, str]) -> None:
    ann = await api.person()
    assert await subscribed(api, cookie_of(ann) | ours) == "subscribed"


@pytest.mark.parametrize(
    "theirs",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {**HERE, "Sec-Fetch-Site": "cross-site"},
        {**HERE, "Origin": "http://elsewhere:1"},
        {**HERE, "Origin": "null"},
        {"X-Forwarded-Host": "here:1"},
    ],
    ids=repr,
)
async def test_a_page_of_others_hears_nothing(api: Api, theirs: dict[str, str]) -> None:
    ann = await api.person()
    assert await subscribed(api, cookie_of(ann) | theirs) == "error"


async def test_a_cookie_opens_no_api_and_a_token_is_no_cookie(api: Api) -> None:
    ann = await api.person()
    assert (await api.call("GET", PROFILE, headers=cookie_of(ann) | OURS))[0] == 401
    bearer = cookie_of(ann)["Cookie"].partition("=")[2]
    assert (await api.call("GET", PROFILE, headers={"Authorization": f"Bearer {bearer}"}))[0] == 401
    assert await subscribed(api, {"Cookie": f"gpuproxy={ann.access_token}"} | OURS) == "error"


async def test_a_cookie_over_tls_has_the_name_no_neighbour_can_set(api: Api) -> None:
    ann = await api.person()
    tls = OURS | {"X-Forwarded-Proto": "https"}
    assert await subscribed(api, cookie_of(ann, "__Host-gpuproxy") | tls) == "subscribed"
    assert await subscribed(api, cookie_of(ann) | tls) == "error"
    assert await subscribed(api, cookie_of(ann, "__Host-gpuproxy") | OURS) == "error"


async def test_an_old_cookie_is_none(api: Api) -> None:
    ann = await api.person()
    assert await subscribed(api, cookie_of(ann, lifetime_s=-60) | OURS) == "error"
    assert await subscribed(api, {"Cookie": "gpuproxy=a.b.c"} | OURS) == "error"


async def test_logging_out_ends_what_the_cookie_opened(api: Api) -> None:
    ann = await api.person()
    await api.client.app[STREAM].start()
    async with api.client.ws_connect("/ws", headers=cookie_of(ann) | OURS) as socket:
        await socket.send_json({"type": "subscribe", "channels": ["billing_events"]})
        assert (await socket.receive_json(timeout=20))["type"] == "subscribed"
        status, _ = await api.call("POST", "/api/v1/auth/logout", headers=ann.by_token)
        assert status == 200
        await watch_once(api.client.app)
        assert (await socket.receive_json(timeout=20))["payload"]["code"] == "UNAUTHORIZED"
        assert (await socket.receive(timeout=20)).type is WSMsgType.CLOSE
    assert await subscribed(api, cookie_of(ann) | OURS) == "error"


async def log_in(api: Api, person: Person, headers: dict[str, str], cookie: bool = True) -> tuple[int, str]:
    """Log in; return the status and the cookie that is set."""
    body = {"email": person.email, "password": PASSWORD, "cookie": cookie}
    async with api.client.post("/api/v1/auth/login", json=body, headers=headers) as answer:
        return answer.status, answer.headers.get("Set-Cookie", "")


async def test_a_page_that_logs_in_gets_a_cookie_when_it_wants_one(api: Api) -> None:
    ann = await api.person()
    status, cookie = await log_in(api, ann, OURS)
    assert status == 200
    assert all(word in cookie for word in ("gpuproxy=", "HttpOnly", "SameSite=Lax", "Path=/"))
    assert await log_in(api, ann, OURS, cookie=False) == (200, "")
    assert await subscribed(api, {"Cookie": cookie.partition(";")[0]} | OURS) == "subscribed"


async def test_a_page_of_others_cannot_log_a_visitor_in(api: Api) -> None:
    ann = await api.person()
    for theirs in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere:1"}, {}):
        assert await log_in(api, ann, theirs) == (403, "")


class TestWithAnotherPage:
    """The configuration names another page."""

    @pytest.fixture
    async def settings(self) -> Config:
        return build({"rates": {"requests_per_minute": 0}, "auth": {"cookie_origins": ["https://app.example.com"]}})

    async def test_it_may_use_the_cookie_and_no_other_may(self, api: Api) -> None:
        ann = await api.person()
        status, cookie = await log_in(api, ann, APP)
        assert (status, bool(cookie)) == (200, True)
        assert await subscribed(api, cookie_of(ann) | APP) == "subscribed"
        assert await subscribed(api, cookie_of(ann) | APP | {"Origin": "https://x.example.com"}) == "error"


@pytest.mark.parametrize("origin", ["*", "https://app.example.com/", "app.example.com", "https://App.example.com"])
def test_what_browsers_would_not_send_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="no origin of a page"):
        build({"auth": {"cookie_origins": [origin]}})
