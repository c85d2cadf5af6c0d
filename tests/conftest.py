"""Fixtures that more than one folder of tests needs."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from postgres import Postgres

from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Start a PostgreSQL server."""
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def postgres_url(postgres: Postgres) -> AsyncIterator[str]:
    """Name an empty PostgreSQL database."""
    name = await postgres.create()
    yield postgres.url(name)
    await postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a database with nothing in it, of each kind in turn."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    """Open an empty store at the newest schema."""
    opened = open_store(store_url)
    await upgrade(opened)
    yield opened
    await opened.close()
