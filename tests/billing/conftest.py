"""A customer's book; Stripe; the management API with both ways to pay."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from control.conftest import KEYRING, Api, Client, Person
from gpuproxy_plugins.manual import Manual
from gpuproxy_plugins.stripe import Stripe

from gpuproxy.access.accounts import create_user
from gpuproxy.billing.cashier import Cashier
from gpuproxy.config import build
from gpuproxy.control.app import application
from gpuproxy.control.parts import FLEET
from gpuproxy.control.paying import CASHIER
from gpuproxy.plugin import PaymentSettings
from gpuproxy.store.engine import Store

from . import stripe_server
from .books import Book


@pytest.fixture
async def book(store: Store) -> Book:
    """Return the book of a customer who has nothing."""
    return Book(store, (await create_user(store, "ann@example.com")).id)


@pytest.fixture
async def stripe() -> AsyncIterator[stripe_server.Stripe]:
    """Run Stripe."""
    server = stripe_server.Stripe()
    await server.start()
    yield server
    await server.stop()


def provider_at(url: str) -> Stripe:
    """Return the plugin's provider, which speaks to `url`, impatient enough for tests."""
    settings = PaymentSettings(stripe_server.KEY, (stripe_server.SECRET,), url, "https://example.com/paid")
    return Stripe(settings)


@pytest.fixture
async def provider(stripe: stripe_server.Stripe) -> AsyncIterator[Stripe]:
    """Return Stripe's provider."""
    made = provider_at(stripe.url)
    yield made
    await made.close()


@pytest.fixture
async def api(
    store: Store,
    provider: Stripe,
    aiohttp_client: Callable[[web.Application], Awaitable[Client]],
) -> Api:
    """Serve the management API, which takes money by Stripe and by hand."""
    providers = {"stripe": provider, "manual": Manual(PaymentSettings())}
    app = application(store, asyncio.Event(), build({}), KEYRING, providers=providers)
    return Api(store, await aiohttp_client(app), app[FLEET])


@pytest.fixture
def cashier(api: Api) -> Cashier:
    """Return who asks Stripe again."""
    return api.client.app[CASHIER]


@pytest.fixture
async def ann(api: Api) -> Person:
    """Return a customer."""
    return await api.person()


@pytest.fixture
async def admin(api: Api) -> Person:
    """Return an admin."""
    return await api.person(is_admin=True)
