"""Prices over HTTP: set from a time on, never back in time, the history readable."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from gpuproxy.config import Config, build
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.catalogue import load_catalogue
from gpuproxy.ledger.usage import unix_ns
from gpuproxy.pricing import NEVER_NS
from gpuproxy.store.schema import accounts, audit

from .conftest import Api

PRICES = "/api/v1/admin/prices"
VERIFY = "/api/v1/admin/ledger/verify"
GUIDE = {
    "model": "mock-model",
    "input_usd_per_million": "0.15",
    "cached_input_usd_per_million": "0.03",
    "output_usd_per_million": "0.60",
    "per_request_usd": "0.10",
}


@pytest.fixture
async def settings() -> Config:
    return build({"prices": [GUIDE]})


async def test_a_price_holds_from_a_moment_on_and_what_was_stays_readable(api: Api) -> None:
    admin = await api.person(is_admin=True)
    before = datetime.now(UTC)
    status, told = await api.call("POST", PRICES, {**GUIDE, "per_request_usd": "0.2"}, admin.by_token)
    assert (status, told["per_request_usd"], told["input_usd_per_million"]) == (201, "0.20", "0.15")
    begins_at = datetime.fromisoformat(told["valid_from"])
    assert timedelta(seconds=0) < begins_at - before < timedelta(seconds=10)
    _, listed = await api.call("GET", PRICES, headers=admin.by_token)
    shown = [(each["per_request_usd"], each["valid_from"], each["is_in_force"]) for each in listed["data"]]
    assert shown == [("0.10", None, True), ("0.20", told["valid_from"], False)]
    catalogue = await load_catalogue(api.store, ())
    assert catalogue.find("mock-model", "", unix_ns(begins_at)).request_nanousd == 2 * 10**8


async def test_a_price_may_be_set_for_later_but_not_for_the_past(api: Api) -> None:
    admin = await api.person(is_admin=True)
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    status, told = await api.call("POST", PRICES, {**GUIDE, "valid_from": later}, admin.by_token)
    assert (status, datetime.fromisoformat(told["valid_from"])) == (201, datetime.fromisoformat(later))
    assert (await api.call("POST", PRICES, {**GUIDE, "valid_from": later}, admin.by_token))[0] == 409
    never = {**GUIDE, "valid_from": "9999-12-31T00:00:00Z"}
    assert (await api.call("POST", PRICES, never, admin.by_token))[0] == 201
    past = {**GUIDE, "valid_from": "2020-01-01T00:00:00Z"}
    status, told = await api.call("POST", PRICES, past, admin.by_token)
    assert (status, "lies in the past" in told["error"]) == (422, True)


async def test_what_is_no_price_is_refused_by_name(api: Api) -> None:
    admin = await api.person(is_admin=True)
    wrong = {
        "input_usd_per_million": ("-1", "1e3", "0.1234567891", "1000000", "x", "NaN"),
        "model": (" x", "a\nb"),
        "upstream": ("a b", "A"),
    }
    for field, values in wrong.items():
        for value in values:
            status, told = await api.call("POST", PRICES, {**GUIDE, field: value}, admin.by_token)
            assert (status, told["error"].startswith(f"{field}: ")) == (422, True), told
    assert (await api.call("POST", PRICES, {**GUIDE, "per_second_usd": 0.1}, admin.by_token))[0] == 400


async def test_versions_come_in_pages_and_by_model(api: Api) -> None:
    admin = await api.person(is_admin=True)
    for model in ("b", "a", "ü"):
        await api.call("POST", PRICES, {"model": model, "per_second_usd": "1"}, admin.by_token)
    found, path = [], f"{PRICES}?limit=2"
    while path:
        _, told = await api.call("GET", path, headers=admin.by_token)
        found += [each["model"] for each in told["data"]]
        path = f"{PRICES}?limit=2&cursor={told['next_cursor']}" if "next_cursor" in told else ""
    assert found == ["mock-model", "a", "b", "ü"]
    _, told = await api.call("GET", f"{PRICES}?model=b", headers=admin.by_token)
    assert [each["model"] for each in told["data"]] == ["b"]
    assert (await api.call("GET", f"{PRICES}?cursor=x", headers=admin.by_token))[0] == 422


async def test_a_tool_has_a_price_instead_of_a_model(api: Api) -> None:
    admin = await api.person(is_admin=True)
    price = {"tool": "search", "upstream": "tools", "per_request_usd": "0.01"}
    status, told = await api.call("POST", PRICES, price, admin.by_token)
    assert (status, told["tool"], told["model"], told["per_request_usd"]) == (201, "search", "", "0.01")
    assert (await api.call("POST", PRICES, {**price, "tool": "fetch"}, admin.by_token))[0] == 201
    found = (await load_catalogue(api.store, ())).find("", "tools", NEVER_NS, "search")
    assert (found.tool, found.request_nanousd) == ("search", 10**7)
    for wrong in ({"model": "m"}, {"tool": ""}, {"input_usd_per_million": "1"}):
        status, told = await api.call("POST", PRICES, price | wrong, admin.by_token)
        assert status == 422, told


async def test_setting_a_price_leaves_a_note_and_happens_once(api: Api) -> None:
    admin = await api.person(is_admin=True)
    headers = admin.by_token | {"Idempotency-Key": "one"}
    assert await api.call("POST", PRICES, GUIDE, headers) == await api.call("POST", PRICES, GUIDE, headers)
    async with api.store.reading() as connection:
        rows = (await connection.execute(select(audit.c.action, audit.c.subject_id))).all()
    assert rows == [("price.set", "mock-model")]


async def test_the_books_are_checked_on_demand(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    await credit(api.store, person.id, 5, "one")
    status, told = await api.call("GET", VERIFY, headers=admin.by_token)
    assert (status, told["is_sound"], told["faults"]) == (200, True, [])
    async with api.store.writing() as connection:
        await connection.execute(update(accounts).where(accounts.c.kind == "credit").values(posted_nanousd=6))
    _, told = await api.call("GET", VERIFY, headers=admin.by_token)
    assert told["is_sound"] is False
    assert "a balance is the sum of its transfers" in {each["rule"] for each in told["faults"]}
