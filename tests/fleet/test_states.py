"""The moves of a rental: what is in the table is legal, everything else raises."""

import itertools

import pytest

from gpuproxy.fleet.states import ENDED, LIVING, MOVES, STATES, IllegalMoveError, State, check_move


def test_the_table_has_every_state() -> None:
    assert set(MOVES) == set(STATES)


def test_what_has_ended_stays_ended() -> None:
    assert all(not MOVES[state] for state in ENDED)


def test_every_living_state_can_be_left_for_destroying() -> None:
    assert all("destroying" in MOVES[state] for state in LIVING if state != "destroying")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_a_move_that_is_not_in_the_table_raises(before: State, after: State) -> None:
    if after in MOVES[before]:
        check_move(before, after)
    else:
        with pytest.raises(IllegalMoveError, match=f"does not go from {before} to {after}"):
            check_move(before, after)
