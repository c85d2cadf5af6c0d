"""Fixtures that more than one folder of tests needs.

A store's schema is made once in a session, by the migrations. A test with a `store` gets a copy of the SQLite file, or
the one PostgreSQL database with the rows it had then: a change of its schema would be seen by the next test.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from postgres import Postgres
from redis_server import RedisServer
from sqlalchemy.engine import make_url

from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import migrate, upgrade

# How long an example takes tells how busy the machine is.
settings.register_profile("gpuproxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gpuproxy")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Start a PostgreSQL server."""
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres_with_schema(postgres: Postgres) -> str:
    """Name the PostgreSQL database that all tests with a `store` use, one after the other."""
    name = asyncio.run(postgres.create())
    asyncio.run(migrate(postgres.url(name)))
    asyncio.run(postgres.keep(name))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name a SQLite file at the newest schema."""
    path = tmp_path_factory.mktemp("template") / "gpuproxy.db"
    asyncio.run(migrate(f"sqlite:///{path}"))
    return path


@pytest.fixture
def postgres_schema(request: pytest.FixtureRequest) -> str:
    """Name the database with the newest schema if the test takes `store`; else nothing."""
    return str(request.getfixturevalue("postgres_with_schema")) if "store" in request.fixturenames else ""


@pytest.fixture
async def postgres_url(postgres: Postgres, postgres_schema: str) -> AsyncIterator[str]:
    """Name an empty PostgreSQL database, without a schema unless the test takes `store`."""
    if postgres_schema:
        await postgres.reset(postgres_schema)
        yield postgres.url(postgres_schema)
        return
    name = await postgres.create()
    yield postgres.url(name)
    await postgres.drop(name)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis server of its own."""
    server = RedisServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a database with nothing in it, of each kind in turn."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def store(store_url: str, sqlite_template: Path) -> AsyncIterator[Store]:
    """Open an empty store at the newest schema."""
    path = make_url(store_url).database
    if store_url.startswith("sqlite:") and path and not Path(path).exists():
        shutil.copyfile(sqlite_template, path)
    opened = open_store(store_url)
    await upgrade(opened)
    yield opened
    await opened.close()
