"""Paying with Stripe, over HTTP on both sides: the official SDK speaks to a simulated Stripe, which calls back."""

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from control.conftest import Api, Person

from gpuproxy.control import billing

from .books import Book
from .stripe_server import SECRET, Stripe, Thing

BILLING = "/api/v1/billing"
HOOK = f"{BILLING}/webhooks/stripe"


async def checkout(api: Api, person: Person, **body: Any) -> Any:
    wished = {"amount_usd": "25.00", "provider": "stripe", **body}
    status, told = await api.call("POST", f"{BILLING}/checkout", wished, person.by_token)
    assert status == 201, told
    return told


async def deliver(api: Api, stripe: Stripe, *events: Thing) -> list[tuple[int, Any]]:
    """Deliver events as Stripe does."""
    told = []
    for event in events:
        body, headers = stripe.signed(event)
        told.append(await api.call("POST", HOOK, body, headers))
    return told


async def paid(api: Api, stripe: Stripe, person: Person, **body: Any) -> Any:
    """Pay by Checkout and return the payment."""
    told = await checkout(api, person, **body)
    answers = await deliver(api, stripe, *stripe.pay(stripe.made("checkout.session")[-1]["id"]))
    assert [status for status, _ in answers] == [200, 200]
    return told


async def payment_of(api: Api, person: Person) -> Any:
    _, told = await api.call("GET", f"{BILLING}/payments", headers=person.by_token)
    return told["data"][0]


async def test_a_customer_pays_on_stripes_page_and_has_credit(api: Api, stripe: Stripe, ann: Person) -> None:
    told = await checkout(api, ann)
    assert told["checkout_url"].startswith("https://checkout.stripe.test/c/pay/cs_test_")
    assert (told["state"], told["amount_usd"], told["currency"]) == ("pending", 25.0, "usd")
    (session,) = stripe.made("checkout.session")
    assert session["amount_total"] == 2_500
    assert session["success_url"] == f"https://example.com/paid?payment_id={told['id']}&outcome=success"
    first, second = await deliver(api, stripe, *stripe.pay(session["id"]))
    assert (first[1]["count"], second[1]["count"]) == (1, 1)
    book = Book(api.store, ann.id)
    assert await book.usd() == 25
    assert await book.postings() == [("payment", 2_500)]
    assert await book.told() == ["credits.added", "payment.completed"]
    payment = await payment_of(api, ann)
    assert (payment["state"], payment["paid_usd"]) == ("completed", 25.0)
    assert await book.is_sound()


async def test_no_card_number_and_no_secret_of_ours_goes_to_stripe_or_into_the_store(
    api: Api, stripe: Stripe, ann: Person
) -> None:
    await checkout(api, ann, save_method=True)
    (call,) = stripe.calls
    assert "card" not in json.dumps(call)
    assert call[1]["payment_intent_data"]["setup_future_usage"] == "off_session"
    assert call[2].startswith("pay_")


@pytest.mark.parametrize("form", [{"amount_usd": 25}, {"amount_usd": "25"}, {"amount": 25.00}, {"amount": "25.0"}])
async def test_dollars_are_taken_as_number_or_text_under_both_names(
    api: Api, stripe: Stripe, ann: Person, form: dict[str, Any]
) -> None:
    status, told = await api.call("POST", f"{BILLING}/checkout", {**form, "provider": "stripe"}, ann.by_token)
    assert (status, told["amount_usd"]) == (201, 25.0)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"amount_usd": "0.49"}, 422, "0.49 is out of range; stripe takes 0.50 to 999999.99 dollars"),
        ({"amount_usd": "1000000"}, 422, "is out of range"),
        ({"amount_usd": "1.005"}, 422, "whole cents"),
        ({"amount_usd": "-5"}, 422, "amount_usd"),
        ({"amount_usd": "ten"}, 422, "amount_usd"),
        ({"amount_usd": True}, 400, "amount_usd"),
        ({}, 422, "write amount_usd"),
        ({"amount_usd": 1, "amount": 1}, 422, "write amount_usd, the dollars to pay, once"),
        ({"amount_usd": 1, "currency": "eur"}, 422, "currency 'eur' is not taken; pay in usd"),
        ({"amount_usd": 1, "provider": "paypal"}, 422, "no payment provider 'paypal'; known: manual, stripe"),
        ({"amount_usd": 1, "provider": ""}, 422, "known: manual, stripe"),
        ({"amount_usd": 1, "card_number": "4242"}, 422, "no field 'card_number'"),
    ],
)
async def test_a_wrong_checkout_is_refused_by_name(
    api: Api, ann: Person, stripe: Stripe, body: dict[str, Any], status: int, named: str
) -> None:
    got, told = await api.call("POST", f"{BILLING}/checkout", {"provider": "stripe", **body}, ann.by_token)
    assert (got, named in told["error"]) == (status, True), told
    assert stripe.calls == []


