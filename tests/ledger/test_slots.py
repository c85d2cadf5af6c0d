"""Slots for streams: never more than the limit, over all workers of a machine."""

import time

from gpuproxy.ledger.slots import SHARE, Slots

KEY = ("u1", "streams:k1")


def test_never_more_than_the_limit_are_handed_out() -> None:
    slots = Slots()
    granted = [slots.grant(KEY, epoch, 3, 1, 9) for epoch in "abab"]
    assert granted == [1, 1, 1, 0]
    slots.take_back(KEY, "a", 1)
    assert [slots.grant(KEY, "b", 3, 1, 1), slots.grant(KEY, "b", 3, 1, 1)] == [1, 0]


def test_a_worker_gets_a_part_of_what_is_left() -> None:
    assert Slots().grant(KEY, "a", 100, 1, 90) == 100 // SHARE


def test_without_a_limit_all_is_handed_out_and_still_known() -> None:
    slots = Slots()
    assert slots.grant(KEY, "a", 0, 1, 9) == 9
    assert (slots.left(KEY, 10), slots.holders(KEY)) == (1, {"a"})


def test_slots_of_a_worker_missing_in_two_sweeps_are_free() -> None:
    slots = Slots()
    slots.grant(KEY, "a", 2, 1, 1)
    slots.grant(KEY, "b", 2, 1, 1)
    for linked, left in (({"b"}, 0), ({"a", "b"}, 0), ({"b"}, 0), ({"b"}, 1)):
        slots.sweep(linked)
        assert slots.left(KEY, 2) == left


def test_what_a_worker_says_it_holds_takes_the_place_of_what_was_known() -> None:
    slots = Slots()
    slots.grant(KEY, "a", 9, 3, 3)
    slots.restate("a", [(KEY, 1)], is_first=True)
    slots.restate("a", [(("u2", "streams:"), 4)], is_first=False)
    slots.restate("b", [(KEY, 2)], is_first=True)
    assert (slots.left(KEY, 9), slots.left(("u2", "streams:"), 9)) == (6, 5)
    slots.restate("a", [], is_first=True)
    assert (slots.left(KEY, 9), slots.holders(("u2", "streams:"))) == (7, set())


async def test_a_control_that_has_just_started_waits_for_what_workers_hold() -> None:
    slots = Slots(grace_s=0.05)
    begun_s = time.monotonic()
    await slots.ready()
    assert time.monotonic() - begun_s >= 0.05
