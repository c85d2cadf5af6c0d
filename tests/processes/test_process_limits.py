"""A key's own limit of requests per minute, over all workers of a gateway."""

import asyncio
from collections import Counter

import requests
from callers import CHAT, Caller
from conftest import MakeCaller, MakePlace
from gateways import running

LIMIT = 30
CALLERS = 24
CALLS_EACH = 10


async def _many(caller: Caller) -> list[int]:
    return [(await caller.post(CHAT)).status for _ in range(CALLS_EACH)]


async def test_no_more_than_the_limit_pass_over_all_workers(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place(server={"workers": 2})
    with running(here) as gateway:
        here.key = here.command("key", "create", "--user", "caller@example.com", "--rpm", str(LIMIT))
        callers = [new_caller(gateway) for _ in range(CALLERS)]
        statuses = Counter(status for row in await asyncio.gather(*map(_many, callers)) for status in row)
        assert statuses == {200: LIMIT, 429: CALLERS * CALLS_EACH - LIMIT}
        refused = await new_caller(gateway).post(CHAT)
        assert refused.status == 429
        assert gateway.stop() == 0


async def test_a_key_with_the_limit_zero_is_not_limited(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place(server={"workers": 1})
    with running(here) as gateway:
        here.key = here.command("key", "create", "--user", "caller@example.com", "--rpm", "0")
        statuses = Counter(await _many(new_caller(gateway)) * 1)
        assert statuses == {200: CALLS_EACH}
        assert gateway.stop() == 0


async def test_answers_tell_the_limit_and_a_refusal_when_to_come_back(place: MakePlace) -> None:
    here = place(server={"workers": 1})
    with running(here) as gateway:
        key = here.command("key", "create", "--user", "caller@example.com", "--rpm", "2")
        answers = [await asyncio.to_thread(_call, gateway.port, key) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["X-RateLimit-Limit"] for answer in answers] == ["2", "2", "2"]
        assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["1", "0", "0"]
        wait_s = int(answers[2].headers["Retry-After"])
        assert 0 < wait_s <= 60
        assert int(answers[2].headers["X-RateLimit-Reset"]) <= 61
        assert answers[2].json()["error"]["type"] == "rate_limit_error"
        assert gateway.stop() == 0


def _call(port: int, key: str) -> requests.Response:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return requests.post(url, json=CHAT, headers={"Authorization": f"Bearer {key}"}, timeout=10)
