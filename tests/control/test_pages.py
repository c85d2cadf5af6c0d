"""Pages: who sees what, which forms do something, and that nothing foreign runs in them."""

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gpuproxy_plugins.manual import Manual
from msgspec import structs
from multidict import CIMultiDictProxy, MultiDict
from sqlalchemy import insert, select

from gpuproxy.access.attempts import FREE_FAILURES
from gpuproxy.access.tokens import COOKIE, claims_for, read, sign
from gpuproxy.config import Config, build
from gpuproxy.control.pages.render import DONE, bar, count, milliseconds, usd, when
from gpuproxy.control.pages.static import FILES, VERSION
from gpuproxy.control.pages.table import PAGES
from gpuproxy.fleet import findings, rentals
from gpuproxy.fleet.rent import wait_until_running
from gpuproxy.ledger.book import credit
from gpuproxy.plugin import Checkout, Order, PaymentProvider, PaymentSettings, ProviderUnavailable
from gpuproxy.store.schema import receipts, sessions

from .conftest import KEYRING, PASSWORD, Api, Person
from .test_export import calls

SCRIPT = "<script>alert(1)</script>"
OURS = {"Sec-Fetch-Site": "same-origin"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
LISTS = [each.path for each in PAGES if each.method == "GET" and "{" not in each.path and not each.is_open]
POSTS = [each for each in PAGES if each.method == "POST"]


class Answer(NamedTuple):
    """What a browser got, without following where it leads."""

    status: int
    text: str
    headers: CIMultiDictProxy[str]

    @property
    def place(self) -> str:
        return self.headers.get("Location", "")


class Evil(Manual):
    """A provider whose checkout is no page."""

    async def checkout(self, order: Order) -> Checkout:
        return Checkout("ref", url="javascript:alert(1)", instructions=SCRIPT)


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database: pages ask the API, which is tried with both."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def providers() -> Mapping[str, PaymentProvider]:
    """Return who takes payments."""
    return {"manual": Manual(PaymentSettings(options={"instructions": "Send {payment_id}"}))}


async def visit(
    api: Api, path: str, headers: dict[str, str] | None = None, form: Mapping[str, Any] | None = None
) -> Answer:
    method = "GET" if form is None else "POST"
    api.client.session.cookie_jar.clear()  # each visit sends its own cookie and no other
    async with api.client.request(method, path, headers=headers, data=form, allow_redirects=False) as answer:
        return Answer(answer.status, await answer.text(), answer.headers)


async def rented(api: Api, person: Person) -> dict[str, Any]:
    await credit(api.store, person.id, 10**12, f"gift {person.id}")
    _, offers = await api.call("GET", "/api/v1/gpu/instances?spot=false", headers=person.by_key)
    body = {"image": "x", "label": SCRIPT}
    path = f"/api/v1/gpu/instances/simulated/{offers['data'][0]['id']}"
    status, made = await api.call("POST", path, body, person.by_key)
    assert status == 201, made
    rental = await api.fleet.read(rentals.named, made["contract_id"], person.id, None)
    await wait_until_running(api.fleet, rental, 20)
    return dict(made)


async def hooked(api: Api, person: Person) -> str:
    body = {"url": "https://example.com/hook", "events": ["*"], "description": SCRIPT}
    _, made = await api.call("POST", "/api/v1/webhooks", body, person.by_key)
    return str(made["id"])


# Who is let in


async def test_who_is_not_signed_in_is_asked_to(api: Api) -> None:
    for page in PAGES:
        path, form = page.path.replace("{", "").replace("}", ""), {} if page.method == "POST" else None
        answer = await visit(api, path, OURS, form)
        assert (answer.place.partition("?")[0] == "/dashboard/sign-in") is not page.is_open, path
        assert (answer.status == 303) is not page.is_open, path


async def test_signing_in_leads_to_what_was_asked_for_and_nowhere_else(api: Api) -> None:
    ann = await api.person()
    asked = await visit(api, "/dashboard/usage?days=30&by=key", BROWSER)
    assert asked.place == "/dashboard/sign-in?next=%2Fdashboard%2Fusage%3Fdays%3D30%26by%3Dkey"
    form = {"email": ann.email, "password": PASSWORD}
    for given, led in {
        "/dashboard/usage?days=30&by=key": "/dashboard/usage?days=30&by=key",
        "https://elsewhere.example/": "/dashboard",
        "//elsewhere.example/dashboard": "/dashboard",
        "/dashboard\\@elsewhere.example": "/dashboard",
        "/dashboard.elsewhere.example": "/dashboard",
        "/dashboard?\r\nSet-Cookie: x=1": "/dashboard",
        "": "/dashboard",
    }.items():
        answer = await visit(api, "/dashboard/sign-in", OURS, {**form, "next": given})
        assert (answer.status, answer.place) == (303, led)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_cookie_is_for_this_origin_and_no_script(api: Api, scheme: str) -> None:
    ann = await api.person()
    headers = OURS | {"X-Forwarded-Proto": scheme}
    answer = await visit(api, "/dashboard/sign-in", headers, {"email": ann.email, "password": PASSWORD})
    name, _, rest = answer.headers["Set-Cookie"].partition("=")
    assert name == ("__Host-gpuproxy" if scheme == "https" else "gpuproxy")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(rest.split("; "))
    assert ("Secure" in rest.split("; ")) == (scheme == "https")
    assert "Domain" not in rest
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    assert (await visit(api, "/dashboard", headers | cookie)).status == 200


async def test_a_wrong_password_says_so_and_counts_as_it_does_in_the_api(api: Api) -> None:
    ann = await api.person()
    form = {"email": ann.email, "password": "wrong horse battery"}
    for _ in range(FREE_FAILURES):
        answer = await visit(api, "/dashboard/sign-in", OURS, form)
        assert (answer.status, "Set-Cookie" in answer.headers) == (401, False)
        assert "the password is wrong" in answer.text
        assert f'value="{ann.email}"' in answer.text
        assert form["password"] not in answer.text
    assert (await visit(api, "/dashboard/sign-in", OURS, {**form, "password": PASSWORD})).status == 429
    status, _ = await api.call("POST", "/api/v1/auth/login", {"email": ann.email, "password": PASSWORD})
    assert status == 429


async def test_registering_opens_the_dashboard(api: Api) -> None:
    answer = await visit(api, "/dashboard/register", OURS, {"email": "new@example.com", "password": PASSWORD})
    assert (answer.status, answer.place) == (303, "/dashboard")
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    assert "new@example.com" in (await visit(api, "/dashboard", cookie)).text


@pytest.mark.parametrize("settings", [build({"auth": {"allow_registration": False}})], ids=["closed"])
async def test_closed_registration_is_not_offered(api: Api, settings: Config) -> None:
    assert "/dashboard/register" not in (await visit(api, "/", BROWSER)).text
    answer = await visit(api, "/dashboard/register", OURS, {"email": "new@example.com", "password": PASSWORD})
    assert (answer.status, "registration is closed" in answer.text) == (403, True)


async def test_signing_out_ends_the_session_and_not_only_the_cookie(api: Api) -> None:
    ann = await api.person()
    answer = await visit(api, "/dashboard/sign-out", ann.by_cookie, {})
    assert answer.place == "/dashboard/sign-in?done=out"
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert (await visit(api, "/dashboard", ann.by_cookie)).status == 303
    assert (await api.call("GET", "/api/v1/user/profile", headers=ann.by_token))[0] == 401
    assert (await api.call("POST", "/api/v1/auth/refresh", {"refresh_token": ann.refresh_token}))[0] == 401


async def test_a_new_password_signs_out_everywhere_else(api: Api) -> None:
    ann = await api.person()
    form = {"current_password": PASSWORD, "new_password": "another horse", "again": "another house"}
    answer = await visit(api, "/dashboard/account/password", ann.by_cookie, form)
    assert (answer.status, "not the same twice" in answer.text) == (422, True)
    answer = await visit(api, "/dashboard/account/password", ann.by_cookie, {**form, "again": form["new_password"]})
    assert (answer.status, answer.place) == (303, "/dashboard/account?done=password")
    assert (await visit(api, "/dashboard", ann.by_cookie)).status == 303
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    assert DONE["password"] in (await visit(api, answer.place, cookie)).text


@pytest.mark.parametrize(
    "theirs", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://elsewhere.example"}, {}], ids=repr
)
async def test_a_form_of_another_site_does_nothing(api: Api, theirs: dict[str, str]) -> None:
    ann = await api.person(is_admin=True)
    headers = {"Cookie": ann.by_cookie["Cookie"], **theirs}
    for page in POSTS:
        path = page.path.replace("{id}", ann.key_id).replace("{provider}", "simulated")
        answer = await visit(api, path, headers, {"email": ann.email, "password": PASSWORD})
        assert (path, answer.status, "Set-Cookie" in answer.headers) == (path, 403, False)
    assert (await visit(api, "/dashboard", ann.by_cookie)).status == 200
    _, key = await api.call("GET", f"/api/v1/auth/apikey/{ann.key_id}", headers=ann.by_key)
    assert key["revoked_at"] is None


async def test_pages_count_as_requests_to_the_api(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuproxy.control.rates import RATES, ApiRates

    monkeypatch.setitem(api.client.app._state, RATES, ApiRates(build({"rates": {"requests_per_minute": 2}}).rates))
    ann = await api.person()
    for _ in range(2):
        assert (await visit(api, "/dashboard", ann.by_cookie)).status == 200
    answer = await visit(api, "/dashboard", ann.by_cookie)
    assert (answer.status, "Too many requests" in answer.text) == (429, True)
    assert int(answer.headers["Retry-After"]) >= 1


# What they show


async def test_a_page_is_there_and_lets_nothing_foreign_run(api: Api) -> None:
    ann = await api.person(is_admin=True)
    await rented(api, ann)
    await hooked(api, ann)
    await api.call("POST", "/api/v1/auth/apikey", {"name": SCRIPT}, ann.by_key)
    for path in (*LISTS, "/dashboard/usage?by=key", "/dashboard/usage?by=day&days=90", "/dashboard/rentals?all=1"):
        answer = await visit(api, path, ann.by_cookie)
        assert answer.status == 200, path
        check_headers(answer)
        check_markup(answer.text)


async def test_a_call_that_the_upstream_refused_does_not_look_well(api: Api) -> None:
    ann = await api.person()
    for status, shown in ((503, '<span class="state bad">failed'), (200, '<span class="state good">ok')):
        rows = [{**call, "id": f"r{status}", "status": status} for call in calls(ann.id, 1)]
        async with api.store.writing() as connection:
            await connection.execute(insert(receipts), rows)
        assert (await visit(api, "/dashboard", ann.by_cookie)).text.count(shown) == 1


async def test_the_pages_of_one_thing_are_there_too(api: Api) -> None:
    ann = await api.person()
    rental, hook = await rented(api, ann), await hooked(api, ann)
    _, offers = await api.call("GET", "/api/v1/gpu/instances", headers=ann.by_key)
    paths = [f"/dashboard/rentals/{rental['contract_id']}", f"/dashboard/webhooks/{hook}"]
    paths += [f"/dashboard/offers/simulated/{each['id']}" for each in offers["data"][:3]]
    for path in (*paths, f"{paths[0]}?logs=1"):
        answer = await visit(api, path, ann.by_cookie)
        assert answer.status == 200, path
        check_headers(answer)
        check_markup(answer.text)


async def test_open_pages_and_refusals_let_nothing_foreign_run_either(api: Api) -> None:
    for path in ("/", "/dashboard/sign-in", "/dashboard/register", "/dashboard/nowhere"):
        answer = await visit(api, path, BROWSER | {"X-Request-Id": "<b>"})
        assert answer.status == (404 if path.endswith("nowhere") else 200)
        check_headers(answer)
        check_markup(answer.text)


def check_headers(answer: Answer) -> None:
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


class Reader(HTMLParser):
    """Looks for what runs, what is loaded, and fields without a label."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.headings: list[str] = []
        self._labels = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._labels += tag == "label"
        if tag in ("style", "iframe", "object", "base") or any(name.startswith("on") for name in given):
            self.faults.append(self.get_starttag_text() or tag)
        if tag == "script" or (tag == "link" and given["rel"] in ("stylesheet", "icon")):
            source = given.get("src") or given.get("href", "")
            if not re.fullmatch(rf"/dashboard/static/[a-z]+\.(js|css|svg)\?v={VERSION}", source):
                self.faults.append(self.get_starttag_text() or tag)
        if "style" in given or (tag == "form" and not re.match(r"/dashboard/", given["action"])):
            self.faults.append(self.get_starttag_text() or tag)
        is_shown = given.get("type") != "hidden" and "hidden" not in given
        if tag in ("input", "select") and is_shown and not self._labels and "aria-label" not in given:
            self.faults.append(f"no label: {self.get_starttag_text()}")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


def check_markup(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    assert reader.faults == []
    assert reader.headings.count("h1") == 1
    assert text.startswith("<!doctype html>\n<html lang=")
    for landmark in ("<header", "<main", "<footer"):
        assert text.count(landmark) == 1


async def test_markup_in_what_people_wrote_is_shown_and_not_run(api: Api) -> None:
    ann = await api.person()
    await rented(api, ann)
    await hooked(api, ann)
    await api.call("POST", "/api/v1/auth/apikey", {"name": SCRIPT}, ann.by_key)
    for path in ("/dashboard/keys", "/dashboard/rentals", "/dashboard/webhooks"):
        text = (await visit(api, path, ann.by_cookie)).text
        assert SCRIPT not in text
        assert SCRIPT in unescape(text), path
    answer = await visit(api, f"/dashboard/usage?days={SCRIPT}", ann.by_cookie)
    assert (answer.status, SCRIPT in answer.text) == (422, False)
    answer = await visit(api, "/dashboard/sign-in", OURS, {"email": f'"{SCRIPT}', "password": "x"})
    assert SCRIPT not in answer.text
    assert SCRIPT in unescape(answer.text)


async def test_nobody_sees_or_changes_what_is_another_accounts(api: Api) -> None:
    ann, bob = await api.person(), await api.person()
    rental, hook = await rented(api, ann), await hooked(api, ann)
    here = f"/dashboard/rentals/{rental['contract_id']}"
    for path in (here, f"/dashboard/webhooks/{hook}"):
        assert (await visit(api, path, bob.by_cookie)).status == 404
    for path in (f"/dashboard/keys/{ann.key_id}/revoke", f"{here}/stop", f"{here}/destroy"):
        assert (await visit(api, path, bob.by_cookie, {})).status == 404
    for path in (f"/dashboard/webhooks/{hook}/delete", f"/dashboard/webhooks/{hook}/test"):
        assert (await visit(api, path, bob.by_cookie, {})).status == 404
    for path in LISTS:
        assert ann.email not in (await visit(api, path, bob.by_cookie)).text
    assert "running" in (await visit(api, here, ann.by_cookie)).text


async def test_the_pages_of_admins_are_for_admins(api: Api) -> None:
    ann, admin = await api.person(), await api.person(is_admin=True)
    assert "/dashboard/admin" not in (await visit(api, "/dashboard", ann.by_cookie)).text
    assert (await visit(api, "/dashboard/admin", ann.by_cookie)).status == 403
    for page in POSTS:
        if "/admin" in page.path:
            form = {"do": "promote", "amount": "5"}
            assert (await visit(api, page.path.replace("{id}", ann.id), ann.by_cookie, form)).status == 403
    text = (await visit(api, "/dashboard/admin", admin.by_cookie)).text
    assert ann.email in text


async def test_the_front_page_is_for_browsers_and_json_for_everybody_else(api: Api) -> None:
    for accept in ("*/*", "", "application/json", "application/json, text/html"):
        status, told = await api.call("GET", "/", headers={"Accept": accept})
        assert (status, set(told)) == (200, {"name", "version"})
    answer = await visit(api, "/", BROWSER | {"X-Forwarded-Host": "gpu.example:8443", "X-Forwarded-Proto": "https"})
    assert answer.headers["Vary"] == "Accept"
    assert "https://gpu.example:8443/api/v1/gpu/proxy/v1" in answer.text
    for link in ("/dashboard/sign-in", "/dashboard/register", "/docs"):
        assert f'href="{link}"' in answer.text


@pytest.mark.parametrize("name", FILES)
async def test_files_are_kept_by_browsers_until_they_change(api: Api, name: str) -> None:
    kept = await visit(api, f"/dashboard/static/{name}?v={VERSION}")
    assert "immutable" in kept.headers["Cache-Control"]
    fresh = await visit(api, f"/dashboard/static/{name}?v=old")
    assert (fresh.status, fresh.headers["Cache-Control"]) == (200, "no-cache")
    assert (await visit(api, f"/dashboard/static/{name}", {"If-None-Match": fresh.headers["ETag"]})).status == 304
    assert (await visit(api, "/dashboard/static/..%2Fpages.css")).status == 404


# What forms do


async def test_a_key_is_shown_once_and_made_once(api: Api) -> None:
    ann = await api.person()
    form = {
        "name": "laptop",
        "scopes": "inference",
        "models": "a, b",
        "tools": "web/*",
        "expires_days": "7",
        "once": "o" * 32,
    }
    answer = await visit(api, "/dashboard/keys", ann.by_cookie, form)
    assert answer.status == 201
    (secret,) = set(re.findall(r"gp_\w{40,}", answer.text))
    again = await visit(api, "/dashboard/keys", ann.by_cookie, form)
    assert set(re.findall(r"gp_\w{40,}", again.text)) == {secret}
    assert secret not in (await visit(api, "/dashboard/keys", ann.by_cookie)).text
    _, told = await api.call("GET", "/api/v1/auth/apikey", headers=ann.by_token)
    made = [key for key in told["data"] if key["name"] == "laptop"]
    assert [(key["scopes"], key["models"], key["tools"]) for key in made] == [(["inference"], ["a", "b"], ["web/*"])]
    assert (await api.call("GET", "/api/v1/user/profile", headers={"X-API-Key": secret}))[0] == 200
    answer = await visit(api, f"/dashboard/keys/{made[0]['id']}/revoke", ann.by_cookie, {})
    assert answer.place == "/dashboard/keys?done=revoked"
    assert (await api.call("GET", "/api/v1/user/profile", headers={"X-API-Key": secret}))[0] == 401


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"scopes": "root"}, "no scope"),
        ({"scopes": "inference", "expires_days": "soon"}, "no whole number"),
        ({"scopes": "inference", "expires_days": "0"}, "expires_days"),
        ({"scopes": "inference", "name": "x" * 101}, "name"),
        ({"scopes": "inference", "name": "a\0b"}, "NUL"),
        ({"scopes": "admin"}, "scope"),
        ({}, "scopes"),
    ],
    ids=["unknown scope", "days no number", "days none", "long name", "nul", "more than one has", "nothing"],
)
async def test_a_form_that_is_refused_says_why_on_its_page(api: Api, form: dict[str, str], told: str) -> None:
    ann = await api.person()
    answer = await visit(api, "/dashboard/keys", ann.by_cookie, form)
    assert 400 <= answer.status < 500
    (alert,) = re.findall(r'role="alert">(.*?)</div>', answer.text, re.DOTALL)
    assert told in alert
    assert "Make a key" in answer.text


async def test_a_machine_is_rented_at_the_shown_price_or_not_at_all(api: Api) -> None:
    ann = await api.person()
    await credit(api.store, ann.id, 10**12, "gift")
    _, offers = await api.call("GET", "/api/v1/gpu/instances?spot=false", headers=ann.by_key)
    path = f"/dashboard/offers/simulated/{offers['data'][0]['id']}"
    (price,) = re.findall(r'name="max_price" value="([0-9.]+)"', (await visit(api, path, ann.by_cookie)).text)
    form = {"image": "x", "ports": "8000, 22", "disk_gb": "10", "label": "mine", "max_price": "0.000000001"}
    answer = await visit(api, path, ann.by_cookie, form)
    assert (answer.status, "list offers anew" in answer.text) == (409, True)
    assert 'value="8000, 22"' in answer.text
    form |= {"max_price": price, "once": "r" * 32}
    for _ in range(2):
        answer = await visit(api, path, ann.by_cookie, form)
        assert (answer.status, answer.place) == (303, "/dashboard/rentals?done=rented"), answer.text
    _, told = await api.call("GET", "/api/v1/gpu/rentals", headers=ann.by_key)
    (rental,) = told["data"]
    assert (rental["label"], rental["price_per_hour"]) == ("mine", offers["data"][0]["price_per_hour"])


async def test_machines_are_stopped_and_destroyed(api: Api) -> None:
    ann = await api.person()
    rental = await rented(api, ann)
    here = f"/dashboard/rentals/{rental['contract_id']}"
    assert (await visit(api, f"{here}/stop", ann.by_cookie, {})).place == "/dashboard/rentals?done=stopped"
    assert (await visit(api, f"{here}/destroy", ann.by_cookie, {})).place == "/dashboard/rentals?done=destroyed"
    _, told = await api.call("GET", f"/api/v1/gpu/rentals/{rental['contract_id']}", headers=ann.by_key)
    assert told["data"]["status"] in ("destroying", "destroyed")


async def test_filters_that_are_empty_are_none_and_those_that_are_wrong_leave_the_machines_shown(api: Api) -> None:
    ann = await api.person()
    await rented(api, ann)
    empty = "provider=&gpu_model=&gpu_count=&min_vram=&max_price=&region=&spot=&sort=price"
    every = await visit(api, f"/dashboard/rentals?{empty}", ann.by_cookie)
    assert every.text.count('class="button small" href="/dashboard/offers/') > 5
    some = await visit(api, "/dashboard/rentals?min_vram=80&spot=false", ann.by_cookie)
    assert 0 < some.text.count("/dashboard/offers/") < every.text.count("/dashboard/offers/")
    wrong = await visit(api, "/dashboard/rentals?min_vram=much", ann.by_cookie)
    assert (wrong.status, "is no number" in wrong.text) == (200, True)
    assert "Destroy" in wrong.text


async def test_paying_shows_how_and_happens_once(api: Api) -> None:
    ann = await api.person()
    for _ in range(2):
        answer = await visit(api, "/dashboard/billing/checkout", ann.by_cookie, {"amount_usd": "25", "once": "p" * 32})
        assert answer.status == 201
    (payment,) = set(re.findall(r"Send (pay_\w+)", answer.text))
    _, told = await api.call("GET", "/api/v1/billing/payments", headers=ann.by_key)
    assert [each["id"] for each in told["data"]] == [payment]
    answer = await visit(api, "/dashboard/billing/checkout", ann.by_cookie, {"amount_usd": "much"})
    assert (answer.status, "amount_usd" in answer.text) == (422, True)


async def test_where_to_pay_is_a_link_only_if_it_is_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuproxy.control.paying import PAYMENTS

    monkeypatch.setitem(api.client.app._state, PAYMENTS, {"evil": Evil(PaymentSettings())})
    ann = await api.person()
    answer = await visit(api, "/dashboard/billing/checkout", ann.by_cookie, {"amount_usd": "25"})
    assert answer.status == 201, answer.text
    assert "javascript:" not in answer.text
    assert SCRIPT not in answer.text


async def test_a_webhook_is_made_switched_tested_and_deleted(api: Api) -> None:
    ann = await api.person()
    offered = re.findall(
        r'name="events" value="([^"]+)"', (await visit(api, "/dashboard/webhooks", ann.by_cookie)).text
    )
    form = MultiDict([("url", "https://example.com/h"), *(("events", name) for name in offered)])
    answer = await visit(api, "/dashboard/webhooks", ann.by_cookie, form)
    assert (answer.status, "whsec_" in answer.text) == (201, True)
    (hook,) = set(re.findall(r"/dashboard/webhooks/(whk_\w+)", answer.text))
    here = f"/dashboard/webhooks/{hook}"
    assert (await visit(api, f"{here}/test", ann.by_cookie, {})).place == f"{here}?done=sent"
    assert "webhook.test" in (await visit(api, here, ann.by_cookie)).text
    await visit(api, f"{here}/switch", ann.by_cookie, {"enabled": "no"})
    assert "Switch on" in (await visit(api, here, ann.by_cookie)).text
    assert (await visit(api, f"{here}/delete", ann.by_cookie, {})).place == "/dashboard/webhooks?done=deleted"
    assert (await visit(api, here, ann.by_cookie)).status == 404
    refused = await visit(api, "/dashboard/webhooks", ann.by_cookie, {"url": "http://127.0.0.1/"})
    assert (refused.status, 'value="http://127.0.0.1/"' in refused.text) == (403, True)


async def test_admins_check_the_books_give_credit_and_block(api: Api) -> None:
    ann, admin = await api.person(), await api.person(is_admin=True)
    here = f"/dashboard/admin/users/{ann.id}"
    for _ in range(2):
        answer = await visit(api, f"{here}/credit", admin.by_cookie, {"amount": "12.50", "once": "c" * 32})
        assert answer.place == "/dashboard/admin?done=credited"
    assert "$12.50" in (await visit(api, "/dashboard/billing", ann.by_cookie)).text
    assert ">sound<" in (await visit(api, "/dashboard/admin/verify", admin.by_cookie, {})).text
    assert (await visit(api, here, admin.by_cookie, {"do": "block"})).status == 303
    assert (await visit(api, "/dashboard", ann.by_cookie)).status == 303
    assert (await visit(api, here, admin.by_cookie, {"do": "unblock"})).status == 303
    assert (await visit(api, here, admin.by_cookie, {"do": "dance"})).status == 422


async def test_admins_see_what_was_found_at_providers_and_close_it(api: Api) -> None:
    admin = await api.person(is_admin=True)
    now = datetime.now(UTC)
    async with api.store.writing() as connection:
        for kind, detail in (
            ("foreign", {"tag": "<b>tag", "gpu_model": "H100", "state": "running"}),
            ("difference", {"told_nanousd": 2_000_000_000, "counted_nanousd": 1_500_000_000}),
        ):
            await connection.run_sync(findings.add, "simulated", kind, f"id-{kind}", detail, now)
    text = (await visit(api, "/dashboard/admin", admin.by_cookie)).text
    assert "&lt;b&gt;tag" in text
    assert "took $2.0000, counted $1.5000" in text
    for place in re.findall(r'action="(/dashboard/admin/findings/[^"]+)"', text):
        assert (await visit(api, place, admin.by_cookie, {})).place == "/dashboard/admin?done=acknowledged"
    text = (await visit(api, "/dashboard/admin?done=acknowledged", admin.by_cookie)).text
    assert ("id-foreign" in text, "id-difference" in text, "Acknowledged." in text) == (False, False, True)


async def test_the_account_shows_its_budgets_and_says_when_to_be_told_of_low_credit(api: Api) -> None:
    ann = await api.person()
    await api.call("POST", "/api/v1/user/budgets", {"limit": 7, "window_s": 86_400}, ann.by_token)
    assert "$7.00" in (await visit(api, "/dashboard/account", ann.by_cookie)).text
    answer = await visit(api, "/dashboard/account/low-credit", ann.by_cookie, {"threshold": "2.50"})
    assert answer.place == "/dashboard/account?done=changed"
    _, told = await api.call("GET", "/api/v1/user/credits", headers=ann.by_key)
    assert told["low_threshold"] == 2.5
    answer = await visit(api, "/dashboard/account/low-credit", ann.by_cookie, {"threshold": "low"})
    assert (answer.status, "threshold" in answer.text) == (422, True)


# Figures and colours


@pytest.mark.parametrize(
    ("nanousd", "shown"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (10**7, "$0.01"),
        (-1_084_000, "-$0.001084"),
        (999_999_999, "$0.999999"),
        (9_417_999_999, "$9.4179"),
        (-(10**9), "-$1.00"),
        (1_234_567 * 10**9 + 5, "$1,234,567.00"),
    ],
)
def test_money_is_never_shown_as_more_than_it_is(nanousd: int, shown: str) -> None:
    assert usd(nanousd) == shown


def test_figures_are_for_people() -> None:
    assert (count(999_999), count(1_234_567)) == ("999,999", "1.23 M")
    assert (milliseconds(-1), milliseconds(1_500), milliseconds(42_000), milliseconds(61_000_000)) == (
        "", "1.5 ms", "42 ms", "61.0 s",
    )  # fmt: skip
    assert when(1_700_000_000 * 10**9) == when("2023-11-14T23:13:20+01:00") == "2023-11-14 22:13"
    assert (bar(0, 10), bar(1, 1_000), bar(5, 10), bar(10, 10), bar(0, 0)) == (0, 1, 50, 100, 0)


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(theme: int) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    style = re.findall(r":root \{(.*?)\}", FILES["pages.css"].decode(), re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]+)", style))
    pairs = [(text, ground) for text in ("text", "soft", "link") for ground in ("ground", "card", "track", "code")]
    pairs += [("accent-text", "accent"), ("text", "field"), ("soft", "field")]
    pairs += [(name, f"{name}-ground") for name in ("good", "bad", "busy")] + [("good", "card"), ("bad", "card")]
    for text, ground in pairs:
        lighter, darker = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def aged(person: Person, days: int) -> dict[str, str]:
    """Return the cookie of who signed in so many days ago."""
    session_id = read(KEYRING, person.access_token).sid
    claims = claims_for(person.id, session_id, 30 * 86_400, COOKIE)
    cookie = sign(KEYRING, structs.replace(claims, iat=claims.iat - days * 86_400))
    return {"Cookie": f"gpuproxy={cookie}"}


async def test_who_visits_stays_signed_in(api: Api) -> None:
    ann = await api.person()
    answer = await visit(api, "/dashboard", aged(ann, 20))
    fresh = answer.headers["Set-Cookie"].partition(";")[0]
    claims = read(KEYRING, fresh.partition("=")[2], COOKIE)
    assert claims.exp - time.time() > 29 * 86_400
    async with api.store.reading() as connection:
        ends_at = await connection.scalar(select(sessions.c.expires_at).where(sessions.c.id == claims.sid))
    assert ends_at is not None
    assert ends_at - datetime.now(UTC) > timedelta(days=29)
    assert "Set-Cookie" not in (await visit(api, "/dashboard", {"Cookie": fresh})).headers
    assert "Set-Cookie" not in (await visit(api, "/dashboard/static/pages.css", aged(ann, 20))).headers
    out = await visit(api, "/dashboard/sign-out", aged(ann, 20) | OURS, {})
    assert out.headers["Set-Cookie"].startswith('gpuproxy="";')
    assert "Set-Cookie" not in (await visit(api, "/dashboard", aged(ann, 20))).headers


async def test_why_a_provider_fails_is_for_admins(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def offers(query: object) -> None:
        raise ProviderUnavailable("simulated", "offers", "no connection to http://inner:9")

    monkeypatch.setattr(api.fleet.providers["simulated"], "offers", offers)
    admin = await api.person(is_admin=True)
    text = (await visit(api, "/dashboard/rentals", admin.by_cookie)).text
    assert "simulated is not available at the moment" in text
    assert "http://inner:9" not in text
    assert "http://inner:9" in (await visit(api, "/dashboard/admin", admin.by_cookie)).text