async def test_a_checkout_repeated_with_its_key_is_one(api: Api, stripe: Stripe, ann: Person) -> None:
    headers = {**ann.by_token, "Idempotency-Key": "k1"}
    body = {"amount_usd": 25, "provider": "stripe"}
    told = [await api.call("POST", f"{BILLING}/checkout", body, headers) for _ in range(3)]
    assert len({answer["id"] for _, answer in told}) == 1
    assert len(stripe.calls) == 1
    status, refused = await api.call("POST", f"{BILLING}/checkout", {**body, "amount_usd": 26}, headers)
    assert (status, refused["code"]) == (422, "UNPROCESSABLE")


async def test_a_checkout_whose_answer_was_lost_is_found_again(api: Api, stripe: Stripe, ann: Person) -> None:
    """Stripe did it, its answers were lost, our caller was told 502 and calls again."""
    stripe.faults["/v1/checkout/sessions"] = ["late", "drop", "drop"]
    headers = {**ann.by_token, "Idempotency-Key": "k1"}
    body = {"amount_usd": 25, "provider": "stripe"}
    status, told = await api.call("POST", f"{BILLING}/checkout", body, headers)
    assert (status, told["code"]) == (502, "UPSTREAM_UNREACHABLE")
    status, told = await api.call("POST", f"{BILLING}/checkout", body, headers)
    assert status == 201
    assert len(stripe.made("checkout.session")) == 1
    _, listed = await api.call("GET", f"{BILLING}/payments", headers=ann.by_token)
    assert listed["count"] == 1


@pytest.mark.parametrize(("fault", "status", "code"), [(401, 502, "UPSTREAM_INVALID"), (400, 422, "UNPROCESSABLE")])
async def test_what_stripe_refuses_is_told(
    api: Api, stripe: Stripe, ann: Person, fault: int, status: int, code: str
) -> None:
    stripe.faults["/v1/checkout/sessions"] = [fault]
    got, told = await api.call("POST", f"{BILLING}/checkout", {"amount_usd": 5, "provider": "stripe"}, ann.by_token)
    assert (got, told["code"], told["error"]) == (status, code, "stripe: something went wrong")


async def test_deliveries_of_one_event_however_many_post_once(api: Api, stripe: Stripe, ann: Person) -> None:
    await checkout(api, ann)
    _, event = stripe.pay(stripe.made("checkout.session")[0]["id"])
    body, headers = stripe.signed(event)
    counts = []
    for _ in range(10):
        told = await asyncio.gather(*(api.call("POST", HOOK, body, headers) for _ in range(10)))
        assert {status for status, _ in told} == {200}
        counts += [answer["count"] for _, answer in told]
    assert sum(counts) == 1
    assert await Book(api.store, ann.id).postings() == [("payment", 2_500)]


