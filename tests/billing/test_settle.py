"""What providers tell becomes credit exactly once, in whatever order it comes."""

import asyncio
import itertools
import os
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from postgres import who_waits

from gpuproxy.access.accounts import create_user
from gpuproxy.billing.cashier import STALE, Cashier
from gpuproxy.billing.cents import CENT_NANOUSD, to_cents, to_nanousd
from gpuproxy.billing.payments import MOVES, Payment
from gpuproxy.billing.reversals import order_refund
from gpuproxy.billing.settle import take
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.terms import set_overdraft
from gpuproxy.ledger.transfers import PAYMENTS, REVENUE, WRITE_OFF, Transfer, credit_account, lock, lock_made, post
from gpuproxy.plugin import PaymentEvent
from gpuproxy.store.engine import open_store

from .books import USD, Book

REPLAYS = int(os.environ.get("GPUPROXY_TEST_REPLAYS", "100"))


def paid(payment: Payment, event_id: str = "evt_1", cents: int = 2_500, reference: str = "pi_1") -> PaymentEvent:
    return PaymentEvent(event_id, "completed", payment.id, reference, cents)


def back(event_id: str, cents: int, reversal: str, kind: str = "refunded", reference: str = "pi_1") -> PaymentEvent:
    return PaymentEvent(event_id, kind, "", reference, cents, reversal=reversal)  # type: ignore[arg-type]


async def test_a_payment_becomes_credit_and_an_event(book: Book) -> None:
    payment = await book.pay(25)
    assert await book.tell(paid(payment))
    assert await book.usd() == 25
    assert await book.state(payment) == ("completed", 25, 0)
    assert await book.balance("payments") == -25 * USD
    assert await book.told() == ["credits.added", "payment.completed"]
    assert await book.is_sound()


async def test_a_replayed_event_posts_once_however_often_and_concurrently_it_comes(book: Book, store_url: str) -> None:
    payment = await book.pay()
    second = open_store(store_url)  # as another node has
    other = Book(second, book.user_id)
    try:
        done = await asyncio.gather(*(each.tell(paid(payment)) for _ in range(REPLAYS // 2) for each in (book, other)))
    finally:
        await second.close()
    assert sum(done) == 1
    assert await book.postings() == [("payment", 2_500)]
    assert await book.told() == ["credits.added", "payment.completed"]
    assert await book.is_sound()


async def test_two_events_of_one_success_post_once(book: Book) -> None:
    payment = await book.pay()
    for number in range(3):
        await book.tell(paid(payment, f"evt_{number}"))
    assert await book.usd() == 25


async def test_what_came_in_is_credited_not_what_was_asked_for(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment, cents=2_000))
    assert await book.state(payment) == ("completed", 20, 0)


async def test_another_currency_is_refused_and_can_be_told_again(book: Book) -> None:
    payment = await book.pay()
    with pytest.raises(GatewayError, match=r"evt_1 is in 'eur'; only usd") as refused:
        await book.tell(replace(paid(payment), currency="eur"))
    assert refused.value.code == "UNPROCESSABLE"
    assert await book.state(payment) == ("pending", 0, 0)
    assert await book.tell(paid(payment))


async def test_what_concerns_nobody_here_is_passed_over(book: Book) -> None:
    payment = await book.pay(provider="manual")
    assert not await book.tell(paid(payment))  # told by another provider
    assert not await book.tell(PaymentEvent("evt_2", "completed", "pay_unknown", "pi_x", 100))
    assert await book.usd() == 0


async def test_a_success_after_a_failure_counts(book: Book) -> None:
    payment = await book.pay()
    await book.tell(PaymentEvent("evt_0", "failed", payment.id, reason="expired"))
    assert await book.state(payment) == ("failed", 0, 0)
    await book.tell(paid(payment))
    assert await book.usd() == 25
    assert await book.told() == ["payment.failed", "credits.added", "payment.completed"]


async def test_a_failure_is_told_however_long_its_reason(book: Book) -> None:
    payment = await book.pay()
    assert await book.tell(PaymentEvent("evt_0", "failed", payment.id, reason="no " * 10_000))
    assert await book.state(payment) == ("failed", 0, 0)
    assert await book.told() == ["payment.failed"]


async def test_a_failure_after_the_success_changes_nothing(book: Book) -> None:
    payment = await book.pay()
    await book.tell(paid(payment))
    await book.tell(PaymentEvent("evt_2", "failed", payment.id, reason="expired"))
    assert await book.state(payment) == ("completed", 25, 0)


async def test_partial_refunds_add_up_and_never_exceed_the_payment(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment))
    await book.tell(back("evt_2", 1_000, "re_1"))
    assert await book.state(payment) == ("partly_refunded", 25, 10)
    await book.tell(back("evt_3", 1_000, "re_1"))  # the same refund, told anew
    await book.tell(back("evt_4", 9_900, "re_2"))
    assert await book.state(payment) == ("refunded", 25, 25)
    assert await book.usd() == 0
    assert await book.told() == ["credits.added", "payment.completed", "payment.refunded", "payment.refunded"]
    assert await book.is_sound()


async def test_a_refund_told_before_the_success_waits_for_it(book: Book) -> None:
    payment = await book.pay(25)
    assert not await book.tell(back("evt_2", 1_000, "re_1"))
    assert not await book.tell(back("evt_2", 1_000, "re_1"))
    await book.tell(paid(payment))
    assert await book.state(payment) == ("partly_refunded", 25, 10)
    assert not await book.tell(back("evt_2", 1_000, "re_1"))
    assert await book.usd() == 15


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("is_refund_first", [True, False])
async def test_a_refund_that_comes_with_its_success_finds_it(book: Book, is_refund_first: bool) -> None:
    payment = await book.pay(25)
    told = [paid(payment), back("evt_2", 1_000, "re_1")]
    first, second = reversed(told) if is_refund_first else told
    async with book.store.writing() as connection:
        await connection.run_sync(take, "stripe", first)
        telling = asyncio.create_task(book.tell(second))
        await who_waits(book.store)
    await telling
    assert await book.state(payment) == ("partly_refunded", 25, 10)
    assert await book.usd() == 15
    assert await book.is_sound()


async def test_a_refund_that_failed_is_credited_again(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment))
    await book.tell(back("evt_2", 2_500, "re_1"))
    await book.tell(back("evt_3", 2_500, "re_1", "refund_failed"))
    assert await book.state(payment) == ("completed", 25, 0)
    assert await book.usd() == 25
    assert await book.is_sound()


