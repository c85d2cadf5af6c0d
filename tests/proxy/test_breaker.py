"""The breaker of an endpoint: its states, and what it learns from which call."""

import pytest

from gpuproxy.config.routing import Routing
from gpuproxy.link.breakers import Breakers
from gpuproxy.link.messages import BreakerMove
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
    SHARE_LEAST,
    STATES,
    TIME,
    TOLD,
    TRYING,
    WAIT,
    Replica,
    Replicas,
)

EVENTS = (FAILURES, WAIT, TIME, ADMITTED, GOOD, BAD, ABANDONED, TOLD)


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


# -- several workers ------------------------------------------------------------------------------------------


def machine(count: int = 3) -> list[tuple[Replicas, Replica]]:
    """Return workers that tell each other at once."""
    workers = [fresh() for _ in range(count)]
    for at, (replicas, _) in enumerate(workers):
        others = [other for number, (other, _) in enumerate(workers) if number != at]
        replicas.tell = lambda move, others=others: [other.told(move) for other in others]  # type: ignore[misc, assignment]
    return workers


def states(workers: list[tuple[Replicas, Replica]]) -> list[int]:
    return [replica.state for _, replica in workers]


def passes(workers: list[tuple[Replicas, Replica]], now_s: float) -> None:
    for replicas, _ in workers:
        replicas.sweep(now_s)


def test_what_one_worker_leaves_alone_all_do() -> None:
    workers = machine()
    fail(workers[0][1])
    assert states(workers) == [OPEN] * 3
    assert [replica.opened_count for _, replica in workers] == [1, 1, 1]
    passes(workers, 5.9)
    assert states(workers) == [OPEN] * 3
    passes(workers, 6.0)
    assert states(workers) == [HALF_OPEN] * 3


def test_one_call_of_all_workers_tries_it() -> None:
    workers = machine()
    fail(workers[0][1])
    passes(workers, 6.0)
    generation = workers[1][1].begin()
    assert states(workers) == [OPEN, TRYING, OPEN]
    passes(workers, 60.0)
    assert states(workers) == [OPEN, TRYING, OPEN], "they wait for the other's word"
    workers[1][1].answered(200, 10, generation)
    assert states(workers) == [CLOSED] * 3
    assert {replica.share for _, replica in workers} == {SHARE_LEAST}, "all begin slowly"


def test_a_try_that_fails_doubles_the_time_for_all() -> None:
    workers = machine()
    fail(workers[0][1])
    now_s = 6.0
    for number, open_s in enumerate((10.0, 20.0, 40.0)):
        passes(workers, now_s)
        replica = workers[number][1]
        replica.failed(replica.begin())
        assert states(workers) == [OPEN] * 3
        assert {replica.open_until_s for _, replica in workers} == {now_s + open_s}
        now_s += open_s


def test_a_try_that_was_abandoned_lets_any_worker_try() -> None:
    workers = machine()
    fail(workers[0][1])
    passes(workers, 6.0)
    workers[0][1].end(workers[0][1].begin())
    passes(workers, 6.5)
    assert states(workers) == [HALF_OPEN] * 3


def test_a_try_nothing_is_heard_of_is_not_waited_for_for_ever() -> None:
    workers = machine()
    fail(workers[0][1])
    passes(workers, 6.0)
    workers[0][1].begin()
    passes(workers, 6.0 + Routing().open_max_s)
    assert states(workers) == [TRYING, HALF_OPEN, HALF_OPEN]


def test_two_calls_that_try_it_in_the_same_moment_both_count() -> None:
    workers = machine(2)
    fail(workers[0][1])
    passes(workers, 6.0)
    (_, one), (other_replicas, other) = workers
    mailbox: list[BreakerMove] = []
    workers[0][0].tell = mailbox.append
    generations = one.begin(), other.begin()
    other_replicas.told(mailbox.pop())
    assert states(workers) == [TRYING, TRYING]
    one.failed(generations[0])
    other_replicas.told(mailbox.pop())
    assert states(workers) == [OPEN, TRYING]
    other.answered(200, 10, generations[1])
    assert states(workers) == [CLOSED, CLOSED]


def test_retry_after_holds_for_all_workers() -> None:
    workers = machine()
    replica = workers[0][1]
    replica.told_to_wait(7, replica.generation)
    assert {replica.open_until_s for _, replica in workers} == {8.0}


def test_another_control_and_new_workers_hear_what_is_left_alone() -> None:
    (replicas, replica), (new_replicas, new) = fresh(), fresh()
    clock = [100.0]
    breakers = Breakers(lambda: clock[0])
    replicas.tell = breakers.note
    fail(replica)
    clock[0] += 2.0
    for move in breakers.remembered():
        new_replicas.told(move)
    assert (new.state, new.open_until_s) == (OPEN, 4.0)
    breakers = Breakers(lambda: clock[0])
    replicas.tell = breakers.note
    replicas.sweep(3.0)
    replicas.report()
    assert [move.for_s for move in breakers.remembered()] == [3.0]
    replica.probed(True)
    assert not list(breakers.remembered())