def tampered(body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    return body.replace(b"2500", b"9900"), headers


def unsigned(body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    return body, {}


def garbled(body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    return body, {"Stripe-Signature": "t,v1=1,=,t=x"}


def cut(body: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    return body[:-1], headers


@pytest.mark.parametrize("change", [tampered, unsigned, garbled, cut])
async def test_a_wrong_signature_is_refused(api: Api, stripe: Stripe, ann: Person, change: Any) -> None:
    await checkout(api, ann)
    _, event = stripe.pay(stripe.made("checkout.session")[0]["id"])
    status, told = await api.call("POST", HOOK, *change(*stripe.signed(event)))
    assert (status, told["code"]) == (400, "BAD_REQUEST")
    assert "Stripe-Signature is not accepted" in told["error"]
    assert await Book(api.store, ann.id).usd() == 0


@pytest.mark.parametrize("age_s", [301, 86_400, -400])
async def test_an_old_signature_is_refused_and_one_of_the_future(
    api: Api, stripe: Stripe, ann: Person, age_s: float
) -> None:
    await checkout(api, ann)
    _, event = stripe.pay(stripe.made("checkout.session")[0]["id"])
    status, _ = await api.call("POST", HOOK, *stripe.signed(event, time.time() - age_s))
    assert status == 400
    status, _ = await api.call("POST", HOOK, *stripe.signed(event, time.time() - 200))
    assert status == 200


async def test_another_secret_is_refused(api: Api, stripe: Stripe) -> None:
    event = stripe.event("payment_intent.succeeded", {"id": "pi_x"})
    assert (await api.call("POST", HOOK, *stripe.signed(event, secret="whsec_other")))[0] == 400
    assert (await api.call("POST", HOOK, *stripe.signed(event, secret=SECRET)))[0] == 200


async def test_a_webhook_is_bounded_and_needs_a_provider(api: Api, stripe: Stripe) -> None:
    status, told = await api.call("POST", HOOK, b" " * 262_145)
    assert (status, told["code"]) == (413, "BODY_TOO_LARGE")
    status, told = await api.call("POST", f"{BILLING}/webhooks/paypal", b"{}")
    assert (status, told["error"]) == (404, "no payment provider 'paypal' is configured")
    status, told = await api.call("POST", f"{BILLING}/webhooks/manual", b"{}")
    assert status == 404


@pytest.mark.parametrize("thing", [{}, {"id": "cs_1"}, {"id": 5, "metadata": []}, [], None])
async def test_a_signed_event_that_cannot_be_read_is_refused_not_a_fault(api: Api, stripe: Stripe, thing: Any) -> None:
    for kind in ("checkout.session.completed", "payment_intent.succeeded", "refund.created"):
        (answer,) = await deliver(api, stripe, stripe.event(kind, thing))
        assert answer[0] in (200, 422), answer


async def test_events_of_no_interest_are_taken_and_do_nothing(api: Api, stripe: Stripe, ann: Person) -> None:
    ((status, told),) = await deliver(api, stripe, stripe.event("customer.created", {"id": "cus_1"}))
    assert (status, told["count"]) == (200, 0)


async def test_a_session_nobody_paid_ends_the_payment(api: Api, stripe: Stripe, ann: Person) -> None:
    await checkout(api, ann)
    await deliver(api, stripe, stripe.expire(stripe.made("checkout.session")[0]["id"]))
    payment = await payment_of(api, ann)
    assert (payment["state"], payment["reason"]) == ("failed", "the checkout is expired")
    assert await Book(api.store, ann.id).told() == ["payment.failed"]


async def test_a_declined_card_leaves_the_session_open_for_another(api: Api, stripe: Stripe, ann: Person) -> None:
    await checkout(api, ann)
    session = stripe.made("checkout.session")[0]["id"]
    stripe.declined["pm_bad"] = "insufficient_funds"
    await deliver(api, stripe, *stripe.pay(session, "pm_bad"))
    assert (await payment_of(api, ann))["state"] == "pending"
    await deliver(api, stripe, *stripe.pay(session))
    assert await Book(api.store, ann.id).usd() == 25


async def test_euros_are_refused_clearly(api: Api, stripe: Stripe, ann: Person) -> None:
    await checkout(api, ann)
    _, event = stripe.pay(stripe.made("checkout.session")[0]["id"])
    event["data"]["object"]["currency"] = "eur"
    ((status, told),) = await deliver(api, stripe, event)
    assert (status, "is in 'eur'; only usd is taken" in told["error"]) == (422, True)
    assert await Book(api.store, ann.id).usd() == 0


async def test_an_admin_refunds_in_parts_and_stripe_does_it_once(
    api: Api, stripe: Stripe, ann: Person, admin: Person
) -> None:
    payment = await paid(api, stripe, ann)
    body = {"payment_id": payment["id"], "amount_usd": 10}
    headers = {**admin.by_token, "Idempotency-Key": "r1"}
    told = [await api.call("POST", f"{BILLING}/refunds", body, headers) for _ in range(3)]
    assert [(status, answer["state"], answer["amount_usd"]) for status, answer in told] == [
        (201, "completed", 10.0)
    ] * 3
    assert [refund["amount"] for refund in stripe.made("refund")] == [1_000]
    events = [event for event in stripe.events if event["type"].startswith("refund")]
    await deliver(api, stripe, *events)  # what we know already changes nothing
    book = Book(api.store, ann.id)
    assert (await book.usd(), (await payment_of(api, ann))["state"]) == (15, "partly_refunded")
    assert await book.told() == ["credits.added", "payment.completed", "payment.refunded"]
    status, answer = await api.call("POST", f"{BILLING}/refunds", {"payment_id": payment["id"]}, admin.by_token)
    assert (status, answer["amount_usd"]) == (201, 15.0)
    assert (await payment_of(api, ann))["state"] == "refunded"
    status, answer = await api.call("POST", f"{BILLING}/refunds", {"payment_id": payment["id"]}, admin.by_token)
    assert (status, answer["code"]) == (409, "CONFLICT")
    assert await book.is_sound()


async def test_more_than_is_left_is_not_refunded(api: Api, stripe: Stripe, ann: Person, admin: Person) -> None:
    payment = await paid(api, stripe, ann)
    for amount, status in (("25.01", 422), ("0.001", 422)):
        body = {"payment_id": payment["id"], "amount_usd": amount}
        assert (await api.call("POST", f"{BILLING}/refunds", body, admin.by_token))[0] == status
    assert (await api.call("POST", f"{BILLING}/refunds", {"payment_id": "pay_x"}, admin.by_token))[0] == 404
    assert stripe.made("refund") == []


async def test_a_refund_stripe_refuses_is_credited_again(api: Api, stripe: Stripe, ann: Person, admin: Person) -> None:
    payment = await paid(api, stripe, ann)
    stripe.faults["/v1/refunds"] = [400]
    status, told = await api.call("POST", f"{BILLING}/refunds", {"payment_id": payment["id"]}, admin.by_token)
    assert (status, told["state"], told["reason"]) == (201, "failed", "something went wrong")
    book = Book(api.store, ann.id)
    assert (await book.usd(), (await payment_of(api, ann))["state"]) == (25, "completed")
    assert await book.is_sound()


async def test_a_refund_from_the_dashboard_and_a_dispute_are_taken_out_of_credit(
    api: Api, stripe: Stripe, ann: Person
) -> None:
    await paid(api, stripe, ann)
    intent = stripe.made("payment_intent")[0]["id"]
    stripe.refund(intent, 500)
    await deliver(api, stripe, stripe.events[-1], stripe.events[-1])
    stripe.dispute(intent)
    await deliver(api, stripe, stripe.events[-1])
    book = Book(api.store, ann.id)
    assert (await book.usd(), (await payment_of(api, ann))["state"]) == (0, "disputed")
    assert await book.balance("payments") == 0
    assert await book.is_sound()


def test_workers_do_not_import_the_sdk() -> None:
    code = (
        "import sys; from gpuproxy.plugin import Registry; from gpuproxy_plugins import stripe;"
        "registry = Registry(); registry.run('stripe', stripe.register);"
        "assert list(registry.payments) == ['stripe'];"
        "sys.exit('stripe' in sys.modules or 'sqlalchemy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_sdk_the_plugin_says_what_to_install() -> None:
    code = (
        "import importlib.util as util; util.find_spec = lambda name: None;"
        "from gpuproxy.plugin import PluginError, Registry; from gpuproxy_plugins import stripe\n"
        "try: Registry().run('stripe', stripe.register)\n"
        "except PluginError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.strip() == "plugin 'stripe' needs the package stripe; install it: pip install 'gpuproxy[stripe]'"


@pytest.mark.parametrize("part", ["metadata", "client_reference_id", "payment_intent"])
async def test_an_id_that_is_no_text_is_refused(api: Api, stripe: Stripe, ann: Person, part: str) -> None:
    await checkout(api, ann)
    _, event = stripe.pay(stripe.made("checkout.session")[0]["id"])
    session = {**event["data"]["object"], "metadata": {}, part: {"payment_id": 7} if part == "metadata" else 7}
    body, headers = stripe.signed({**event, "type": "checkout.session.completed", "data": {"object": session}})
    status, told = await api.call("POST", HOOK, body, headers)
    assert (status, told["code"]) == (422, "UNPROCESSABLE"), told


async def test_payments_begun_at_once_are_not_more_than_may_wait(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = await api.person()
    monkeypatch.setattr(billing, "PENDING_MAX", 2)
    body = {"amount_usd": 5, "provider": "stripe"}
    told = await asyncio.gather(*(api.call("POST", f"{BILLING}/checkout", body, ann.by_token) for _ in range(8)))
    assert sorted(status for status, _ in told) == [201] * 2 + [429] * 6
