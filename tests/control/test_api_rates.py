"""Requests per minute to the management API: of a user, or of a key with a limit of its own."""

import pytest

from gpuproxy.access.accounts import create_key
from gpuproxy.access.callers import Caller
from gpuproxy.config import Config, Rates, build
from gpuproxy.control import rates
from gpuproxy.control.rates import ApiRates

from .conftest import Api

PROFILE = "/api/v1/user/profile"
SECOND_NS = 10**9


@pytest.fixture
async def settings() -> Config:
    return build({"rates": {"requests_per_minute": 3}})


async def _ask(api: Api, headers: dict[str, str]) -> tuple[int, str | None, str | None]:
    async with api.client.get(PROFILE, headers=headers) as answer:
        return answer.status, answer.headers.get("X-RateLimit-Limit"), answer.headers.get("X-RateLimit-Remaining")


async def test_all_credentials_of_a_user_share_one_limit(api: Api) -> None:
    person, other = await api.person(), await api.person()
    found = [await _ask(api, headers) for headers in (person.by_key, person.by_token, person.by_key, person.by_token)]
    assert found == [(200, "3", "2"), (200, "3", "1"), (200, "3", "0"), (429, "3", "0")]
    assert await _ask(api, other.by_key) == (200, "3", "2")


async def test_a_refusal_says_when_to_come_back(api: Api) -> None:
    person = await api.person()
    for _ in range(3):
        await _ask(api, person.by_key)
    async with api.client.get(PROFILE, headers=person.by_key) as answer:
        assert (await answer.json())["code"] == "RATE_LIMITED"
        assert 0 < int(answer.headers["Retry-After"]) <= 60
        assert int(answer.headers["X-RateLimit-Reset"]) <= 61


async def test_the_override_raises_up_to_the_ceiling_of_the_key_and_no_further(api: Api) -> None:
    person = await api.person()
    secret, _ = await create_key(api.store, person.email, rpm=2, rpm_ceiling=5)
    raised = {"X-API-Key": secret, "X-Rate-Limit-Override": "1000"}
    assert [await _ask(api, raised) for _ in range(6)] == [
        *((200, "5", str(left)) for left in (4, 3, 2, 1, 0)),
        (429, "5", "0"),
    ]


async def test_the_override_of_who_has_no_ceiling_is_ignored(api: Api) -> None:
    person = await api.person()
    for wish in ("1000", "odd"):
        assert (await _ask(api, {**person.by_key, "X-Rate-Limit-Override": wish}))[:2] == (200, "3")


@pytest.mark.parametrize("wish", ["0", "-1", "odd", "1.5", "2147483649", ""])
async def test_an_override_that_is_no_number_is_refused(api: Api, wish: str) -> None:
    secret, _ = await create_key(api.store, (await api.person()).email, rpm_ceiling=5)
    assert (await _ask(api, {"X-API-Key": secret, "X-Rate-Limit-Override": wish}))[0] == 400


async def test_a_key_without_a_limit_is_not_limited(api: Api) -> None:
    secret, _ = await create_key(api.store, (await api.person()).email, rpm=0)
    assert {await _ask(api, {"X-API-Key": secret}) for _ in range(5)} == {(200, None, None)}


def test_what_is_older_than_a_minute_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SUBJECTS_MAX", 2)
    counts, caller = ApiRates(Rates(1)), Caller("u", "", ())
    passed = [counts.count(caller, 0, second * SECOND_NS) for second in (0, 30, 61, 62)]
    assert [each is not None and each[0] for each in passed] == [True, False, True, False]
    for number in range(9):
        counts.count(Caller(f"u{number}", "", ()), 0, (100 + 61 * number) * SECOND_NS)
    assert len(counts._windows) <= 2
