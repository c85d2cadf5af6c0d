"""Fixtures that more than one folder of tests needs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a database that does not exist yet."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    """Open an empty store at the newest schema."""
    opened = open_store(store_url)
    await upgrade(opened)
    yield opened
    await opened.close()
