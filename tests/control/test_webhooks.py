"""Webhooks through the management API: the guide's samples, secrets, limits, deliveries."""

import asyncio
from typing import Any

import pytest
from postgres import who_waits
from sqlalchemy import delete, select, update

from gpuproxy.config import Config, build
from gpuproxy.events.outbox import record
from gpuproxy.store.schema import deliveries, webhooks

from .conftest import Api

HOOKS = "/api/v1/webhooks"
SAMPLE = b"""{
    "url": "https://your-system.com/webhook",
    "events": ["instance.created", "instance.destroyed", "payment.completed"],
    "secret": "webhook-secret-for-verification"
  }"""
BILLING_SAMPLE = b"""{
    "url": "https://your-billing-system.com/webhook",
    "events": ["payment.success", "payment.failed", "subscription.renewed"]
  }"""
CURL_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
async def settings() -> Config:
    return build({"webhooks": {"per_account_max": 3}})


async def make(api: Api, body: Any, headers: dict[str, str], path: str = HOOKS) -> dict[str, Any]:
    status, told = await api.call("POST", path, body, headers)
    assert status == 201, told
    return dict(told)


async def test_the_sample_of_the_guide_makes_a_webhook(api: Api) -> None:
    ann = await api.person()
    made = await make(api, SAMPLE, {**ann.by_key, "Content-Type": "application/json"})
    assert made["secret"] == "webhook-secret-for-verification"
    assert sorted(made["events"]) == ["instance.created", "instance.destroyed", "payment.completed"]
    _, listed = await api.call("GET", HOOKS, None, ann.by_key)
    assert (listed["count"], listed["data"][0]["id"]) == (1, made["id"])
    assert "secret" not in listed["data"][0]


async def test_the_billing_sample_makes_one_though_curl_calls_it_a_form(api: Api) -> None:
    ann = await api.person()
    made = await make(api, BILLING_SAMPLE, {**ann.by_key, **CURL_FORM}, f"{HOOKS}/billing")
    assert (made["kind"], made["secret"][:6]) == ("billing", "whsec_")
    _, listed = await api.call("GET", f"{HOOKS}/billing", None, ann.by_key)
    assert listed["data"][0]["events"] == ["payment.failed", "payment.success", "subscription.renewed"]


async def test_a_secret_is_nowhere_in_the_store(api: Api) -> None:
    ann = await api.person()
    made = await make(api, BILLING_SAMPLE, ann.by_key, f"{HOOKS}/billing")
    async with api.store.reading() as connection:
        row = (await connection.execute(select(webhooks))).one()
    assert made["secret"].encode() not in row.secret
    assert made["secret"] not in repr(tuple(row))


async def test_an_event_that_is_not_known_is_told_the_known_ones(api: Api) -> None:
    ann = await api.person()
    for path, name in (
        (HOOKS, "instance.borrowed"),
        (f"{HOOKS}/billing", "instance.created"),
        (HOOKS, "gpu.available"),
    ):
        status, told = await api.call("POST", path, {"url": "https://x.example", "events": [name]}, ann.by_key)
        assert (status, told["code"]) == (422, "UNPROCESSABLE")
        assert repr(name) in told["error"]
        assert "payment.success" in told["error"]


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://127.0.0.1/x", 403), ("http://[::1]/x", 403), ("http://10.0.0.1/x", 403),
        ("https://x.example:22/", 403),
        ("ftp://x.example/", 400), ("https://user:pw@x.example/", 400), ("https://x.example/ x", 400),
    ],
)  # fmt: skip
async def test_a_url_that_no_attempt_could_use_is_refused_at_once(api: Api, url: str, status: int) -> None:
    ann = await api.person()
    told = await api.call("POST", HOOKS, {"url": url, "events": ["*"]}, ann.by_key)
    assert (told[0], told[1]["error"][:3]) == (status, "url")
    made = await make(api, {"url": "https://x.example/", "events": ["*"]}, ann.by_key)
    assert (await api.call("PATCH", f"{HOOKS}/{made['id']}", {"url": url}, ann.by_key))[0] == status


async def test_an_account_has_so_many_webhooks_and_no_more(api: Api) -> None:
    ann = await api.person()
    for _ in range(3):
        await make(api, SAMPLE, ann.by_key)
    status, told = await api.call("POST", HOOKS, SAMPLE, ann.by_key)
    assert (status, told["code"]) == (409, "CONFLICT")


async def test_a_repeated_call_makes_one_and_shows_its_secret_again(api: Api) -> None:
    ann = await api.person()
    headers = {**ann.by_key, "Idempotency-Key": "once"}
    first, second = [await make(api, BILLING_SAMPLE, headers, f"{HOOKS}/billing") for _ in range(2)]
    assert first == second


