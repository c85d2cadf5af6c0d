"""Every event of the table is published: each is provoked as in life, and heard over ``/ws`` by its owner."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientWebSocketResponse, web
from billing.conftest import provider_at
from billing.stripe_server import Stripe
from billing.test_stripe import BILLING, deliver, paid, payment_of
from control.conftest import KEYRING, Api, Client, Person
from fleet.conftest import Clock, Rounds
from fleet.market import Market
from gpuproxy_plugins.manual import Manual
from sqlalchemy import select

from gpuproxy.billing.cashier import Cashier
from gpuproxy.billing.renewals import BACKOFF_MAX, FAILURES_MAX
from gpuproxy.config import Config, build
from gpuproxy.control.app import application
from gpuproxy.control.parts import OFFERS, STREAM
from gpuproxy.control.telling import Teller
from gpuproxy.events.catalogue import CHANNELS, EVENTS, socket_type
from gpuproxy.events.post import Bounds, Poster
from gpuproxy.events.sender import Sender
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.sight import UNSEEN_S
from gpuproxy.guard import Guard
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.plugin import PaymentSettings
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.proxy.journal import frame
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import events
from gpuproxy.types import Receipt

from .receiver import Receiver

WAIT_S = 20
GPU = "/api/v1/gpu"
SETTINGS = {"rates": {"requests_per_minute": 0}, "events": {"usage_s": 0.1}, "egress": {"allow": ["127.0.0.0/8"]}}
RENEWAL = {"threshold_usd": 10, "amount_usd": 20, "monthly_cap_usd": 1_000, "provider": "stripe"}


class Scene:
    """A whole control plane on a clock, with a marketplace, Stripe, a customer and an admin."""

    def __init__(self, api: Api, config: Config, clock: Clock, market: Market, stripe: Stripe, journal: Path) -> None:
        self.api, self.config, self.clock, self.market, self.stripe = api, config, clock, market, stripe
        self.journal = journal
        self.teller = Teller(api.store, config, self._leads)
        self.reconciler = Rounds(api.fleet)
        self.ann: Person
        self.admin: Person
        self.cashier: Cashier
        self.socket: ClientWebSocketResponse

    async def _leads(self) -> bool:
        return True

    async def ask(self, method: str, path: str, body: Any = None, person: Person | None = None) -> Any:
        """Call the API; it must agree."""
        status, told = await self.api.call(method, path, body, (person or self.ann).by_token)
        assert status < 300, told
        return told

    async def give(self, usd: float, key: str = "gift") -> None:
        await credit(self.api.store, self.ann.id, int(usd * 1e9), key)

    async def rent(self, **body: Any) -> Any:
        offer = (await self.ask("GET", f"{GPU}/instances"))["data"][0]
        return (await self.ask("POST", f"{GPU}/instances/simulated/{offer['id']}", {"image": "x", **body}))["data"]

    async def running(self) -> Any:
        rental = await self.rent()
        await self.pass_by(20)
        return rental

    async def pass_by(self, seconds: float) -> None:
        """Let time pass, and the fleet be looked after."""
        self.clock.advance(seconds)
        await self.reconciler.tend()
        await self.reconciler.cycle()

    async def call_models(self, count: int) -> None:
        """Let receipts of calls that cost a dollar each come from a worker."""
        ingest = Ingest(self.api.store, self.journal, Catalogue([Price("m1", request_nanousd=10**9)]), "here")
        written = [_call(number, self.ann) for number in range(count)]
        (self.journal / "000-7-000000.log").write_bytes(frame(written))
        await ingest.ingest_once()
        ingest.close()

    async def names(self) -> set[str]:
        async with self.api.store.reading() as connection:
            return set(await connection.scalars(select(events.c.name).distinct()))

    async def hear(self, name: str) -> Any:
        """Return the next event of that name which the customer is sent."""
        await self.api.client.app[STREAM].poll_once()
        while (told := await self.socket.receive_json(timeout=WAIT_S))["type"] != socket_type(name):
            pass
        return told["payload"]


def _call(number: int, person: Person) -> Receipt:
    return Receipt(
        f"r{number}", "q", 10**18 + number, 1, 1, person.id, person.key_id, "openinference", "llm", "m1", "POST",
        "/v1/x", 200, "ok", "", 100, 1_000, 10, 4, 20, "provider", 1, False,
    )  # fmt: skip


@pytest.fixture
async def scene(
    tmp_path: Path, store: Store, aiohttp_client: Callable[[web.Application], Awaitable[Client]]
) -> AsyncIterator[Scene]:
    config, clock, stripe = build(SETTINGS), Clock(), Stripe()
    await stripe.start()
    market = Market(clock)
    fleet = Fleet(store, {"simulated": market}, config.fleet)
    fleet.now = clock
    await fleet.open()
    provider = provider_at(stripe.url)
    payments = {"stripe": provider, "manual": Manual(PaymentSettings())}
    app = application(store, asyncio.Event(), config, KEYRING, providers=payments, fleet=fleet)
    api = Api(store, await aiohttp_client(app), fleet)
    (tmp_path / "journal").mkdir()
    made = Scene(api, config, clock, market, stripe, tmp_path / "journal")
    made.cashier = Cashier(store, {"stripe": provider}, clock)
    made.ann, made.admin = await api.person(), await api.person(is_admin=True)
    await app[STREAM].start()
    async with api.client.ws_connect("/ws", headers=made.ann.by_key) as made.socket:
        await made.socket.send_json({"type": "subscribe", "channels": list(CHANNELS)})
        assert (await made.socket.receive_json(timeout=WAIT_S))["type"] == "subscribed"
        yield made
    await stripe.stop()


async def watch_the_market(scene: Scene) -> None:
    """Look at the marketplace until models have come, gone and changed their price."""
    offers, wanted = scene.api.client.app[OFFERS], {"gpu.available", "gpu.unavailable", "gpu.price_changed"}
    await offers.refresh_all()
    for _ in range(400):
        scene.clock.advance(1_200)
        await offers.refresh_all()
        await scene.api.client.app[STREAM].poll_once()
        if wanted <= await scene.names():
            return


async def start_an_instance(scene: Scene) -> None:
    await scene.give(100)
    await scene.running()


async def lose_sight_of_an_instance(scene: Scene) -> None:
    await scene.give(100)
    rental = await scene.running()
    scene.market.shown[rental["instance_id"].removeprefix("sim-")] = "lost"
    await scene.pass_by(60)
    await scene.pass_by(UNSEEN_S)


async def stop_an_instance(scene: Scene) -> None:
    await scene.give(100)
    rental = await scene.running()
    await scene.ask("POST", f"{GPU}/rentals/{rental['contract_id']}/stop")


async def destroy_an_instance(scene: Scene) -> None:
    await scene.give(100)
    rental = await scene.running()
    await scene.ask("DELETE", f"{GPU}/instances/simulated/{rental['contract_id']}")


async def rent_what_is_never_made(scene: Scene) -> None:
    await scene.give(100)
    scene.market.faults["create"] = "never"
    await scene.api.call("POST", f"{GPU}/instances/simulated/{await cheapest(scene)}", {"image": "x"}, scene.ann.by_key)
    await scene.pass_by(scene.config.fleet.pending_s + 60)


async def cheapest(scene: Scene) -> str:
    return str((await scene.ask("GET", f"{GPU}/instances"))["data"][0]["id"])


async def run_out_of_money(scene: Scene) -> None:
    offer = (await scene.ask("GET", f"{GPU}/instances"))["data"][0]
    await scene.give(offer["price_per_hour"] * 1.05)
    await scene.running()
    for _ in range(60):
        await scene.pass_by(60)


async def see_a_stranger(scene: Scene) -> None:
    await scene.ask("PATCH", f"/api/v1/admin/users/{scene.ann.id}", {"is_admin": True}, scene.admin)
    await scene.market.stranger()
    await scene.pass_by(1)


async def pay(scene: Scene) -> None:
    await paid(scene.api, scene.stripe, scene.ann)


async def be_declined(scene: Scene) -> None:
    await scene.ask("POST", f"{BILLING}/checkout", {"amount_usd": 25, "provider": "stripe"})
    await deliver(scene.api, scene.stripe, scene.stripe.expire(scene.stripe.made("checkout.session")[-1]["id"]))


async def be_refunded(scene: Scene) -> None:
    await pay(scene)
    payment = await payment_of(scene.api, scene.ann)
    await scene.ask("POST", f"{BILLING}/refunds", {"payment_id": payment["id"]}, scene.admin)


async def agree_to_renewal(scene: Scene) -> None:
    await paid(scene.api, scene.stripe, scene.ann, save_method=True)
    await scene.ask("PUT", f"{BILLING}/auto-renew", RENEWAL)


async def renew(scene: Scene) -> None:
    await agree_to_renewal(scene)
    await scene.call_models(20)
    await scene.cashier.sweep()


async def switch_renewal_off(scene: Scene) -> None:
    await agree_to_renewal(scene)
    await scene.ask("PUT", f"{BILLING}/auto-renew", {"is_enabled": False})


async def be_given_credit(scene: Scene) -> None:
    await scene.ask("POST", "/api/v1/admin/credits/add", {"user_id": scene.ann.id, "amount": 100.0}, scene.admin)


async def spend_all_but_little(scene: Scene) -> None:
    await scene.give(3.5)
    await scene.call_models(3)
    await scene.teller.tell_low()


async def use_models(scene: Scene) -> None:
    await scene.give(100)
    await scene.call_models(3)
    await asyncio.sleep(scene.config.events.usage_s)  # a sum is of so long
    assert await scene.teller.tell_usage() == 1


def spend_of_ten(count: int) -> Callable[[Scene], Awaitable[None]]:
    async def spend(scene: Scene) -> None:
        await scene.give(100)
        await scene.ask("POST", "/api/v1/user/budgets", {"limit": 10, "window_s": 86_400})
        await scene.call_models(count)

    return spend


@asynccontextmanager
async def webhook(scene: Scene, path: str) -> AsyncIterator[tuple[str, Sender, Receiver]]:
    async with Receiver().running() as receiver:
        wished = {"url": f"{receiver.url}{path}", "events": ["credits.added"], "secret": "0123456789abcdef"}
        made = await scene.ask("POST", "/api/v1/webhooks", wished)
        poster = Poster(Bounds(30, 30, 5, {}, Guard(("127.0.0.0/8",))))
        sender = Sender(scene.api.store, KEYRING, poster, scene.config.webhooks)
        yield made["id"], sender, receiver
        await sender.close()


async def try_a_webhook(scene: Scene) -> None:
    async with webhook(scene, "/ok") as (webhook_id, sender, receiver):
        await scene.ask("POST", f"/api/v1/webhooks/{webhook_id}/test")
        await sender.send_due()
        await sender.idle()
        assert [each.told["event"] for each in receiver.taken] == ["webhook.test"]


async def post_to_who_is_gone(scene: Scene) -> None:
    async with webhook(scene, "/gone") as (_, sender, _):
        await scene.give(1)
        await sender.send_due()
        await sender.idle()


PROVOKED: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "gpu.available": watch_the_market,
    "gpu.unavailable": watch_the_market,
    "gpu.price_changed": watch_the_market,
    "instance.created": start_an_instance,
    "instance.running": start_an_instance,
    "instance.unreachable": lose_sight_of_an_instance,
    "instance.stopped": stop_an_instance,
    "instance.failed": rent_what_is_never_made,
    "instance.warning": run_out_of_money,
    "instance.destroyed": destroy_an_instance,
    "provider.finding": see_a_stranger,
    "payment.completed": pay,
    "payment.failed": be_declined,
    "payment.refunded": be_refunded,
    "subscription.renewed": renew,
    "subscription.cancelled": switch_renewal_off,
    "credits.added": be_given_credit,
    "budget.warning": spend_of_ten(8),
    "budget.exceeded": spend_of_ten(10),
    "credits.low": spend_all_but_little,
    "usage.recorded": use_models,
    "webhook.test": try_a_webhook,
    "webhook.disabled": post_to_who_is_gone,
}


def test_nothing_is_in_the_table_that_nobody_publishes() -> None:
    assert list(PROVOKED) == list(EVENTS)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", EVENTS)
async def test_it_is_heard_when_it_happens(scene: Scene, name: str) -> None:
    await PROVOKED[name](scene)
    assert await scene.hear(name)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_what_calls_cost_is_told_once_as_a_sum(scene: Scene) -> None:
    await use_models(scene)
    told = await scene.hear("usage.recorded")
    assert (told["calls"], told["cost"], told["cost_nanousd"]) == (3, 3.0, 3 * 10**9)
    assert told["since"] <= told["until"]
    assert await scene.teller.tell_usage() == 0


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_renewal_that_fails_too_often_is_told_to_end(scene: Scene) -> None:
    await agree_to_renewal(scene)
    await scene.call_models(20)
    (method,) = {intent["payment_method"] for intent in scene.stripe.made("payment_intent")}
    scene.stripe.declined[method] = "insufficient_funds"
    scene.clock.now = datetime.now(UTC)
    for _ in range(FAILURES_MAX):
        scene.clock.now += BACKOFF_MAX
        await scene.cashier.sweep()
    assert (await scene.hear("subscription.cancelled"))["provider"] == "stripe"
