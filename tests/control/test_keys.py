"""API keys over HTTP: made once, shown once, rotated, revoked."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text

from gpuproxy.access import keys
from gpuproxy.access.grants import grant_for
from gpuproxy.codec.key import digest_of, is_well_formed
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys

from .conftest import Api, Person

KEYS = "/api/v1/auth/apikey"


async def is_good(store: Store, secret: str) -> bool:
    return await grant_for(store, digest_of(secret.encode())) is not None


async def count_of_keys(store: Store) -> int:
    async with store.reading() as connection:
        return await connection.scalar(select(func.count()).select_from(api_keys)) or 0


async def test_the_guides_call_makes_a_key(api: Api) -> None:
    person = await api.person()
    status, told = await api.call("POST", KEYS, {"name": "New Key"}, person.by_token)
    assert (status, told["status"], told["name"], told["scopes"]) == (
        201,
        "success",
        "New Key",
        ["inference", "account"],
    )
    assert told["data"]["api_key"] == told["api_key"]
    assert is_well_formed(told["api_key"].encode())
    assert await is_good(api.store, told["api_key"])
    assert (await api.call("DELETE", f"{KEYS}/{told['id']}", headers=person.by_token))[0] == 200
    assert not await is_good(api.store, told["api_key"])


async def test_a_key_is_as_it_was_wished(api: Api) -> None:
    person = await api.person()
    wish = {"name": "k", "scopes": ["inference"], "models": ["m1"], "expires_days": 7}
    _, told = await api.call("POST", KEYS, wish, person.by_token)
    assert (told["scopes"], told["models"], told["rpm"]) == (["inference"], ["m1"], None)
    life = datetime.fromisoformat(told["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=6.9) < life <= timedelta(days=7)
    grant = await grant_for(api.store, digest_of(told["api_key"].encode()))
    assert grant is not None
    assert (grant.scopes, grant.models) == (("inference",), ("m1",))


@pytest.mark.parametrize(
    ("wish", "status", "named"),
    [
        ({"scopes": ["all"]}, 422, "no scope 'all'; known: inference, account, read, admin"),
        ({"scopes": []}, 422, "scopes"),
        ({"scopes": ["admin"]}, 403, "scopes: a key may do no more"),
        ({"models": [""]}, 422, "models"),
        ({"models": []}, 422, "models"),
        ({"tools": []}, 422, "tools"),
        ({"tools": ["search"]}, 422, "'search' is no rule; write server/tool"),
        ({"tools": ["a/b"] * 257}, 422, "tools"),
        ({"expires_days": 0}, 422, "expires_days"),
        ({"expires_days": 1.5}, 400, "expires_days: expected int | null, got float"),
        ({"rpm": 0}, 403, "rpm"),
        ({"rpm": 5}, 403, "rpm"),
        ({"rpm_ceiling": 5}, 403, "rpm_ceiling"),
        ({"tpm": 5}, 403, "tpm"),
        ({"streams": 5}, 403, "streams"),
        ({"streams": -1}, 422, "streams"),
        ({"rpm": -1}, 422, "rpm"),
        ({"name": "x" * 101}, 422, "name"),
        ({"name": "a\nb"}, 422, "name"),
        ({"user_id": "x"}, 422, "no field 'user_id'"),
        ({"revoked_at": None}, 422, "no field 'revoked_at'"),
    ],
)
async def test_a_bad_wish_is_named(api: Api, wish: Any, status: int, named: str) -> None:
    given, told = await api.call("POST", KEYS, wish, (await api.person()).by_token)
    assert (given, named in told["error"]) == (status, True), told


async def test_a_key_makes_keys_within_its_own_bounds(api: Api) -> None:
    person = await api.person()
    wish = {"models": ["m1"], "expires_days": 1}
    _, parent = await api.call("POST", KEYS, wish, person.by_token)
    by_parent = {"X-API-Key": parent["api_key"]}
    _, child = await api.call("POST", KEYS, {}, by_parent)
    assert (child["models"], child["expires_at"]) == (["m1"], parent["expires_at"])
    for wish in ({"models": ["m2"]}, {"expires_days": 2}):
        assert (await api.call("POST", KEYS, wish, by_parent))[0] == 403
    assert (await api.call("POST", f"{KEYS}/{person.key_id}/rotate", {}, by_parent))[0] == 403


async def test_a_key_may_be_bound_to_tools_and_binds_those_it_makes(api: Api) -> None:
    person = await api.person()
    status, parent = await api.call("POST", KEYS, {"tools": ["web/*", "docs/read"]}, person.by_token)
    assert (status, parent["tools"]) == (201, ["web/*", "docs/read"])
    grant = await grant_for(api.store, digest_of(parent["api_key"].encode()))
    assert grant is not None
    assert grant.tools == ("web/*", "docs/read")
    by_parent = {"X-API-Key": parent["api_key"]}
    _, child = await api.call("POST", KEYS, {}, by_parent)
    assert child["tools"] == ["web/*", "docs/read"]
    _, child = await api.call("POST", KEYS, {"tools": ["web/search", "web/read_*"]}, by_parent)
    assert child["tools"] == ["web/search", "web/read_*"]
    for wider in (["*/*"], ["docs/*"], ["web/x", "docs/write"]):
        status, told = await api.call("POST", KEYS, {"tools": wider}, by_parent)
        assert (status, told["error"].partition(":")[0]) == (403, "tools")
    _, fresh = await api.call("POST", f"{KEYS}/{parent['id']}/rotate", {}, person.by_token)
    assert fresh["tools"] == ["web/*", "docs/read"]
    _, listed = await api.call("GET", f"{KEYS}/{parent['id']}", headers=person.by_token)
    assert listed["tools"] == ["web/*", "docs/read"]


async def test_an_admin_gives_keys_limits_that_rotating_keeps(api: Api) -> None:
    admin = await api.person(is_admin=True)
    wish = {"rpm": 5, "rpm_ceiling": 50, "tpm": 1000, "streams": 3}
    status, told = await api.call("POST", KEYS, wish, admin.by_token)
    assert (status, {name: told[name] for name in wish}) == (201, wish)
    _, fresh = await api.call("POST", f"{KEYS}/{told['id']}/rotate", {}, admin.by_token)
    assert {name: fresh[name] for name in wish} == wish
    grant = await grant_for(api.store, digest_of(fresh["api_key"].encode()), 100)
    assert grant is not None
    assert (grant.rpm, grant.is_rpm_shared, grant.rpm_ceiling, grant.tpm) == (5, False, 50, 1000)
    assert (grant.streams, grant.is_streams_shared) == (3, False)


async def test_keys_without_limits_share_those_of_their_user(api: Api) -> None:
    grant = await grant_for(api.store, digest_of((await api.person()).api_key.encode()), 100, 7)
    assert grant is not None
    assert (grant.rpm, grant.is_rpm_shared, grant.tpm, grant.is_tpm_shared) == (100, True, 7, True)


async def test_only_an_admin_in_person_makes_keys_for_admins(api: Api) -> None:
    admin = await api.person(is_admin=True)
    status, told = await api.call("POST", KEYS, {"scopes": ["account", "admin"], "rpm": 0}, admin.by_token)
    assert status == 201
    by_key = {"X-API-Key": told["api_key"]}
    assert (await api.call("GET", "/api/v1/admin/users", headers=by_key))[0] == 200
    assert (await api.call("POST", KEYS, {"scopes": ["admin"]}, by_key))[0] == 403


async def test_a_list_shows_keys_without_their_secrets(api: Api) -> None:
    person = await api.person()
    _, made = await api.call("POST", KEYS, {"name": "two"}, person.by_token)
    _, told = await api.call("GET", KEYS, headers=person.by_key)
    assert ([key["id"] for key in told["data"]], told["count"]) == ([person.key_id, made["id"]], 2)
    assert made["api_key"] not in repr(told)
    assert told["data"][1]["prefix"] == made["api_key"][:12]


async def test_revoking_is_done_once_and_answered_each_time(api: Api) -> None:
    person, stranger = await api.person(), await api.person()
    path = f"{KEYS}/{person.key_id}"
    refused = await api.call("DELETE", path, headers=stranger.by_token)
    assert (refused[0], refused[1]["code"]) == (404, "NOT_FOUND")
    told = [await api.call("DELETE", path, headers=person.by_token) for _ in range(2)]
    assert told[0] == told[1]
    assert (told[0][0], told[0][1]["id"]) == (200, person.key_id)
    assert told[0][1]["revoked_at"] is not None


async def test_a_rotated_key_overlaps_for_the_time_stated(api: Api) -> None:
    person = await api.person()
    status, told = await api.call("POST", f"{KEYS}/{person.key_id}/rotate", {"overlap_s": 60}, person.by_token)
    assert (status, told["old_id"]) == (201, person.key_id)
    assert [await is_good(api.store, key) for key in (person.api_key, told["api_key"])] == [True, True]
    left = datetime.fromisoformat(told["old_expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=40) < left <= timedelta(seconds=60)
    path = f"{KEYS}/{told['id']}/rotate"
    _, third = await api.call("POST", path, {"overlap_s": 0}, person.by_token)
    assert [await is_good(api.store, key) for key in (told["api_key"], third["api_key"])] == [False, True]
    assert (await api.call("POST", path, {"overlap_s": -1}, person.by_token))[0] == 422


def once(person: Person, key: str) -> dict[str, str]:
    return person.by_token | {"Idempotency-Key": key}


async def test_a_repeated_call_makes_one_key_and_shows_it_again(api: Api) -> None:
    person = await api.person()
    before = await count_of_keys(api.store)
    answers = []
    for body in (b'{"name":"a","expires_days":5}', b'{"expires_days": 5, "name": "a"}'):
        async with api.client.post(KEYS, data=body, headers=once(person, "one")) as answer:
            answers.append((answer.status, await answer.read(), answer.headers.get("Idempotent-Replayed")))
    (first, body, _), (second, again, replayed) = answers
    assert (first, second, replayed) == (201, 201, "true")
    assert body == again
    assert await count_of_keys(api.store) == before + 1


async def test_another_body_under_the_same_key_is_refused(api: Api) -> None:
    person = await api.person()
    await api.call("POST", KEYS, {"name": "a"}, once(person, "one"))
    assert (await api.call("POST", KEYS, {"name": "b"}, once(person, "one")))[0] == 422
    weaker = person.by_key | {"Idempotency-Key": "one"}
    status, told = await api.call("POST", KEYS, {"name": "a"}, weaker)
    assert (status, "api_key" in told) == (422, False)


async def test_of_racing_calls_one_makes_the_key(api: Api) -> None:
    person = await api.person()
    before = await count_of_keys(api.store)
    told = await asyncio.gather(*(api.call("POST", KEYS, {"name": "a"}, once(person, "one")) for _ in range(6)))
    assert {status for status, _ in told} <= {201, 409}
    assert len({body["api_key"] for status, body in told if status == 201}) == 1
    assert await count_of_keys(api.store) == before + 1


async def test_keys_made_at_once_are_not_more_than_there_may_be(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    person = await api.person()
    monkeypatch.setattr(keys, "KEYS_MAX", 3)  # one is there
    told = await asyncio.gather(*(api.call("POST", KEYS, {}, person.by_token) for _ in range(8)))
    assert sorted(status for status, _ in told) == [201] * 2 + [409] * 6
    assert await count_of_keys(api.store) == 3


async def test_a_call_that_failed_may_be_made_again_with_another_body(api: Api) -> None:
    person = await api.person()
    assert (await api.call("POST", f"{KEYS}/nix/rotate", {}, once(person, "one")))[0] == 404
    assert (await api.call("POST", f"{KEYS}/nix/rotate", {"overlap_s": 1}, once(person, "one")))[0] == 404
    assert (await api.call("POST", KEYS, {}, once(person, "x" * 256)))[0] == 400


async def test_a_kept_answer_does_not_show_its_secret_to_who_reads_the_store(api: Api) -> None:
    person = await api.person()
    _, told = await api.call("POST", KEYS, {}, once(person, "one"))
    async with api.store.reading() as connection:
        for table in ("idempotency", "api_keys"):
            rows = repr([tuple(row) for row in await connection.execute(text(f"SELECT * FROM {table}"))])
            assert told["api_key"] not in rows
            assert told["api_key"][12:] not in rows