async def test_a_webhook_is_changed_and_switched_off_and_on(api: Api) -> None:
    ann = await api.person()
    made = await make(api, SAMPLE, ann.by_key)
    path = f"{HOOKS}/{made['id']}"
    status, told = await api.call("PATCH", path, {"events": ["*"], "description": "d"}, ann.by_key)
    assert (status, told["events"], told["description"], told["url"]) == (200, ["*"], "d", made["url"])
    await api.call("POST", f"{path}/test", None, ann.by_key)
    _, told = await api.call("PATCH", path, {"enabled": False}, ann.by_key)
    assert (told["enabled"], told["disabled_reason"]) == (False, "you disabled it")
    _, listed = await api.call("GET", f"{path}/deliveries", None, ann.by_key)
    assert [each["state"] for each in listed["data"]] == ["cancelled"]
    status, told = await api.call("POST", f"{path}/test", None, ann.by_key)
    assert (status, told["code"]) == (409, "CONFLICT")
    _, told = await api.call("PATCH", path, {"enabled": True}, ann.by_key)
    assert told["enabled"] is True
    assert (await api.call("DELETE", path, None, ann.by_key))[0] == 200
    assert (await api.call("GET", path, None, ann.by_key))[0] == 404


async def test_of_changes_at_once_each_is_whole(api: Api) -> None:
    ann = await api.person()
    path = f"{HOOKS}/{(await make(api, SAMPLE, ann.by_key))['id']}"
    wished = [["payment.failed", "credits.low"], ["payment.failed", "credits.added"]]
    for _ in range(3):
        calls = (api.call("PATCH", path, {"events": wished[at % 2]}, ann.by_key) for at in range(6))
        assert {status for status, _ in await asyncio.gather(*calls)} == {200}
        _, told = await api.call("GET", path, None, ann.by_key)
        assert set(told["events"]) in map(set, wished)


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("what", ["test", "events", "rotate-secret"])
async def test_what_is_deleted_meanwhile_is_not_found(api: Api, what: str) -> None:
    ann = await api.person()
    path = f"{HOOKS}/{(await make(api, SAMPLE, ann.by_key))['id']}"
    body = {"events": ["*"]} if what == "events" else {} if what == "rotate-secret" else None
    asked = ("PATCH", path, body) if what == "events" else ("POST", f"{path}/{what}", body)
    async with api.store.writing() as connection:
        await connection.execute(delete(webhooks))
        asking = asyncio.create_task(api.call(*asked, ann.by_key))
        await who_waits(api.store)
    assert (await asking)[0] == 404


async def test_a_rotated_secret_leaves_the_old_one_until_the_overlap_ends(api: Api) -> None:
    ann = await api.person()
    made = await make(api, SAMPLE, ann.by_key)
    rotated = await make(api, {"overlap_s": 60}, ann.by_key, f"{HOOKS}/{made['id']}/rotate-secret")
    assert rotated["secret"] != made["secret"]
    assert rotated["old_secret_until"] is not None
    async with api.store.reading() as connection:
        row = (await connection.execute(select(webhooks))).one()
    assert row.secret
    assert len(row.old_secrets) == 1
    assert made["secret"] not in str(row.old_secrets)


async def test_deliveries_are_listed_in_pages_and_by_state(api: Api) -> None:
    ann = await api.person()
    made = await make(api, SAMPLE, ann.by_key)
    async with api.store.writing() as connection:
        for n in range(5):
            await connection.run_sync(record, "instance.created", ann.id, {"n": n})
        await connection.execute(update(deliveries).where(deliveries.c.id == 2).values(state="dead"))
    path = f"{HOOKS}/{made['id']}/deliveries"
    _, first = await api.call("GET", f"{path}?limit=3", None, ann.by_key)
    _, rest = await api.call("GET", f"{path}?limit=3&cursor={first['next_cursor']}", None, ann.by_key)
    assert [each["id"] for each in first["data"] + rest["data"]] == ["5", "4", "3", "2", "1"]
    _, dead = await api.call("GET", f"{path}?state=dead", None, ann.by_key)
    assert [each["id"] for each in dead["data"]] == ["2"]
    assert (await api.call("GET", f"{path}?state=lost", None, ann.by_key))[0] == 422
    status, told = await api.call("POST", f"{HOOKS}/deliveries/2/replay", None, ann.by_key)
    assert (status, told["state"], told["attempts"]) == (202, "pending", 0)
    status, told = await api.call("POST", f"{HOOKS}/deliveries/1/replay", None, ann.by_key)
    assert (status, told["code"]) == (409, "CONFLICT")
    for delivery_id in ("99", "x", "9" * 30, "-1"):
        assert (await api.call("POST", f"{HOOKS}/deliveries/{delivery_id}/replay", None, ann.by_key))[0] == 404
