"""The breaker of an endpoint: its states, and what it learns from which call."""

import pytest

from gpuproxy.config.routing import Routing
from gpuproxy.proxy.breaker import (
    ABANDONED,
    ADMITTED,
    BAD,
    CLOSED,
    FAILURES,
    GOOD,
    HALF_OPEN,
    MOVES,
    OPEN,
    STATES,
    TIME,
    TRYING,
    WAIT,
    Replica,
    Replicas,
)

EVENTS = (FAILURES, WAIT, TIME, ADMITTED, GOOD, BAD, ABANDONED)


def fresh(**routing: float) -> tuple[Replicas, Replica]:
    replicas = Replicas(Routing(**{"failures_max": 3, "open_s": 5.0, **routing}), 1.0)  # type: ignore[arg-type]
    return replicas, replicas.get("up", "http://a")


def fail(replica: Replica, count: int = 3) -> None:
    for _ in range(count):
        replica.failed(replica.generation)


def test_every_state_has_a_name_and_a_way_out() -> None:
    assert len(STATES) == len({CLOSED, OPEN, HALF_OPEN, TRYING})
    assert {state for state, _ in MOVES} == set(MOVES.values()) == {CLOSED, OPEN, HALF_OPEN, TRYING}


@pytest.mark.parametrize("state", range(4))
@pytest.mark.parametrize("event", EVENTS)
def test_a_move_that_is_not_in_the_table_raises(state: int, event: int) -> None:
    _, replica = fresh()
    replica.state = state
    if (state, event) in MOVES:
        replica._move(event)
        assert replica.state == MOVES[state, event]
    else:
        with pytest.raises(KeyError):
            replica._move(event)


def test_failures_in_a_row_open_it_and_a_good_answer_between_them_does_not_let_it() -> None:
    _, replica = fresh()
    fail(replica, 2)
    replica.answered(200, 10, replica.generation)
    fail(replica, 2)
    assert replica.admits
    fail(replica, 1)
    assert (replica.state, replica.admits) == (OPEN, False)


@pytest.mark.parametrize(("status", "is_bad"), [(200, False), (404, False), (429, False), (500, False), (502, True)])
def test_an_answer_counts_by_its_status(status: int, is_bad: bool) -> None:
    _, replica = fresh()
    for _ in range(3):
        replica.answered(status, 10, replica.generation)
    assert (replica.state == OPEN) == is_bad


def test_answers_that_begin_late_count_as_failures_when_that_is_asked_for() -> None:
    _, replica = fresh(slow_first_byte_s=0.5)
    for _ in range(3):
        replica.answered(200, 600_000, replica.generation)
    assert replica.state == OPEN


def test_after_its_time_one_call_tries_it() -> None:
    replicas, replica = fresh()
    fail(replica)
    replicas.sweep(5.9)
    assert not replica.admits
    replicas.sweep(6.0)
    assert replica.admits
    generation = replica.begin()
    assert (replica.state, replica.admits) == (TRYING, False), "one call, no second one"
    replica.answered(200, 10, generation)
    assert (replica.state, replica.admits) == (CLOSED, True)
    replica.end(generation)


def test_a_trying_call_that_fails_opens_it_for_longer() -> None:
    replicas, replica = fresh()
    fail(replica)
    now_s = 1.0
    for expected_s in (5, 10, 20, 40, 60, 60):
        assert replica.open_until_s - now_s == expected_s
        now_s = replica.open_until_s
        replicas.sweep(now_s)
        generation = replica.begin()
        replica.failed(generation)
        replica.end(generation)
        assert replica.state == OPEN


def test_a_trying_call_whose_client_left_lets_another_one_try() -> None:
    replicas, replica = fresh()
    fail(replica)
    replicas.sweep(6.0)
    generation = replica.begin()
    replica.end(generation)
    assert (replica.state, replica.admits) == (HALF_OPEN, True)


def test_what_calls_of_an_earlier_time_tell_changes_nothing() -> None:
    replicas, replica = fresh()
    generations = [replica.begin() for _ in range(2_000)]
    for generation in generations[:1_000]:
        replica.failed(generation)
        replica.end(generation)
    assert replica.opened_count == 1
    assert replica.open_until_s == 6.0, "not longer for each of them"
    replica.answered(200, 10, generations[1_000])
    assert replica.state == OPEN, "an answer to a call that began before it opened"
    replicas.sweep(6.0)
    trying = replica.begin()
    replica.failed(generations[1_001])
    assert replica.state == TRYING
    replica.answered(200, 10, trying)
    assert replica.state == CLOSED


def test_retry_after_is_obeyed_within_bounds() -> None:
    replicas, replica = fresh()
    replica.told_to_wait(20, replica.generation)
    assert (replica.state, replica.open_until_s) == (OPEN, 21.0)
    replicas.sweep(21.0)
    assert replica.admits
    replica.told_to_wait(86_400, replica.begin())
    assert replica.open_until_s == 81.0, "open_max_s is the bound"


def test_probes_open_and_close_it() -> None:
    _, replica = fresh()
    for _ in range(3):
        replica.probed(False)
    assert replica.state == OPEN
    replica.probed(True)
    assert replica.state == CLOSED
