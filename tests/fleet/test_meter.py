"""The meter: seconds lived times price, to the nanodollar, customer and provider apart."""

import random

from sqlalchemy import select

from gpuproxy.fleet.meter import meter, prove
from gpuproxy.fleet.moves import adopt, begin_destroy, end, lose, move
from gpuproxy.fleet.purse import AHEAD_S, payable, top_up
from gpuproxy.fleet.rentals import Rental, locked
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import NANOUSD, balance
from gpuproxy.ledger.transfers import PROVIDER_COST, REVENUE, WRITE_OFF, credit_account, lock
from gpuproxy.ledger.verify import verify
from gpuproxy.store.schema import changes, events

from .conftest import Books, Clock

PRICE = 1_234_567_891  # divides by nothing that is in an hour
COST = 987_654_321


async def posted(books: Books, account_id: str) -> int:
    def work(connection):  # type: ignore[no-untyped-def]
        return lock(connection, [account_id])

    found = await books.do(work)
    return found[account_id].posted_nanousd if account_id in found else 0


async def running(books: Books, **values: object) -> Rental:
    rental = await books.rental(**{"price_nanousd_per_hour": PRICE, "cost_nanousd_per_hour": COST, **values})
    rental = await books.do(adopt, rental, "77", books.clock())
    return await books.do(move, rental, "running", books.clock())


async def seen(books: Books, rental: Rental) -> Rental:
    """Let the provider say that it runs."""
    return await books.do(prove, rental, books.clock(), rental.metered_at)


