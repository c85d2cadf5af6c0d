"""Guessing passwords: slower and slower, but nobody is shut out for good."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gpuproxy.access.attempts import (
    ADDRESS_FAILURES_MAX,
    ADDRESS_WINDOW_S,
    DELAY_S_MAX,
    FREE_FAILURES,
    REMEMBERED_MAX,
    WINDOW_S,
    Attempts,
)
from gpuproxy.errors import GatewayError

HOME, CAFE = "192.0.2.1", "198.51.100.7"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def wait_s(attempts: Attempts, account: str, address: str) -> int:
    """Try once; return how long one is told to wait, 0 if the attempt may go on."""
    try:
        attempts.begin(account, address)
    except GatewayError as error:
        return error.retry_after_s or -1
    return 0


def test_after_five_failures_each_costs_twice_the_wait() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    assert [wait_s(attempts, "ann", HOME) for _ in range(FREE_FAILURES)] == [0] * 5
    waited = []
    for _ in range(5):
        waited.append(wait_s(attempts, "ann", HOME))
        clock.now_s += waited[-1]
        assert wait_s(attempts, "ann", HOME) == 0
    assert waited == [1, 2, 4, 8, 16]


def test_the_wait_has_an_end() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    for _ in range(30):
        clock.now_s += wait_s(attempts, "ann", HOME)
    assert wait_s(attempts, "ann", HOME) <= DELAY_S_MAX
    clock.now_s += WINDOW_S
    assert wait_s(attempts, "ann", HOME) == 0


def test_a_stranger_does_not_shut_the_owner_out() -> None:
    attempts = Attempts(Clock())
    while wait_s(attempts, "ann", CAFE) == 0:
        pass
    assert wait_s(attempts, "ann", HOME) == 0


def test_one_address_cannot_try_many_accounts() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    assert {wait_s(attempts, f"user{number}", HOME) for number in range(ADDRESS_FAILURES_MAX)} == {0}
    assert wait_s(attempts, "another", HOME) == ADDRESS_WINDOW_S
    assert wait_s(attempts, "another", CAFE) == 0
    clock.now_s += ADDRESS_WINDOW_S
    assert wait_s(attempts, "another", HOME) == 0


def test_who_is_right_may_log_in_as_often_as_they_like() -> None:
    attempts = Attempts(Clock())
    for _ in range(200):
        attempts.begin("ann", HOME)
        attempts.forgive("ann", HOME)
    assert wait_s(attempts, "ann", HOME) == 0


def test_being_right_forgives_no_failures_with_other_accounts() -> None:
    attempts = Attempts(Clock())
    for number in range(ADDRESS_FAILURES_MAX - 1):
        attempts.begin(f"user{number}", HOME)
    for _ in range(3):
        attempts.begin("own", HOME)
        attempts.forgive("own", HOME)
    attempts.begin("one", HOME)
    assert wait_s(attempts, "two", HOME) > 0


@pytest.mark.parametrize(
    ("one", "other"), [("2001:db8::1", "2001:db8::ffff:2"), ("::ffff:192.0.2.1", "192.0.2.1"), ("", "")]
)
def test_one_customers_many_addresses_are_one(one: str, other: str) -> None:
    attempts = Attempts(Clock())
    for _ in range(FREE_FAILURES):
        attempts.begin("ann", one)
    assert wait_s(attempts, "ann", other) > 0


@given(some.lists(some.tuples(some.sampled_from("abc"), some.integers(0, 2000)), max_size=80))
def test_no_pause_lets_through_more_than_the_address_may(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    attempts = Attempts(clock)
    passed: list[float] = []
    for account, pause_s in steps:
        clock.now_s += pause_s / 100
        if wait_s(attempts, account, HOME) == 0:
            passed.append(clock.now_s)
    assert len(passed) <= ADDRESS_FAILURES_MAX


def test_the_memory_is_bounded() -> None:
    attempts = Attempts(Clock())
    for number in range(REMEMBERED_MAX + 10):
        attempts.begin(f"user{number}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(attempts._accounts) == len(attempts._addresses) == REMEMBERED_MAX