async def test_a_failed_refund_told_before_its_refund_takes_nothing(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment))
    await book.tell(back("evt_3", 2_500, "re_1", "refund_failed"))
    await book.tell(back("evt_2", 2_500, "re_1"))
    assert await book.usd() == 25


async def test_what_is_spent_is_not_refunded_out_of_an_overdraft(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment))
    await book.do(set_overdraft, book.user_id, 50 * USD)
    await book.do(post, [Transfer(credit_account(book.user_id), REVENUE, 20 * USD, "usage", "usage:1")])
    with pytest.raises(GatewayError, match=r"has 5.00 of it left") as refused:
        await book.do(order_refund, payment.id, None, "", "re_1")
    assert refused.value.code == "INSUFFICIENT_CREDITS"
    assert (await book.do(order_refund, payment.id, 5 * USD, "", "re_2")).taken_nanousd == 5 * USD
    assert await book.is_sound()


async def test_a_dispute_takes_what_credit_is_left_and_the_rest_is_written_off(book: Book) -> None:
    payment = await book.pay(25)
    await book.tell(paid(payment))
    await book.do(post, [Transfer(credit_account(book.user_id), REVENUE, 20 * USD, "usage", "spent")])
    await book.tell(back("evt_2", 2_500, "dp_1", "disputed"))
    assert await book.state(payment) == ("disputed", 25, 25)
    assert await book.usd() == 0
    assert await book.balance(WRITE_OFF) == -20 * USD
    assert await book.balance("payments") == 0
    await book.tell(back("evt_3", 2_500, "dp_1", "dispute_won"))
    assert await book.state(payment) == ("completed", 25, 0)
    assert (await book.usd(), await book.balance(WRITE_OFF)) == (5, 0)
    assert await book.is_sound()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
async def test_any_order_of_the_same_events_ends_the_same(book: Book, order: tuple[int, ...]) -> None:
    payment = await book.pay(25)
    told = [
        paid(payment),
        back("evt_2", 1_000, "re_1"),
        back("evt_3", 500, "re_2"),
        back("evt_4", 500, "re_2", "refund_failed"),
    ]
    for index in order:
        await book.tell(told[index])
    assert await book.state(payment) == ("partly_refunded", 25, 10)
    assert await book.usd() == 15
    assert await book.is_sound()


def test_every_state_can_be_reached_and_none_leads_back_to_pending() -> None:
    reachable = {state for moves in MOVES.values() for state in moves}
    assert reachable == set(MOVES) - {"pending"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cents=st.integers(1, 10**11))
def test_cents_and_nanodollars_are_the_same_money(cents: int) -> None:
    assert to_cents(to_nanousd(cents)) == cents
    with pytest.raises(GatewayError, match="whole cents"):
        to_cents(to_nanousd(cents) + 1 + cents % (CENT_NANOUSD - 1))


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_stale_payments_are_closed_without_a_circle(book: Book) -> None:
    ids = sorted([book.user_id, (await create_user(book.store, "bob@example.com")).id], reverse=True)
    books = [Book(book.store, user_id) for user_id in ids]
    stale = [await each.pay() for each in books]  # that of the account locked last is looked at first
    await book.do(lock_made, [credit_account(ids[1]), PAYMENTS])
    tidying = Cashier(book.store, {}, lambda: datetime.now(UTC) + STALE + timedelta(hours=1)).tidy
    async with book.store.writing() as connection:
        await connection.run_sync(lock, [credit_account(ids[1])])
        closing = asyncio.create_task(tidying())
        await who_waits(book.store)
        await connection.run_sync(lock, [PAYMENTS])
    await closing
    assert [await book.state(payment) for payment in stale] == [("failed", 0, 0)] * 2
