"""What a key may do, as workers are told."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text, update

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.access.grants import grant_for
from gpuproxy.codec.key import digest_of
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys

EMAIL = "ann@example.com"


@pytest.fixture
async def user_id(store: Store) -> str:
    return (await create_user(store, EMAIL)).id


async def test_a_key_grants_what_was_asked(store: Store, user_id: str) -> None:
    expires = datetime.now(UTC) + timedelta(days=1)
    secret, key = await create_key(store, EMAIL, "laptop", expires, ["m1", "m2"])
    grant = await grant_for(store, digest_of(secret.encode()))
    assert grant is not None
    assert (grant.key_id, grant.user_id, grant.models) == (key.id, user_id, ("m1", "m2"))
    assert grant.expires_ns == int(expires.timestamp()) * 10**9 + expires.microsecond * 1_000


async def test_a_plain_key_grants_every_model_for_ever(store: Store, user_id: str) -> None:
    secret, _ = await create_key(store, EMAIL)
    grant = await grant_for(store, digest_of(secret.encode()))
    assert grant is not None
    assert (grant.models, grant.expires_ns, grant.scopes) == (None, 0, ("inference", "account"))


async def test_an_unknown_key_has_no_grant(store: Store, user_id: str) -> None:
    assert await grant_for(store, bytes(32)) is None


async def test_an_expired_key_has_no_grant(store: Store, user_id: str) -> None:
    secret, _ = await create_key(store, EMAIL, expires_at=datetime.now(UTC) + timedelta(days=1))
    async with store.writing() as connection:
        await connection.execute(update(api_keys).values(expires_at=datetime.now(UTC)))
    assert await grant_for(store, digest_of(secret.encode())) is None


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)  # PostgreSQL plans by the size of tables
async def test_the_grant_is_found_by_index(store: Store) -> None:
    async with store.reading() as connection:
        plan = await connection.execute(
            text("EXPLAIN QUERY PLAN SELECT * FROM api_keys JOIN users ON users.id = user_id WHERE digest = x'00'")
        )
        steps = [row[3] for row in plan]
    assert not [step for step in steps if step.startswith("SCAN")]
