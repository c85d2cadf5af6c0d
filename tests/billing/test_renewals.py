"""Credit that renews itself: one charge for one shortfall, whatever breaks in between."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from control.conftest import Api, Person
from gpuproxy_plugins.stripe import Stripe as Provider
from postgres import who_waits
from sqlalchemy import select

from gpuproxy.access.accounts import set_user_flags
from gpuproxy.billing import renewals
from gpuproxy.billing.cashier import Cashier
from gpuproxy.ledger.transfers import REVENUE, Transfer, credit_account, post
from gpuproxy.store.schema import auto_renewals, payments

from .books import USD, Book
from .stripe_server import Stripe
from .test_stripe import BILLING, deliver, paid, payment_of

WISH = {"threshold_usd": 10, "amount_usd": 20, "monthly_cap_usd": 100, "provider": "stripe"}
INTENTS = "/v1/payment_intents"


class Clock:
    """A time that moves when told."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, **how: float) -> None:
        self.now += timedelta(**how)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cashiers(api: Api, provider: Provider, clock: Clock) -> list[Cashier]:
    """Return the cashiers of two nodes."""
    return [Cashier(api.store, {"stripe": provider}, clock) for _ in range(2)]


@pytest.fixture
async def book(api: Api, stripe: Stripe, ann: Person) -> Book:
    """Return the book of a customer with 25 dollars, a saved card and renewal switched on."""
    await paid(api, stripe, ann, save_method=True)
    status, told = await api.call("PUT", f"{BILLING}/auto-renew", WISH, ann.by_token)
    assert (status, told["is_enabled"], told["has_saved_method"]) == (200, True, True), told
    return Book(api.store, ann.id)


async def spend(book: Book, usd: int, key: str = "spent") -> None:
    await book.do(post, [Transfer(credit_account(book.user_id), REVENUE, usd * USD, "usage", key)])


async def renewal_states(book: Book) -> list[str]:
    async with book.store.reading() as connection:
        query = select(payments.c.state).where(payments.c.kind == "renewal").order_by(payments.c.created_at)
        return list(await connection.scalars(query))


async def settings_of(book: Book) -> Any:
    async with book.store.reading() as connection:
        return (await connection.execute(select(auto_renewals))).one()


def charges(stripe: Stripe) -> list[Any]:
    return [intent for intent in stripe.made("payment_intent") if intent["metadata"].get("by") == "renewal"]


async def test_nobody_is_charged_who_has_enough(book: Book, cashiers: list[Cashier], stripe: Stripe) -> None:
    await spend(book, 15)  # 10 are left, which is not under the threshold
    assert await cashiers[0].sweep() == 0
    assert charges(stripe) == []


async def test_a_shortfall_is_charged_once_by_two_nodes_at_once(
    api: Api, book: Book, cashiers: list[Cashier], stripe: Stripe
) -> None:
    await spend(book, 20)
    await asyncio.gather(*(cashier.sweep() for cashier in cashiers * 3))
    await cashiers[0].sweep()
    assert [charge["amount"] for charge in charges(stripe)] == [2_000]
    assert charges(stripe)[0]["customer"].startswith("cus_")
    assert await book.usd() == 25
    await deliver(api, stripe, *stripe.events)  # Stripe tells of it too
    assert await book.usd() == 25
    assert (await book.told())[-2:] == ["payment.completed", "subscription.renewed"]
    assert await book.is_sound()


