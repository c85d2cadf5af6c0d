"""Two gateways on one PostgreSQL and one Redis, which a test can take away."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gateways import Gateway, Origin, Place, Receipt, process
from postgres import Postgres
from redis_server import RedisServer
from sqlalchemy import text

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.ledger.book import credit
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade

USER = "caller@example.com"
PAID_MODEL = "paid-model"
CALL_NANOUSD = 100_000_000
PRICES = f'[[prices]]\nmodel = "{PAID_MODEL}"\nper_request_usd = "0.10"\n'
MONEY_NANOUSD = 10**15
Result = TypeVar("Result")


class Cluster:
    """The gateways, one store, and what stands in it."""

    def __init__(self, postgres: Postgres, redis: RedisServer, url: str) -> None:
        self.postgres = postgres
        self.redis = redis
        self.url = url
        self.gateways: list[Gateway] = []

    def use(self, work: Callable[[Store], Awaitable[Result]]) -> Result:
        """Do something with the store, from a thread without an event loop."""

        async def run() -> Result:
            store = open_store(self.url)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    async def in_store(self, work: Callable[[Store], Awaitable[Result]]) -> Result:
        """Do something with the store."""
        return await asyncio.to_thread(self.use, work)

    async def query(self, statement: str) -> list[Any]:
        """Read the store."""

        async def read(store: Store) -> list[Any]:
            async with store.reading() as connection:
                return list((await connection.execute(text(statement))).all())

        return await self.in_store(read)

    async def receipts(self) -> list[Receipt]:
        """Return every stored receipt."""
        return [Receipt(*row) for row in await self.query(f"SELECT {', '.join(Receipt._fields)} FROM receipts")]


async def people(store: Store) -> tuple[str, str]:
    """Fill a new store with one caller, who has money; return the key and its id."""
    await upgrade(store)
    user = await create_user(store, USER)
    await credit(store, user.id, MONEY_NANOUSD, "first")
    secret, key = await create_key(store, USER, rpm=0)
    return secret, key.id


@contextmanager
def cluster(directory: Path, origin: Origin, tail: str = "", workers: int = 1, **settings: Any) -> Iterator[Cluster]:
    """Run two gateways. Servers are of its own, so that they can be killed."""
    postgres, redis = Postgres(synchronous_commit="on"), RedisServer(directory)
    with ExitStack() as stack:
        stack.callback(postgres.stop)
        stack.callback(redis.stop)
        postgres.start()
        redis.start()
        made = Cluster(postgres, redis, postgres.url(asyncio.run(postgres.create())))
        key, key_id = made.use(people)
        places = []
        for name in ("a", "b"):
            (directory / name).mkdir()
            shared = {"store": {"url": made.url}, "redis": {"url": redis.url}, "server": {"workers": workers}}
            places.append(Place(directory / name, origin._replace(key=key, key_id=key_id), **{**shared, **settings}))
            places[-1].configure(PAID_MODEL, tail=PRICES + tail)
        started = [(place, stack.enter_context(process(place))) for place in places]  # both at once
        made.gateways = [Gateway.announced(place, child) for place, child in started]
        yield made
    for place in places:
        assert "Traceback" not in place.log.read_text(), place.log.read_text()
