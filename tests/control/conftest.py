"""People who call the management API."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from argon2 import PasswordHasher
from gpuproxy_plugins.simulated import Simulated
from sqlalchemy import insert

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.access.keyring import fresh_keyring
from gpuproxy.access.sessions import start_session
from gpuproxy.access.tokens import COOKIE, claims_for, read, sign
from gpuproxy.config import Config, build
from gpuproxy.control.app import application
from gpuproxy.fleet.parts import Fleet
from gpuproxy.plugin import PaymentProvider, ProviderSettings
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import passwords

Client = TestClient[web.Request, web.Application]
KEYRING = fresh_keyring()
MARKET_NS = 1_768_219_200 * 10**9  # a moment at which the market has machines for every filter
PASSWORD = "correct horse battery staple"
# As weak as Argon2 goes: most tests need a password, few need a good hash of it.
WEAK_HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)


class Person(NamedTuple):
    """A user with a session and a key."""

    id: str
    email: str
    access_token: str
    refresh_token: str
    api_key: str
    key_id: str

    @property
    def by_token(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.access_token}"}

    @property
    def by_cookie(self) -> dict[str, str]:
        """Return what a browser sends from a page of the gateway."""
        session_id = read(KEYRING, self.access_token).sid
        cookie = sign(KEYRING, claims_for(self.id, session_id, 60, COOKIE))
        return {"Cookie": f"gpuproxy={cookie}", "Sec-Fetch-Site": "same-origin", "Accept": "text/html,*/*"}

    @property
    def by_key(self) -> dict[str, str]:
        return {"X-API-Key": self.api_key}


class Api:
    """The management API over a store, and the people who use it."""

    def __init__(self, store: Store, client: Client, fleet: Fleet) -> None:
        self.store = store
        self.fleet = fleet
        self.client = client
        self._count = 0

    async def person(self, is_admin: bool = False) -> Person:
        """Add a user; their password is PASSWORD."""
        self._count += 1
        email = f"person{self._count}@example.com"
        user = await create_user(self.store, email, is_admin)
        async with self.store.writing() as connection:
            row = {"user_id": user.id, "hash": WEAK_HASH, "changed_at": datetime.now(UTC)}
            await connection.execute(insert(passwords).values(**row))
            session = await start_session(connection, user.id, WEAK_HASH, 60)
        token = sign(KEYRING, claims_for(user.id, session.id, 60))
        secret, key = await create_key(self.store, email)
        return Person(user.id, email, token, session.refresh_token, secret, key.id)

    async def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Call, without a Content-Type as curl would; return status and JSON body."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.request(method, path, data=data, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None) if answer.content_type.endswith("json") else {}


@pytest.fixture
async def settings() -> Config:
    """Return the configuration; a test may bring its own."""
    mcp = {"authorization_servers": ["https://login.example.com"]}
    return build({"rates": {"requests_per_minute": 0}, "fleet": {"poll_s": 0.1}, "mcp": mcp})


@pytest.fixture
async def providers() -> Mapping[str, PaymentProvider]:
    """Return who takes payments: nobody; a test may bring somebody."""
    return {}


@pytest.fixture
async def fleet(store: Store, settings: Config) -> Fleet:
    """Return a fleet with a marketplace whose machines run at once, and which has the same ones whenever tests run."""
    ahead_ns = MARKET_NS - time.time_ns()
    provider = Simulated(ProviderSettings(options={"boot_s": "0"}), lambda: time.time_ns() + ahead_ns)
    made = Fleet(store, {provider.name: provider}, settings.fleet)
    await made.open()
    return made


@pytest.fixture
async def api(
    store: Store,
    settings: Config,
    providers: Mapping[str, PaymentProvider],
    fleet: Fleet,
    aiohttp_client: Callable[[web.Application], Awaitable[Client]],
) -> Api:
    """Serve the management API."""
    app = application(store, asyncio.Event(), settings, KEYRING, providers=providers, fleet=fleet)
    return Api(store, await aiohttp_client(app), fleet)
