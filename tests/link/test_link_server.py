"""Control's end of the link, spoken to over a real Unix socket as a worker does."""

import asyncio

import pytest
from links import DIGEST, GRANT, Site

from gpuproxy.link.messages import (
    Authorize,
    Authorized,
    Prices,
    Revoke,
    Unavailable,
    frame,
)
from gpuproxy.link.server import PRICES_AT_ONCE, QUESTIONS_MAX, REVOKE_KEYS_MAX, LinkServer
from gpuproxy.pricing import Price
from gpuproxy.types import Grant


async def test_a_question_is_answered_with_its_number_and_digest(site: Site) -> None:
    worker = await site.worker()
    worker.say(Authorize(7, DIGEST))
    assert await worker.hear() == Authorized(7, DIGEST, GRANT)


async def test_a_worker_knows_the_prices_before_the_first_grant(site: Site) -> None:
    site.server.publish([Price("m", request_nanousd=1)])
    worker = await site.worker()
    assert worker.prices == [Prices((Price("m", request_nanousd=1),))]


async def test_every_worker_hears_of_prices_that_change_and_of_no_others(site: Site) -> None:
    workers = [await site.worker() for _ in range(2)]
    for nanousd in (1, 1, 2):
        site.server.publish([Price("m", request_nanousd=nanousd)])
    for worker in workers:
        worker.say(Authorize(7, DIGEST))
        await worker.hear()
        assert [[price.request_nanousd for price in told.prices] for told in worker.prices] == [[], [1], [2]]


async def test_many_prices_go_in_bounded_messages(site: Site) -> None:
    prices = [Price("m" * 256, str(number), *[10**15] * 5, number) for number in range(PRICES_AT_ONCE + 1)]
    site.server.publish(prices)
    worker = await site.worker()
    assert [(told.is_first, told.is_last) for told in worker.prices] == [(True, False), (False, True)]
    assert [price for told in worker.prices for price in told.prices] == prices


async def test_an_unknown_key_is_answered_with_no_grant(site: Site) -> None:
    worker = await site.worker()
    worker.say(Authorize(8, bytes(32)))
    assert await worker.hear() == Authorized(8, bytes(32), None)


async def test_messages_may_arrive_in_pieces(site: Site) -> None:
    worker = await site.worker()
    for byte in frame(Authorize(7, DIGEST)):
        worker.babble(bytes([byte]))
        await asyncio.sleep(0)
    assert await worker.hear() == Authorized(7, DIGEST, GRANT)


async def test_a_store_that_fails_says_nothing_about_the_key(site: Site) -> None:
    async def fail(_digest: bytes) -> Grant | None:
        raise ConnectionError("database is away")

    worker = await site.worker()
    site.answer = fail
    worker.say(Authorize(1, DIGEST), Authorize(2, DIGEST))
    assert [await worker.hear(), await worker.hear()] == [Unavailable(1), Unavailable(2)]


async def test_a_store_that_hangs_is_not_waited_for(site: Site) -> None:
    async def hang(_digest: bytes) -> Grant | None:
        await asyncio.Event().wait()
        return None

    worker = await site.worker()
    site.answer = hang
    worker.say(Authorize(1, DIGEST))
    assert await worker.hear() == Unavailable(1)


async def test_a_slow_question_does_not_hold_up_the_next(site: Site) -> None:
    may_answer = asyncio.Event()

    async def wait_for_the_first(digest: bytes) -> Grant | None:
        if digest == DIGEST:
            await may_answer.wait()
        return None

    worker = await site.worker()
    site.answer = wait_for_the_first
    worker.say(Authorize(1, DIGEST), Authorize(2, bytes(32)))
    assert (await worker.hear()).id == 2  # type: ignore[union-attr]
    may_answer.set()
    assert (await worker.hear()).id == 1  # type: ignore[union-attr]


async def test_a_revocation_reaches_every_worker(site: Site) -> None:
    workers = [await site.worker() for _ in range(3)]
    site.server.revoke(["k1", "k2"])
    assert [await worker.hear() for worker in workers] == [Revoke(("k1", "k2"))] * 3


async def test_a_worker_that_was_away_hears_what_it_missed(site: Site) -> None:
    site.server.revoke(["k1"])
    worker = await site.link()
    assert await worker.hear() == Revoke(("k1",))


