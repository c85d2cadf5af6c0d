"""The states of a rental and its legal moves, in one table; whatever is not in it raises.

    pending -> provisioning -> running -> stopping -> stopped -> provisioning (started again)
    stopped -> stopping: it runs although it was stopped, so it is stopped again
    running -> provisioning: it boots again; provisioning -> stopping: it did so for too long
    all of them -> destroying -> destroyed | failed

``pending``: the intent is stored, the provider may or may not have heard of it. ``destroying`` lasts until the
provider is proven to have nothing left; a rental that failed passes through it too, as what failed may still cost.
"""

from typing import Literal, get_args

State = Literal["pending", "provisioning", "running", "stopping", "stopped", "destroying", "destroyed", "failed"]
STATES: tuple[State, ...] = get_args(State)
MOVES: dict[State, tuple[State, ...]] = {
    "pending": ("provisioning", "destroying", "failed"),
    "provisioning": ("running", "stopping", "stopped", "destroying", "destroyed"),
    "running": ("provisioning", "stopping", "stopped", "destroying", "destroyed"),
    "stopping": ("stopped", "running", "destroying", "destroyed"),
    "stopped": ("provisioning", "stopping", "destroying", "destroyed"),
    "destroying": ("destroyed", "failed"),
    "destroyed": (),
    "failed": (),
}
ENDED: tuple[State, ...] = ("destroyed", "failed")
LIVING: tuple[State, ...] = tuple(state for state in STATES if state not in ENDED)
SETTLED: tuple[State, ...] = ("running", "stopped")  # nothing is under way; the others are looked after more often
UNDER_WAY: tuple[State, ...] = tuple(state for state in LIVING if state not in SETTLED)


class IllegalMoveError(Exception):
    """A move that is not in the table: a fault of the program."""


def check_move(before: State, after: State) -> None:
    """Raise IllegalMoveError unless the table has the move."""
    if after not in MOVES[before]:
        known = ", ".join(MOVES[before]) or "nothing"
        raise IllegalMoveError(f"a rental does not go from {before} to {after}; from there to: {known}")
