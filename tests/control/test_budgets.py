"""Budgets and terms of accounts over HTTP: who may set them, what workers then hear."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select

from gpuproxy.access.accounts import create_key
from gpuproxy.access.changes import newest_change, unread_changes
from gpuproxy.access.grants import grant_for
from gpuproxy.codec.key import digest_of
from gpuproxy.control.parts import LEASES
from gpuproxy.ledger import budgets
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.holds import place
from gpuproxy.link.messages import Lease
from gpuproxy.store.cursor import Cursor
from gpuproxy.store.schema import audit
from gpuproxy.types import Grant

from .conftest import Api, Person

OWN = "/api/v1/user/budgets"
ANY = "/api/v1/admin/budgets"
KEYS = "/api/v1/auth/apikey"
QUOTA = "/api/v1/user/quota"
DAY = {"limit": 5.00, "window_s": 86_400}


async def grant(api: Api, secret: str) -> Grant:
    found = await grant_for(api.store, digest_of(secret.encode()))
    assert found is not None
    return found


async def listed(api: Api, person: Person) -> list[Any]:
    data: list[Any] = (await api.call("GET", OWN, headers=person.by_token))[1]["data"]
    return data


async def test_setting_a_budget_again_gives_it_another_limit(api: Api) -> None:
    person = await api.person()
    status, told = await api.call("POST", OWN, DAY, person.by_token)
    assert (status, told["limit"], told["remaining"], told["spent"], told["key_id"]) == (201, 5, 5, 0, "")
    _, again = await api.call("POST", OWN, {**DAY, "limit": "7.000000001"}, person.by_token)
    assert (again["id"], again["limit_nanousd"]) == (told["id"], 7_000_000_001)
    assert [each["id"] for each in await listed(api, person)] == [told["id"]]
    assert (await api.call("DELETE", f"{OWN}/{told['id']}", headers=person.by_token))[0] == 200
    assert (await api.call("DELETE", f"{OWN}/{told['id']}", headers=person.by_token))[0] == 404
    assert await listed(api, person) == []


async def test_budgets_made_at_once_are_not_more_than_there_may_be(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    person = await api.person()
    monkeypatch.setattr(budgets, "BUDGETS_MAX", 2)
    wishes = [{**DAY, "window_s": 3_600 * hours} for hours in range(1, 9)]
    told = await asyncio.gather(*(api.call("POST", OWN, wish, person.by_token) for wish in wishes))
    assert sorted(status for status, _ in told) == [201] * 2 + [409] * 6
    assert len(await listed(api, person)) == 2


async def test_a_budget_that_makes_no_sense_is_refused_by_name(api: Api) -> None:
    person, other = await api.person(), await api.person()
    wrong = {
        "window_s": (299, 2_592_001, "300"),
        "limit": (0, -1, "x", True, 1e10),
        "key_id": ("nix", other.key_id),
    }
    for field, values in wrong.items():
        for value in values:
            status, told = await api.call("POST", OWN, {**DAY, field: value}, person.by_token)
            assert (status in (400, 404, 422), field.removesuffix("_id") in told["error"]) == (True, True), told


async def test_a_key_is_made_with_a_budget_and_workers_learn_of_it(api: Api) -> None:
    person = await api.person()
    _, made = await api.call("POST", KEYS, {"budget": {"limit": "1.50", "window_s": 300}}, person.by_token)
    assert [(each["limit"], each["key_id"]) for each in made["budgets"]] == [(1.5, made["id"])]
    assert (await grant(api, made["api_key"])).budget_key == made["id"]
    assert (await grant(api, person.api_key)).budget_key == ""
    _, shown = await api.call("GET", f"{KEYS}/{made['id']}", headers=person.by_token)
    assert (shown["budgets"], "api_key" in shown) == (made["budgets"], False)
    _, keys = await api.call("GET", KEYS, headers=person.by_token)
    assert [len(key["budgets"]) for key in keys["data"]] == [0, 1]
    status, told = await api.call("POST", KEYS, {"budget": {"limit": 0, "window_s": 300}}, person.by_token)
    assert (status, told["error"].startswith("limit: ")) == (422, True)
    assert len((await api.call("GET", KEYS, headers=person.by_token))[1]["data"]) == 2


async def test_a_key_with_a_budget_cannot_get_round_it(api: Api) -> None:
    person = await api.person()
    _, made = await api.call("POST", KEYS, {"budget": DAY}, person.by_token)
    by_key = {"X-API-Key": made["api_key"]}
    assert (await api.call("POST", OWN, {**DAY, "limit": 100}, by_key))[0] == 403
    assert (await api.call("DELETE", f"{OWN}/{made['budgets'][0]['id']}", headers=by_key))[0] == 403
    _, child = await api.call("POST", KEYS, {}, by_key)
    _, fresh = await api.call("POST", f"{KEYS}/{made['id']}/rotate", {}, by_key)
    for secret in (child["api_key"], fresh["api_key"]):
        assert (await grant(api, secret)).budget_key == made["id"]
    assert child["budgets"] == fresh["budgets"] == made["budgets"]


async def test_what_an_admin_has_set_a_user_sees_but_cannot_change(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    _, theirs = await api.call("POST", ANY, {**DAY, "user_id": person.id}, admin.by_token)
    _, own = await api.call("POST", OWN, {**DAY, "limit": 9}, person.by_token)
    assert [(each["limit"], each["is_admins"]) for each in await listed(api, person)] == [(5, True), (9, False)]
    status, told = await api.call("DELETE", f"{OWN}/{theirs['id']}", headers=person.by_token)
    assert (status, told["code"]) == (403, "FORBIDDEN")
    assert (await api.call("DELETE", f"{ANY}/{own['id']}", headers=admin.by_token))[0] == 200
    status, _ = await api.call("GET", f"{ANY}?user_id=nobody", headers=admin.by_token)
    assert status == 404
    status, told = await api.call("GET", ANY, headers=admin.by_token)
    assert (status, told["error"]) == (422, "user_id: name whose budgets to list")
    async with api.store.reading() as connection:
        rows = (await connection.execute(select(audit.c.action, audit.c.subject_id))).all()
    assert [tuple(row) for row in rows] == [("budget.set", person.id), ("budget.remove", person.id)]


async def test_terms_reach_the_grants_of_an_account(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    before = Cursor(await newest_change(api.store))
    path = f"/api/v1/admin/users/{person.id}/terms"
    status, told = await api.call("PATCH", path, {"markup_bps": 1_500}, admin.by_token)
    assert (status, told["markup_bps"], told["overdraft"]) == (200, 1_500, 0)
    assert (await grant(api, person.api_key)).markup_bps == 1_500
    _, changed = await unread_changes(api.store, before)
    assert (changed.renewed, changed.lost, changed.restored) == ((person.key_id,), (), ())
    assert (await api.call("GET", path, headers=admin.by_token))[1]["markup_bps"] == 1_500
    for wrong in ({}, {"markup_bps": -10_001}, {"markup_bps": 1_000_001}, {"overdraft": -1}, {"overdraft": "x"}):
        assert (await api.call("PATCH", path, wrong, admin.by_token))[0] == 422


async def test_an_overdraft_lets_an_account_go_below_nothing_and_is_not_taken_while_in_use(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    await credit(api.store, person.id, 10**9, "one")
    path = f"/api/v1/admin/users/{person.id}/terms"
    assert (await api.call("PATCH", path, {"overdraft": "2.50"}, admin.by_token))[1]["overdraft_nanousd"] == 25 * 10**8
    async with api.store.writing() as connection:
        await connection.run_sync(place, person.id, 3 * 10**9, "hold")
    _, told = await api.call("GET", "/api/v1/user/credits", headers=person.by_token)
    assert (told["credits_remaining"], told["overage"], told["cap"]) == (-2, 2, 2.5)
    assert (await api.call("PATCH", path, {"overdraft": 1.99}, admin.by_token))[0] == 409
    assert (await api.call("PATCH", path, {"overdraft": 2}, admin.by_token))[0] == 200


async def test_a_quota_shows_the_limits_and_what_is_left(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    await credit(api.store, person.id, 25 * 10**8, "one")
    secret, own = await create_key(api.store, person.email, rpm=7, streams=2)
    await api.call("POST", OWN, {**DAY, "key_id": own.id}, person.by_token)
    await api.call("POST", ANY, {**DAY, "user_id": person.id}, admin.by_token)
    _, shared = await api.call("GET", QUOTA, headers=person.by_key)
    assert (shared["requests_per_minute"], shared["tokens_per_minute"], shared["streams"]) == (None, None, None)
    assert (shared["is_shared"], shared["credits_remaining"]) == (True, 2.5)
    assert ([each["key_id"] for each in shared["budgets"]], shared["keys"], shared["keys_max"]) == ([""], 2, 1_000)
    asked = Lease(1, person.id, own.id, "requests", 1, 3)
    assert api.client.app is not None
    given = await api.client.app[LEASES].grant("worker", asked)
    await api.client.app[LEASES].grant("worker", Lease(2, person.id, own.id, "streams", 1, 1))
    _, told = await api.call("GET", QUOTA, headers={"X-API-Key": secret})
    assert told["streams"] == {"limit": 2, "remaining": 1}
    assert (told["requests_per_minute"]["limit"], told["is_shared"]) == (7, False)
    assert told["requests_per_minute"]["remaining"] == 7 - given.amount
    assert 0 < told["requests_per_minute"]["reset_s"] <= 120
    assert sorted(each["key_id"] for each in told["budgets"]) == ["", own.id]
    assert len((await api.call("GET", QUOTA, headers=person.by_token))[1]["budgets"]) == 2