async def test_a_worker_on_its_return_hears_nothing_that_is_out_of_date(site: Site) -> None:
    async def read_the_store() -> None:
        site.server.readmit(["k1"])
        site.server.revoke(["k3"])

    site.server.revoke(["k1", "k2"])
    site.server.refresh = read_the_store
    worker = await site.link()
    heard = [await worker.hear(), await worker.hear()]
    assert heard == [Revoke(("k3",)), Revoke(("k2", "k3"))]


async def test_a_worker_hears_what_is_remembered_though_the_store_is_away(site: Site) -> None:
    async def fail() -> None:
        raise ConnectionError("database is away")

    site.server.revoke(["k1"])
    site.server.refresh = fail
    worker = await site.link()
    assert await worker.hear() == Revoke(("k1",))


async def test_an_answer_older_than_the_revocation_is_corrected(site: Site) -> None:
    may_answer, asked = asyncio.Event(), asyncio.Event()

    async def read_before_the_revocation(_digest: bytes) -> Grant | None:
        asked.set()
        await may_answer.wait()
        return GRANT

    worker = await site.worker()
    site.answer = read_before_the_revocation
    worker.say(Authorize(1, DIGEST))
    await asked.wait()
    site.server.revoke(["k1"])
    may_answer.set()
    assert [await worker.hear(), await worker.hear()] == [Revoke(("k1",)), Authorized(1, DIGEST, None)]


async def test_a_key_that_is_let_in_again_is_granted(site: Site) -> None:
    worker = await site.worker()
    site.server.revoke(["k1"])
    await worker.hear()
    worker.say(Authorize(1, DIGEST))
    assert await worker.hear() == Authorized(1, DIGEST, GRANT)


async def test_many_revocations_go_in_bounded_messages(site: Site) -> None:
    worker = await site.worker()
    site.server.revoke([f"k{number}" for number in range(REVOKE_KEYS_MAX + 1)])
    sizes = [len((await worker.hear()).key_ids) for _ in range(2)]  # type: ignore[union-attr]
    assert sizes == [REVOKE_KEYS_MAX, 1]


async def test_revocations_are_forgotten_when_no_grant_can_be_that_old() -> None:
    server = LinkServer(lambda _: asyncio.sleep(0), timeout_s=1, remember_s=-1)  # type: ignore[arg-type, return-value]
    server.revoke(["old"])
    assert server.remembered() == ()


@pytest.mark.parametrize("noise", [b"\xff" * 8, frame(Revoke(("k1",))), b"\x00\x00\x00\x01\xc1"])
async def test_a_link_that_breaks_the_format_is_ended_and_others_go_on(site: Site, noise: bytes) -> None:
    bad, good = await site.worker(), await site.worker()
    bad.babble(noise)
    with pytest.raises((EOFError, ConnectionResetError)):
        await bad.hear()
    good.say(Authorize(1, DIGEST))
    assert await good.hear() == Authorized(1, DIGEST, GRANT)


async def test_a_worker_may_not_have_too_many_questions_open(site: Site) -> None:
    may_answer = asyncio.Event()

    async def wait(_digest: bytes) -> Grant | None:
        async with asyncio.timeout(None):
            await may_answer.wait()
        return None

    worker = await site.worker()
    site.server._timeout_s = 60
    site.answer = wait
    worker.say(*(Authorize(number, DIGEST) for number in range(QUESTIONS_MAX + 1)))
    assert await worker.hear() == Unavailable(QUESTIONS_MAX)
    may_answer.set()
    assert {(await worker.hear()).id for _ in range(QUESTIONS_MAX)} == set(range(QUESTIONS_MAX))  # type: ignore[union-attr]


async def test_a_worker_that_does_not_read_is_cut_off(site: Site) -> None:
    await site.worker()
    keys = [f"key-{number:032}" for number in range(REVOKE_KEYS_MAX)]
    for _ in range(200):
        site.server.revoke(keys)
        if not site.server.links:
            break
        await asyncio.sleep(0)
    assert not site.server.links


async def test_a_worker_that_leaves_takes_its_questions_along(site: Site) -> None:
    cancelled = asyncio.Event()

    async def wait(_digest: bytes) -> Grant | None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return None

    worker = await site.worker()
    site.server._timeout_s = 60
    site.answer = wait
    worker.say(Authorize(1, DIGEST))
    await asyncio.sleep(0.01)
    await worker.leave()
    async with asyncio.timeout(5):
        await cancelled.wait()