async def test_a_charge_whose_answer_is_lost_is_asked_for_again_and_made_once(
    book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    await spend(book, 20)
    stripe.faults[INTENTS] = ["late", "drop", "drop"]
    await cashiers[0].sweep()
    assert (await renewal_states(book), await book.usd()) == (["pending"], 5)
    assert await cashiers[1].sweep() == 0  # not yet
    clock.move(seconds=61)
    await asyncio.gather(*(cashier.sweep() for cashier in cashiers))
    assert len(charges(stripe)) == 1
    assert (await renewal_states(book), await book.usd()) == (["completed"], 25)


async def test_a_process_that_died_before_asking_is_made_up_for(
    book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    await spend(book, 20)
    assert await book.do(renewals.intend, book.user_id, clock.now) is not None  # and then it was killed
    assert await cashiers[1].sweep() == 0
    clock.move(seconds=61)
    await cashiers[1].sweep()
    assert (len(charges(stripe)), await book.usd()) == (1, 25)


async def test_a_webhook_settles_what_the_answer_did_not(
    api: Api, book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    await spend(book, 20)
    stripe.faults[INTENTS] = ["late", "drop", "drop"]
    await cashiers[0].sweep()
    await deliver(api, stripe, stripe.events[-1])
    assert (await renewal_states(book), await book.usd()) == (["completed"], 25)
    clock.move(hours=1)
    assert await cashiers[0].sweep() == 0
    assert len(charges(stripe)) == 1


async def test_a_declined_card_is_tried_again_later_and_later_and_then_no_more(
    api: Api, book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    await spend(book, 20)
    stripe.declined["pm_card_visa"] = "insufficient_funds"
    pauses = []
    for _ in range(renewals.FAILURES_MAX):
        await cashiers[0].sweep()
        await deliver(api, stripe, stripe.events[-1])  # Stripe tells of it too; one failure counts once
        clock.now = datetime.now(UTC)
        assert await cashiers[0].sweep() == 0
        pauses.append((await settings_of(book)).next_attempt_at - datetime.now(UTC))
        clock.now = (await settings_of(book)).next_attempt_at + timedelta(seconds=1)
    assert [round(pause.total_seconds() / 3_600) for pause in pauses] == [1, 2, 4, 8, 16, 24, 24, 24]
    found = await settings_of(book)
    assert (found.is_enabled, found.failures) == (False, renewals.FAILURES_MAX)
    assert found.reason == "Your card was declined. (insufficient_funds)"
    assert (await book.told()).count("payment.failed") == renewals.FAILURES_MAX
    assert await cashiers[0].sweep() == 0
    assert (await book.usd(), await renewal_states(book)) == (5, ["failed"] * renewals.FAILURES_MAX)


async def test_a_month_costs_no_more_than_its_cap(
    api: Api, ann: Person, book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    wish = {**WISH, "monthly_cap_usd": 39}
    assert (await api.call("PUT", f"{BILLING}/auto-renew", wish, ann.by_token))[0] == 200
    for turn in range(2):
        await spend(book, int(await book.usd()), f"spent {turn}")
        await cashiers[0].sweep()
    assert len(charges(stripe)) == 1
    found = await settings_of(book)
    assert found.reason == "the cap of this month is reached"
    assert (found.next_attempt_at.day, found.next_attempt_at > clock.now) == (1, True)
    clock.now = found.next_attempt_at
    await cashiers[0].sweep()
    assert len(charges(stripe)) == 2


async def test_an_outcome_that_stays_unknown_switches_renewal_off_rather_than_charge_twice(
    book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    await spend(book, 20)
    stripe.faults[INTENTS] = ["drop"] * 100
    cashiers[0]._providers["stripe"]._client._requestor._options.max_network_retries = 0
    await cashiers[0].sweep()
    for _ in range(24):
        clock.move(hours=1, seconds=5)
        await cashiers[0].sweep()
    found = await settings_of(book)
    assert (found.is_enabled, found.reason.startswith("the outcome of a charge is unknown")) == (False, True)
    assert (await renewal_states(book), charges(stripe)) == (["failed"], [])


async def test_a_refund_whose_answer_is_lost_is_asked_for_again_and_made_once(
    api: Api, ann: Person, admin: Person, book: Book, cashiers: list[Cashier], stripe: Stripe, clock: Clock
) -> None:
    payment_id = (await payment_of(api, ann))["id"]
    stripe.faults["/v1/refunds"] = ["late", "drop", "drop"]
    status, told = await api.call("POST", f"{BILLING}/refunds", {"payment_id": payment_id}, admin.by_token)
    assert (status, told["state"]) == (201, "pending")
    assert await book.usd() == 0  # it cannot be spent meanwhile
    clock.move(seconds=61)
    await asyncio.gather(*(cashier.sweep() for cashier in cashiers))
    assert len(stripe.made("refund")) == 1
    assert (await book.told())[-1] == "payment.refunded"
    assert ((await settings_of(book)).is_enabled, charges(stripe)) == (False, [])  # else it were charged again
    assert await book.is_sound()


async def test_a_blocked_user_is_not_charged(book: Book, cashiers: list[Cashier], stripe: Stripe) -> None:
    await spend(book, 20)
    async with book.store.writing() as connection:
        await set_user_flags(connection, book.user_id, {"is_active": False})
    assert await cashiers[0].sweep() == 0


async def test_renewal_needs_a_saved_way_of_paying(api: Api, ann: Person) -> None:
    status, told = await api.call("PUT", f"{BILLING}/auto-renew", WISH, ann.by_token)
    assert (status, told["error"]) == (409, "no way of paying is saved; pay once with save_method")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"amount_usd": 5}, "amount_usd is below threshold_usd"),
        ({"monthly_cap_usd": 5}, "monthly_cap_usd is below amount_usd"),
        ({"threshold_usd": -1}, "threshold_usd"),
        ({"amount_usd": 0.1, "threshold_usd": 0.1}, "stripe takes 0.50 to"),
        ({"provider": "manual"}, "manual payments cannot renew themselves"),
        ({"provider": "x"}, "no payment provider 'x'"),
    ],
)
async def test_a_wrong_wish_is_refused_by_name(api: Api, ann: Person, change: dict[str, Any], named: str) -> None:
    status, told = await api.call("PUT", f"{BILLING}/auto-renew", {**WISH, **change}, ann.by_token)
    assert (status, named in told["error"]) == (422, True), told


async def test_renewal_can_be_switched_off_and_shown(api: Api, ann: Person, book: Book) -> None:
    _, told = await api.call("GET", f"{BILLING}/auto-renew", headers=ann.by_token)
    assert (told["threshold_usd"], told["amount_usd"], told["monthly_cap_usd"]) == (10.0, 20.0, 100.0)
    await api.call("PUT", f"{BILLING}/auto-renew", {"is_enabled": False}, ann.by_token)
    _, told = await api.call("GET", f"{BILLING}/auto-renew", headers=ann.by_token)
    assert told["is_enabled"] is False


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_who_switches_renewal_off_is_answered_after_a_charge_that_has_begun(
    api: Api, ann: Person, book: Book, clock: Clock
) -> None:
    await spend(book, 20)
    async with book.store.writing() as connection:
        assert await connection.run_sync(renewals.intend, ann.id, clock()) is not None
        asking = asyncio.create_task(api.call("PUT", f"{BILLING}/auto-renew", {"is_enabled": False}, ann.by_token))
        await who_waits(book.store)
    status, told = await asking
    assert (status, told["is_enabled"]) == (200, False)
