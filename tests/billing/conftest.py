"""A customer's book."""

import pytest

from gpuproxy.access.accounts import create_user
from gpuproxy.store.engine import Store

from .books import Book


@pytest.fixture
async def book(store: Store) -> Book:
    """Return the book of a customer who has nothing."""
    return Book(store, (await create_user(store, "ann@example.com")).id)
