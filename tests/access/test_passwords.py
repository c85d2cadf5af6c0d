"""Passwords: which are taken, and that hashing neither blocks nor tells who has an account."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher

import gpuproxy.access
from gpuproxy.access.passwords import CHARACTERS_MIN, HASHES_AT_ONCE, QUEUE_MAX, Hasher, check_password
from gpuproxy.errors import GatewayError

EMAIL = "ann.miller@example.com"
GOOD = "correct horse battery staple"


@pytest.fixture
def hasher() -> Iterator[Hasher]:
    opened = Hasher()
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "password",
    [
        "",
        "1234567",
        "x" * 257,
        "password",
        "PassWord1",
        "zzzzzzzzzz",
        EMAIL,
        EMAIL.upper(),
        "ann.miller",
        "ｐａｓｓｗｏｒｄ",
    ],
)
def test_a_password_that_is_tried_first_is_refused(password: str) -> None:
    with pytest.raises(GatewayError) as caught:
        check_password(password, EMAIL)
    assert (caught.value.code, caught.value.param) == ("UNPROCESSABLE", "password")


@pytest.mark.parametrize("password", [GOOD, "ann.miller2-xk", "пароль-из-слов", "        9       "])
def test_any_other_password_is_taken(password: str) -> None:
    check_password(password, EMAIL)


def test_the_list_holds_nothing_that_its_length_refuses_already() -> None:
    words = Path(gpuproxy.access.__path__[0], "common_passwords.txt").read_text().split()
    assert len(words) >= 200
    assert all(len(word) >= CHARACTERS_MIN and word == word.lower() for word in words)


async def test_only_the_right_password_opens(hasher: Hasher) -> None:
    stored = await hasher.hash(GOOD)
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await hasher.is_right(stored, GOOD)
    assert not await hasher.is_right(stored, GOOD + " ")
    assert not await hasher.is_right("no hash", GOOD)


async def test_a_password_opens_however_its_letters_are_composed(hasher: Hasher) -> None:
    assert await hasher.is_right(await hasher.hash("Zu\u0308rich-Zu\u0308rich"), "Z\u00fcrich-Z\u00fcrich")


async def test_nobody_has_no_password(hasher: Hasher) -> None:
    for password in ("", GOOD):
        assert not await hasher.is_right(None, password)


async def test_an_unknown_account_takes_as_long_as_a_known_one(hasher: Hasher) -> None:
    stored = await hasher.hash(GOOD)
    await hasher.is_right(None, "warm")
    taken: dict[str | None, list[float]] = {stored: [], None: []}
    for _ in range(15):
        for held, times in taken.items():
            began_s = time.process_time()  # other work on the machine does not matter
            await hasher.is_right(held, "wrong password")
            times.append(time.process_time() - began_s)
    known_s, unknown_s = (statistics.median(times) for times in taken.values())
    assert 0.5 < known_s / unknown_s < 2


async def test_a_full_queue_is_told_to_come_back(hasher: Hasher) -> None:
    waiting = [asyncio.create_task(hasher.is_right(None, GOOD)) for _ in range(QUEUE_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(GatewayError) as caught:
        await hasher.hash(GOOD)
    assert (caught.value.code, caught.value.retry_after_s) == ("UNAVAILABLE", 2)
    waiting.pop().cancel()
    with pytest.raises(GatewayError):  # its thread works on
        await hasher.hash(GOOD)
    assert await asyncio.gather(*waiting) == [False] * (QUEUE_MAX - 1)
    assert HASHES_AT_ONCE == 2


async def test_a_hash_made_with_less_work_is_outdated(hasher: Hasher) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=8_192, parallelism=1).hash(GOOD)
    assert hasher.is_outdated(weak)
    assert not hasher.is_outdated(await hasher.hash(GOOD))
