"""Accounts and log-ins over HTTP, and which credentials the management API takes."""

import json
from typing import Any
from uuid import uuid4

import jwt
import pytest
from sqlalchemy import select

from gpuproxy.config import Config, build
from gpuproxy.control.parts import ATTEMPTS
from gpuproxy.control.table import TABLE
from gpuproxy.store.schema import audit

from .conftest import PASSWORD, Api

ANN = {"email": "ann@example.com", "password": PASSWORD}
AUTH = "/api/v1/auth"
PROFILE = "/api/v1/user/profile"
closed = pytest.mark.parametrize("settings", [build({"auth": {"allow_registration": False}})])


def bearer(tokens: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


async def test_registering_logging_in_and_calling(api: Api) -> None:
    status, made = await api.call("POST", f"{AUTH}/register", ANN)
    assert (status, made["status"], made["user"]["email"]) == (201, "success", "ann@example.com")
    status, told = await api.call("POST", f"{AUTH}/login", ANN)
    assert status == 200
    assert set(told["tokens"]) == {"access_token", "refresh_token", "expires_at"}
    assert told["data"] == {"user": told["user"], "tokens": told["tokens"]}
    for headers in (bearer(told["tokens"]), {"X-API-Key": told["tokens"]["access_token"]}):
        status, profile = await api.call("GET", PROFILE, headers=headers)
        assert (status, profile["email"], profile["is_admin"]) == (200, "ann@example.com", False)
    assert PASSWORD not in repr((made, told))


async def test_a_token_says_what_rfc_7519_asks_for(api: Api) -> None:
    _, told = await api.call("POST", f"{AUTH}/register", ANN)
    token = told["tokens"]["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert set(claims) == {"sub", "sid", "jti", "iat", "nbf", "exp", "iss", "aud", "typ"}
    assert claims["exp"] - claims["iat"] == 900
    assert jwt.get_unverified_header(token)["alg"] == "HS256"


@closed
async def test_registration_can_be_closed(api: Api, settings: Config) -> None:
    status, told = await api.call("POST", f"{AUTH}/register", ANN)
    assert (status, told["code"]) == (403, "FORBIDDEN")


@pytest.mark.parametrize(
    ("body", "status", "code", "named"),
    [
        (b"{", 400, "INVALID_JSON", "not JSON"),
        (b"\xff", 400, "INVALID_JSON", ""),
        (b"[" * 100_000, 400, "INVALID_JSON", ""),
        (b"[]", 400, "INVALID_JSON", "body: expected object, got array"),
        ({"email": 1, "password": "x"}, 400, "INVALID_JSON", "email: expected str, got int"),
        (b"", 422, "UNPROCESSABLE", "field 'email' is missing"),
        ({"email": "a@b"}, 422, "UNPROCESSABLE", "field 'password' is missing"),
        ({**ANN, "is_admin": True}, 422, "UNPROCESSABLE", "no field 'is_admin'; known: email, password"),
        ({**ANN, "email": "x" * 255}, 422, "UNPROCESSABLE", "email"),
        ({**ANN, "email": "a\0@b"}, 422, "UNPROCESSABLE", "NUL"),
        ({**ANN, "email": "nobody"}, 422, "UNPROCESSABLE", "not an e-mail address"),
        ({**ANN, "password": "short"}, 422, "UNPROCESSABLE", "8 to 256"),
        ({**ANN, "password": "password1"}, 422, "UNPROCESSABLE", "commonest"),
        ({**ANN, "password": ANN["email"]}, 422, "UNPROCESSABLE", "e-mail address"),
    ],
)
async def test_a_bad_body_is_told_what_is_wrong(api: Api, body: Any, status: int, code: str, named: str) -> None:
    given, told = await api.call("POST", f"{AUTH}/register", body)
    assert (given, told["code"]) == (status, code)
    assert named in told["error"]


async def test_an_address_is_taken_once(api: Api) -> None:
    await api.call("POST", f"{AUTH}/register", ANN)
    status, told = await api.call("POST", f"{AUTH}/register", ANN | {"email": "ANN@example.com"})
    assert (status, told["code"]) == (409, "CONFLICT")


async def test_refreshing_gives_new_tokens_and_an_old_one_ends_the_session(api: Api) -> None:
    person = await api.person()
    old = {"refresh_token": person.refresh_token}
    status, told = await api.call("POST", f"{AUTH}/refresh", old)
    assert (status, told["user"]["id"]) == (200, person.id)
    assert (await api.call("GET", PROFILE, headers=bearer(told["tokens"])))[0] == 200
    assert (await api.call("POST", f"{AUTH}/refresh", old))[0] == 401
    assert (await api.call("GET", PROFILE, headers=bearer(told["tokens"])))[0] == 401
    new = {"refresh_token": told["tokens"]["refresh_token"]}
    assert (await api.call("POST", f"{AUTH}/refresh", new))[0] == 401


async def test_an_access_token_refreshes_nothing_and_a_refresh_token_opens_nothing(api: Api) -> None:
    person = await api.person()
    assert (await api.call("POST", f"{AUTH}/refresh", {"refresh_token": person.access_token}))[0] == 401
    assert (await api.call("GET", PROFILE, headers={"Authorization": f"Bearer {person.refresh_token}"}))[0] == 401


async def test_logging_out_ends_one_session_and_no_other(api: Api) -> None:
    person = await api.person()
    _, other = await api.call("POST", f"{AUTH}/login", {"email": person.email, "password": PASSWORD})
    assert (await api.call("POST", f"{AUTH}/logout", headers=person.by_token))[0] == 200
    assert (await api.call("GET", PROFILE, headers=person.by_token))[0] == 401
    assert (await api.call("POST", f"{AUTH}/refresh", {"refresh_token": person.refresh_token}))[0] == 401
    assert (await api.call("GET", PROFILE, headers=bearer(other["tokens"])))[0] == 200


async def test_a_new_password_ends_all_sessions_but_the_new_one(api: Api) -> None:
    person = await api.person()
    body = {"current_password": PASSWORD, "new_password": "another horse battery"}
    status, told = await api.call("POST", f"{AUTH}/password", body, person.by_token)
    assert status == 200
    assert (await api.call("GET", PROFILE, headers=person.by_token))[0] == 401
    assert (await api.call("GET", PROFILE, headers=bearer(told["tokens"])))[0] == 200
    assert (await api.call("GET", PROFILE, headers=person.by_key))[0] == 200
    assert (await api.call("POST", f"{AUTH}/login", {"email": person.email, "password": PASSWORD}))[0] == 401


async def test_guessing_is_slowed_down_by_account_and_address(api: Api) -> None:
    person = await api.person()
    wrong, right = ({"email": person.email, "password": each} for each in ("wrong password", PASSWORD))
    at_home, elsewhere = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.1, 198.51.100.1"}
    assert [(await api.call("POST", f"{AUTH}/login", wrong, at_home))[0] for _ in range(5)] == [401] * 5
    async with api.client.post(f"{AUTH}/login", data=json.dumps(right), headers=at_home) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        assert (await answer.json())["code"] == "RATE_LIMITED"
    assert (await api.call("POST", f"{AUTH}/login", right, elsewhere))[0] == 200


async def test_a_weak_new_password_is_no_way_to_reset_the_count(api: Api) -> None:
    person = await api.person()
    wrong = {"email": person.email, "password": "wrong password"}
    for _ in range(4):
        await api.call("POST", f"{AUTH}/login", wrong)
        await api.call("POST", f"{AUTH}/register", {"email": person.email, "password": "short"})
    await api.call("POST", f"{AUTH}/login", wrong)
    assert (await api.call("POST", f"{AUTH}/login", wrong))[0] == 429
    assert len(api.client.app[ATTEMPTS]._addresses) == 1


trusting = pytest.mark.parametrize("settings", [build({"server": {"trusted_proxies": ["10.0.0.0/8"]}})])


@trusting
async def test_behind_a_trusted_proxy_the_client_is_who_it_names(api: Api, settings: Config) -> None:
    person = await api.person()
    wrong = {"email": person.email, "password": "wrong password"}
    for chain in ("6.6.6.6, 192.0.2.1, 10.0.0.9", "192.0.2.1, 10.1.1.1", "192.0.2.1"):
        for _ in range(2):
            status, _ = await api.call("POST", f"{AUTH}/login", wrong, {"X-Forwarded-For": chain})
    assert status == 429


async def test_two_credentials_that_differ_are_refused(api: Api) -> None:
    person = await api.person()
    status, told = await api.call("GET", PROFILE, headers=person.by_key | person.by_token)
    assert (status, told["code"]) == (400, "BAD_REQUEST")
    twice = person.by_key | {"Authorization": f"Bearer {person.api_key}"}
    assert (await api.call("GET", PROFILE, headers=twice))[0] == 200


async def test_who_may_not_call_does_not_learn_what_the_call_takes(api: Api) -> None:
    for body in (b"{", {"nix": 1}):
        assert (await api.call("POST", f"{AUTH}/apikey", body))[0] == 401


async def test_what_is_secret_is_not_cached(api: Api) -> None:
    person = await api.person()
    async with api.client.get(PROFILE, headers=person.by_token) as answer:
        assert answer.headers["Cache-Control"] == "no-store"


async def test_a_blocked_user_is_out_at_once_and_an_admin_lets_them_in(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    path = f"/api/v1/admin/users/{person.id}"
    for is_active, status in ((False, 401), (True, 200)):
        given, told = await api.call("PATCH", path, {"is_active": is_active}, admin.by_token)
        assert (given, told["is_active"], told["id"]) == (200, is_active, person.id)
        for headers in (person.by_key, person.by_token):
            assert (await api.call("GET", PROFILE, headers=headers))[0] == status
    async with api.store.reading() as connection:
        rows = (await connection.execute(select(audit).order_by(audit.c.seq))).all()
    assert [(row.actor_user_id, row.action, row.subject_id, row.detail) for row in rows] == [
        (admin.id, "user.change", person.id, {"is_active": is_active}) for is_active in (False, True)
    ]


async def test_a_right_given_by_an_admin_counts_at_once_and_so_does_its_loss(api: Api) -> None:
    admin, person = await api.person(is_admin=True), await api.person()
    for is_admin, status in ((True, 200), (False, 403)):
        await api.call("PATCH", f"/api/v1/admin/users/{person.id}", {"is_admin": is_admin}, admin.by_token)
        assert (await api.call("GET", "/api/v1/admin/users", headers=person.by_token))[0] == status


async def test_no_admin_shuts_themselves_out(api: Api) -> None:
    admin = await api.person(is_admin=True)
    for body in ({"is_active": False}, {"is_admin": False}):
        status, told = await api.call("PATCH", f"/api/v1/admin/users/{admin.id}", body, admin.by_token)
        assert (status, told["code"]) == (409, "CONFLICT")
    assert (await api.call("PATCH", f"/api/v1/admin/users/{admin.id}", {}, admin.by_token))[0] == 422
    assert (await api.call("PATCH", "/api/v1/admin/users/nix", {"is_active": True}, admin.by_token))[0] == 404


LISTS = [route.path for route in TABLE if "cursor" in route.query and "{" not in route.path]


async def test_a_cursor_that_belongs_to_no_list_is_refused_by_all(api: Api) -> None:
    admin = await api.person(is_admin=True)
    assert len(LISTS) >= 8
    for path in LISTS:
        for cursor in ("x", "next", "%3Cb%3E0123456789abcdef", "%C3%A9", "1" * 65):
            status, told = await api.call("GET", f"{path}?cursor={cursor}", headers=admin.by_token)
            assert (status, told["code"], "cursor" in told["error"]) == (422, "UNPROCESSABLE", True), path


async def test_the_cursor_of_a_row_that_has_gone_still_works(api: Api) -> None:
    admin = await api.person(is_admin=True)
    for cursor in (str(uuid4()), f"pay_{uuid4().hex}", f"gpx123abc-{uuid4().hex[:16]}", "17"):
        status, told = await api.call("GET", f"/api/v1/admin/users?cursor={cursor}", headers=admin.by_token)
        assert (status, told["data"]) == (200, [])


async def test_users_are_listed_page_by_page(api: Api) -> None:
    people = [await api.person(is_admin=number == 0) for number in range(5)]
    seen, query = [], "?limit=2"
    while query:
        _, told = await api.call("GET", f"/api/v1/admin/users{query}", headers=people[0].by_token)
        seen += [user["id"] for user in told["data"]]
        query = f"?limit=2&cursor={told['next_cursor']}" if "next_cursor" in told else ""
    assert seen == [person.id for person in people]
    for query in ("?limit=0", "?limit=1001", "?cursor=" + "x" * 65):
        assert (await api.call("GET", f"/api/v1/admin/users{query}", headers=people[0].by_token))[0] == 422
    assert (await api.call("GET", "/api/v1/admin/users?cursor=%00", headers=people[0].by_token))[0] == 400
