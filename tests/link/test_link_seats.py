"""Seats and moves of breakers over a real Unix socket: handed out, passed on, and never to a link that is no more."""

import pytest
from links import DIGEST, Site, Worker

from gpuproxy.link.messages import (
    Authorize,
    Authorized,
    BreakerMove,
    FreeSeats,
    GiveSeats,
    HoldSeats,
    SeatPlace,
    Seats,
    WantSeats,
)

PLACE: SeatPlace = ("up", "http://a", 2)
OPENED = BreakerMove("up", "http://a", "opened", 60.0, 5.0)


async def settled(worker: Worker) -> None:
    """Wait until control has taken all that the worker said, and has said nothing else to it."""
    worker.say(Authorize(1, DIGEST))
    assert isinstance(await worker.hear(), Authorized)


async def test_seats_are_handed_out_when_all_could_tell_what_they_hold(site: Site) -> None:
    site.server.seating_after_s = 0.05
    first, second = await site.worker("one"), await site.worker("two")
    first.say(WantSeats(PLACE, 2, is_urgent=True))
    second.say(HoldSeats(PLACE, 1))
    assert await first.hear() == Seats(PLACE, 1)


async def test_a_worker_that_is_linked_anew_is_told_by_its_new_link(site: Site) -> None:
    site.server.seating.open()
    before = [await site.worker("one") for _ in range(5)]
    after = await site.worker("one")
    after.say(HoldSeats(PLACE, 0), WantSeats(PLACE, 2, is_urgent=True))
    assert await after.hear() == Seats(PLACE, 2)
    for worker in before:
        await settled(worker)


async def test_a_worker_that_is_linked_anew_gets_none_before_it_has_told_what_it_holds(site: Site) -> None:
    """They would be in its hands, and not in what it is just telling."""
    site.server.seating.open()
    worker, other = await site.worker("one"), await site.worker("two")
    other.say(HoldSeats(PLACE, 2))
    await settled(other)
    worker.say(HoldSeats(PLACE, 0), WantSeats(PLACE, 1, is_urgent=True))
    assert await other.hear() == FreeSeats(PLACE, "always")
    again = await site.worker("one")
    other.say(GiveSeats(PLACE, 1))
    assert await other.hear() == FreeSeats(PLACE, "no more")
    again.say(HoldSeats(PLACE, 0), WantSeats(PLACE, 1, is_urgent=True))
    assert await again.hear() == Seats(PLACE, 1)
    await settled(again)


async def test_a_worker_that_is_gone_for_good_leaves_its_seats(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuproxy.link.server.GONE_S", 0.05)
    site.server.seating.open()
    dead, living = await site.worker("one"), await site.worker("two")
    dead.say(HoldSeats(PLACE, 2))
    await settled(dead)
    living.say(WantSeats(PLACE, 1, is_urgent=True))
    assert await dead.hear() == FreeSeats(PLACE, "always")
    await dead.leave()
    assert await living.hear() == Seats(PLACE, 1)


async def test_a_worker_that_comes_back_keeps_its_seats(site: Site) -> None:
    site.server.seating.open()
    worker, other = await site.worker("one"), await site.worker("two")
    worker.say(HoldSeats(PLACE, 2))
    await settled(worker)
    await worker.leave()
    again = await site.worker("one")
    again.say(HoldSeats(PLACE, 2))
    await settled(again)
    site.server.seating.gone("one", site.server.epochs)  # as the clock does a while after the first link's end
    other.say(WantSeats(PLACE, 1, is_urgent=True))
    assert await again.hear() == FreeSeats(PLACE, "always")
    await settled(other)


async def test_what_one_worker_finds_out_is_told_to_all_others(site: Site) -> None:
    first, second = await site.worker("one"), await site.worker("two")
    first.say(OPENED)
    assert await second.hear() == OPENED
    await settled(first)
    third = await site.link("three")
    told = await third.hear()
    assert isinstance(told, BreakerMove)
    assert (told.what, 59 < told.for_s <= 60) == ("opened", True)
    second.say(BreakerMove("up", "http://a", "closed"))
    assert (await first.hear(), await third.hear()) == (BreakerMove("up", "http://a", "closed"),) * 2
    fourth = await site.link("four")
    await settled(fourth)
