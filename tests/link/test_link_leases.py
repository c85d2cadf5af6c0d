"""Leases over the link: granted to the worker that asked, or given back."""

import asyncio
import os

from links import Site, Worker

from gpuproxy.link.messages import HeldCredit, HeldStreams, Hello, Lease, Leased, Recall, Return, Unavailable


class Purse:
    """A lessor that grants what is wanted when it may, and notes what it gets."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[tuple[str, int]] = []
        self.returned: list[tuple[str, int]] = []

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        self.asked.append((epoch, ask.wanted))
        await self.may_answer.wait()
        return Leased(ask.id, ask.wanted)

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        """Nothing: no streams are counted."""

    def take_back(self, epoch: str, returned: Return) -> None:
        self.returned.append((epoch, returned.amount))


ASK = Lease(3, "u1", "", "nanousd", 1, 50)


async def leasing_worker(site: Site, epoch: str = "000-1-2") -> Worker:
    worker = await site.worker()
    worker.say(Hello(0, os.getpid(), epoch))
    return worker


async def test_a_lease_is_granted_to_the_workers_epoch(site: Site) -> None:
    site.server.lessor = purse = Purse()
    worker = await leasing_worker(site)
    worker.say(ASK, Return("u1", "", "nanousd", 7))
    assert await worker.hear() == Leased(3, 50)
    assert (purse.asked, purse.returned) == ([("000-1-2", 50)], [("000-1-2", 7)])
    assert site.server.epochs() == {"000-1-2"}


async def test_a_worker_without_an_epoch_gets_no_lease(site: Site) -> None:
    site.server.lessor = Purse()
    worker = await site.worker()
    worker.say(Return("u1", "", "nanousd", 7), ASK)
    assert await worker.hear() == Unavailable(3)
    assert site.server.lessor.returned == []


async def test_a_control_without_leases_cannot_tell(site: Site) -> None:
    worker = await leasing_worker(site)
    worker.say(ASK)
    assert await worker.hear() == Unavailable(3)


async def test_what_is_granted_too_late_goes_back(site: Site) -> None:
    site.server.lessor = purse = Purse()
    purse.may_answer.clear()
    worker = await leasing_worker(site)
    worker.say(ASK)
    assert await worker.hear() == Unavailable(3)
    purse.may_answer.set()
    async with asyncio.timeout(5):
        while not purse.returned:
            await asyncio.sleep(0)
    assert purse.returned == [("000-1-2", 50)]


async def test_what_is_granted_to_a_worker_that_left_goes_back(site: Site) -> None:
    site.server.lessor = purse = Purse()
    purse.may_answer.clear()
    worker = await leasing_worker(site)
    worker.say(ASK)
    async with asyncio.timeout(5):
        while not purse.asked:
            await asyncio.sleep(0)
        await worker.leave()
        while site.server.links:
            await asyncio.sleep(0)
        purse.may_answer.set()
        while not purse.returned:
            await asyncio.sleep(0)
    assert purse.returned == [("000-1-2", 50)]


async def test_a_recall_reaches_one_worker(site: Site) -> None:
    site.server.lessor = Purse()
    worker = await leasing_worker(site)
    worker.say(ASK)
    await worker.hear()
    assert site.server.push("nobody", Recall(1, "u1", "", "nanousd")) is False
    assert site.server.push("000-1-2", Recall(1, "u1", "", "nanousd")) is True
    assert await worker.hear() == Recall(1, "u1", "", "nanousd")