async def test_a_life_costs_its_seconds_times_the_price_however_often_it_was_metered(
    books: Books, clock: Clock
) -> None:
    await books.give(100)
    rental = await running(books)
    steps = random.Random(7)
    lived_us = 0
    for _ in range(50):
        step_us = steps.randrange(1, 90_000_000)
        lived_us += step_us
        rental = await books.do(meter, rental, clock.advance(step_us / 1e6))
    rental = await books.do(begin_destroy, rental, clock(), "asked")
    rental = await books.do(end, rental, clock())
    assert rental.state == "destroyed"
    assert rental.running_us == lived_us
    assert rental.charged_nanousd == -(-PRICE * lived_us // 3_600_000_000)
    assert rental.cost_posted_nanousd == -(-COST * lived_us // 3_600_000_000)
    assert await posted(books, REVENUE) == rental.charged_nanousd
    assert await posted(books, PROVIDER_COST) == -rental.cost_posted_nanousd
    assert await posted(books, payable("simulated")) == rental.cost_posted_nanousd
    assert await balance(books.store, books.user_id) == 100 * NANOUSD - rental.charged_nanousd
    assert await verify(books.store) == []


async def test_metering_again_or_back_in_time_changes_nothing(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books)
    rental = await books.do(meter, rental, clock.advance(100))
    assert await books.do(meter, rental, clock()) == rental
    assert await books.do(meter, rental, clock.advance(-3_600)) == rental


async def test_the_customer_pays_nothing_after_the_wish_to_destroy_but_the_provider_is_owed(
    books: Books, clock: Clock
) -> None:
    await books.give(10)
    rental = await running(books)
    clock.advance(60)
    rental = await books.do(begin_destroy, await seen(books, rental), clock(), "asked")
    charged = rental.charged_nanousd
    rental = await books.do(end, rental, clock.advance(60))
    assert rental.charged_nanousd == charged == -(-PRICE * 60 // 3_600)
    assert rental.cost_posted_nanousd == -(-COST * 120 // 3_600)


async def test_a_stopped_machine_costs_its_storage(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books, storage_price_nanousd_per_hour=3_600, storage_cost_nanousd_per_hour=1_800)
    rental = await books.do(move, rental, "stopping", clock())
    rental = await books.do(move, rental, "stopped", clock())
    rental = await books.do(meter, rental, clock.advance(500))
    assert (rental.charged_nanousd, rental.cost_posted_nanousd, rental.stopped_us) == (500, 250, 500_000_000)


async def test_a_lost_machine_is_billed_to_when_it_was_last_seen(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books)
    clock.advance(3_000)
    rental = await books.do(lose, rental, clock())
    assert (rental.state, rental.charged_nanousd, rental.cost_posted_nanousd) == ("destroyed", 0, 0)
    assert rental.reason.startswith("lost")


async def test_what_the_customer_has_not_is_written_off(books: Books, clock: Clock) -> None:
    await books.give(2)
    rental = await running(books)
    rental = await books.do(meter, rental, clock.advance(7_200))
    assert rental.charged_nanousd == 2 * NANOUSD
    assert rental.written_off_nanousd == 2 * PRICE - 2 * NANOUSD
    assert await posted(books, WRITE_OFF) == -rental.written_off_nanousd
    assert await posted(books, credit_account(books.user_id)) == 0
    assert await verify(books.store) == []


async def test_the_hold_runs_ahead_while_there_is_credit(books: Books, clock: Clock) -> None:
    await books.give(5)
    rental = await running(books)
    for _ in range(120):
        rental = await books.do(meter, rental, clock.advance(60))
        await books.do(top_up, rental, clock())
    hold = await books.do(holds.get, rental.hold_id)
    assert hold is not None
    assert hold.remaining_nanousd >= PRICE * AHEAD_S // 3_600
    lasting = await books.do(top_up, rental, clock())
    assert lasting.seconds // 60 == (5 * NANOUSD - rental.charged_nanousd) * 60 // PRICE


async def test_two_machines_share_the_free_credit_by_their_rates(books: Books, clock: Clock) -> None:
    await books.give(3)
    one, two = await running(books), await running(books, price_nanousd_per_hour=NANOUSD // 2)
    left = [(await books.do(top_up, each, clock())).seconds for each in (one, two)]
    free = 3 * NANOUSD - PRICE - NANOUSD // 2
    assert left == [3_600 + free * 3_600 // (PRICE + NANOUSD // 2)] * 2


async def test_what_was_paid_beforehand_is_owed_at_once_and_charged_to_its_end(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books, basis="prepaid", committed_hours=3, price_nanousd_per_hour=NANOUSD)
    assert rental.cost_posted_nanousd == 3 * COST
    rental = await books.do(meter, rental, clock.advance(600))
    assert rental.charged_nanousd == -(-NANOUSD * 600 // 3_600)
    rental = await books.do(begin_destroy, rental, clock.advance(60), "asked")
    rental = await books.do(end, rental, clock.advance(60))
    assert (rental.charged_nanousd, rental.cost_posted_nanousd) == (3 * NANOUSD, 3 * COST)
    assert await verify(books.store) == []


async def test_who_prepaid_for_a_machine_that_failed_pays_what_it_lived(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books, basis="prepaid", committed_hours=3, price_nanousd_per_hour=NANOUSD)
    clock.advance(360)
    rental = await books.do(begin_destroy, await seen(books, rental), clock(), "exited", has_failed=True)
    rental = await books.do(end, rental, clock())
    assert (rental.state, rental.charged_nanousd) == ("failed", NANOUSD // 10)


async def test_a_move_tells_the_owner_and_the_workers(books: Books, clock: Clock) -> None:
    await books.give(10)
    rental = await running(books)
    rental = await books.do(begin_destroy, rental, clock(), "asked")
    await books.do(end, rental, clock())

    def told(connection):  # type: ignore[no-untyped-def]
        is_shown = events.c.name.like("instance.%")
        names = connection.scalars(select(events.c.name).where(is_shown).order_by(events.c.seq)).all()
        heard = connection.execute(select(changes.c.kind, changes.c.subject_id)).all()
        return names, {tuple(row) for row in heard}, locked(connection, rental.id).state

    names, heard, state = await books.do(told)
    assert names == ["instance.created", "instance.running", "instance.destroyed"]
    assert heard == {("instances_changed", books.user_id)}
    assert state == "destroyed"
