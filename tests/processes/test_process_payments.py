"""Two gateways on one PostgreSQL are told of one payment at once, each by its own control process: it counts once.

GPUPROXY_TEST_PAYMENT_ROUNDS sets how many payments; the default keeps the run short.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession
from billing.books import USD, Book
from billing.stripe_server import KEY, SECRET, Stripe
from cluster import Cluster, cluster
from gateways import Origin

from gpuproxy.access.accounts import create_user
from gpuproxy.billing.payments import Payment
from gpuproxy.store.engine import Store, open_store

ROUNDS = int(os.environ.get("GPUPROXY_TEST_PAYMENT_ROUNDS", "5"))
TOLD_EACH = 8  # times, by each gateway, of each event
PAYMENTS = """[[payments]]
name = "stripe"
api_key_env = "TEST_STRIPE_KEY"
webhook_secret_env = "TEST_STRIPE_SECRET"
return_url = "https://example.com/paid"
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Cluster]:
    plugins = {"enabled": ["openinference", "stripe"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_STRIPE_KEY", KEY)
        patch.setenv("TEST_STRIPE_SECRET", SECRET)
        with cluster(tmp_path_factory.mktemp("paid"), origin, PAYMENTS, plugins=plugins) as made:
            yield made


@pytest.fixture
async def store(nodes: Cluster) -> AsyncIterator[Store]:
    opened = open_store(nodes.url)
    yield opened
    await opened.close()


def success_of(payment: Payment) -> list[dict[str, Any]]:
    """Return what Stripe tells of a payment: that the intent succeeded, and that the checkout is complete."""
    paid = {"currency": "usd", "metadata": {"payment_id": payment.id, "by": "checkout"}, "customer": None}
    intent = {**paid, "id": f"pi_{payment.id}", "amount_received": 2_500}
    session = {**paid, "id": f"cs_{payment.id}", "amount_total": 2_500, "payment_status": "paid"}
    kinds = {
        "payment_intent.succeeded": intent,
        "checkout.session.completed": {**session, "payment_intent": intent["id"]},
    }
    return [
        {"id": f"evt_{kind}_{payment.id}", "object": "event", "type": kind, "data": {"object": thing}}
        for kind, thing in kinds.items()
    ]


async def new_book(store: Store, name: str) -> Book:
    return Book(store, (await create_user(store, f"{name}@example.com")).id)


async def tell(session: ClientSession, port: int, body: bytes, headers: dict[str, str]) -> int:
    """Deliver an event; return how many events were new."""
    url = f"http://127.0.0.1:{port}/api/v1/billing/webhooks/stripe"
    async with session.post(url, data=body, headers=headers) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        return told["count"]


@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_a_payment_two_processes_are_told_of_at_once_is_credited_once(
    nodes: Cluster, store: Store, round_: int
) -> None:
    book = await new_book(store, f"payer{round_}")
    payment = await book.pay(25)
    signed = [Stripe().signed(event) for event in success_of(payment)]
    ports = [gateway.port for gateway in nodes.gateways]
    async with ClientSession() as session:
        calls = [tell(session, port, *each) for _ in range(TOLD_EACH) for port in ports for each in signed]
        answers = await asyncio.gather(*calls)
        again = await asyncio.gather(*(tell(session, port, *each) for port in ports for each in signed))
    assert sum(answers) == len(signed), "each event did something once"
    assert sum(again) == 0
    assert await book.usd() == 25
    assert await book.state(payment) == ("completed", 25, 0)
    assert await book.balance("payments") == -25 * (round_ + 1) * USD
    assert await book.is_sound()
