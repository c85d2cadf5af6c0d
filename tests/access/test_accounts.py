"""Users and keys: who may call, and who may no more."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text, update

from gpuproxy.access.accounts import (
    ChangedKeys,
    changed_keys_after,
    create_key,
    create_user,
    find_user,
    grant_for,
    list_keys,
    list_users,
    newest_change,
    revoke_key,
    revoked_keys_since,
    set_active,
)
from gpuproxy.codec.key import digest_of
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, changes, metadata

EMAIL = "ann@example.com"


@pytest.fixture
async def user_id(store: Store) -> str:
    return (await create_user(store, EMAIL)).id


async def test_a_created_user_is_found(store: Store) -> None:
    made = await create_user(store, EMAIL, is_admin=True)
    assert await find_user(store, EMAIL) == made
    assert (made.is_admin, made.is_active) == (True, True)
    assert await list_users(store) == [made]


async def test_an_address_is_one_user_in_any_case(store: Store, user_id: str) -> None:
    with pytest.raises(GatewayError, match=r"user ann@example\.com exists already") as caught:
        await create_user(store, "Ann@Example.COM")
    assert caught.value.code == "CONFLICT"
    assert (await find_user(store, "ANN@example.com")).id == user_id


@pytest.mark.parametrize("email", ["", "ann", "@", "a b@c", "a@b@c", "a@b\n", "a@" + "b" * 260])
async def test_what_is_no_address_is_refused(store: Store, email: str) -> None:
    with pytest.raises(GatewayError) as caught:
        await create_user(store, email)
    assert (caught.value.code, caught.value.param) == ("UNPROCESSABLE", "email")


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


async def test_the_secret_is_kept_nowhere(store: Store, user_id: str) -> None:
    secret, key = await create_key(store, EMAIL)
    async with store.reading() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(text(f"SELECT * FROM {table.name}")):
                assert secret not in repr(tuple(row))
                assert secret[12:] not in repr(tuple(row))
    assert secret.startswith(key.prefix)
    assert len(key.prefix) == 12


async def test_an_unknown_key_has_no_grant(store: Store, user_id: str) -> None:
    assert await grant_for(store, bytes(32)) is None


async def test_an_expired_key_has_no_grant(store: Store, user_id: str) -> None:
    secret, _ = await create_key(store, EMAIL, expires_at=datetime.now(UTC) + timedelta(days=1))
    async with store.writing() as connection:
        await connection.execute(update(api_keys).values(expires_at=datetime.now(UTC)))
    assert await grant_for(store, digest_of(secret.encode())) is None


async def test_a_revoked_key_has_no_grant_and_is_announced(store: Store, user_id: str) -> None:
    secret, key = await create_key(store, EMAIL)
    assert await revoke_key(store, key.id) is True
    assert await grant_for(store, digest_of(secret.encode())) is None
    assert await changed_keys_after(store, 0) == ChangedKeys(1, (key.id,))


async def test_a_key_is_revoked_once(store: Store, user_id: str) -> None:
    _, key = await create_key(store, EMAIL)
    await revoke_key(store, key.id)
    assert await revoke_key(store, key.id) is False
    assert await newest_change(store) == 1


async def test_racing_revocations_are_announced_once(store: Store, user_id: str) -> None:
    _, key = await create_key(store, EMAIL)
    assert sum(await asyncio.gather(*(revoke_key(store, key.id) for _ in range(5)))) == 1
    assert await newest_change(store) == 1


async def test_an_unknown_key_cannot_be_revoked(store: Store) -> None:
    with pytest.raises(GatewayError, match="no key 'nix'; list them with: gpuproxy key list"):
        await revoke_key(store, "nix")


async def test_a_blocked_user_loses_all_keys_until_let_in_again(store: Store, user_id: str) -> None:
    made = [await create_key(store, EMAIL) for _ in range(2)]
    digests = [digest_of(secret.encode()) for secret, _ in made]
    await set_active(store, EMAIL, False)
    assert [await grant_for(store, digest) for digest in digests] == [None, None]
    key_ids = tuple(key.id for _, key in made)
    assert await changed_keys_after(store, 0) == ChangedKeys(1, key_ids)
    await set_active(store, EMAIL, True)
    assert await changed_keys_after(store, 1) == ChangedKeys(2, (), key_ids)
    assert None not in [await grant_for(store, digest) for digest in digests]


async def test_the_feed_is_read_from_where_it_was_left(store: Store, user_id: str) -> None:
    keys = [(await create_key(store, EMAIL))[1].id for _ in range(3)]
    await revoke_key(store, keys[0])
    first = await changed_keys_after(store, 0)
    await revoke_key(store, keys[1])
    assert first == ChangedKeys(1, (keys[0],))
    assert await changed_keys_after(store, 1) == ChangedKeys(2, (keys[1],))
    assert await changed_keys_after(store, 2) == ChangedKeys(2)


async def test_recent_revocations_can_be_asked_for_by_time(store: Store, user_id: str) -> None:
    _, key = await create_key(store, EMAIL)
    await revoke_key(store, key.id)
    now = datetime.now(UTC)
    assert await revoked_keys_since(store, now - timedelta(seconds=60)) == (key.id,)
    assert await revoked_keys_since(store, now + timedelta(seconds=60)) == ()


async def test_a_user_let_in_again_has_lost_nothing_but_what_was_revoked(store: Store, user_id: str) -> None:
    kept, revoked = [(await create_key(store, EMAIL))[1].id for _ in range(2)]
    await set_active(store, EMAIL, False)
    await revoke_key(store, revoked)
    await set_active(store, EMAIL, True)
    assert await changed_keys_after(store, 0) == ChangedKeys(3, (revoked,), (kept,))
    assert await revoked_keys_since(store, datetime.now(UTC) - timedelta(seconds=60)) == (revoked,)


async def test_a_failed_change_is_not_announced(store: Store) -> None:
    with pytest.raises(GatewayError):
        await set_active(store, "nobody@example.com", False)
    async with store.reading() as connection:
        assert (await connection.execute(select(changes))).all() == []


async def test_a_key_for_nobody_is_refused(store: Store) -> None:
    with pytest.raises(GatewayError, match="no user nobody@x; create one with: gpuproxy user create nobody@x"):
        await create_key(store, "nobody@x")


async def test_bad_fields_of_a_key_are_named(store: Store, user_id: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    for fields, param in (
        ({"name": "x" * 101}, "name"),
        ({"expires_at": past}, "expires_at"),
        ({"models": [""]}, "models"),
    ):
        with pytest.raises(GatewayError) as caught:
            await create_key(store, EMAIL, **fields)  # type: ignore[arg-type]
        assert caught.value.param == param


async def test_keys_are_listed_by_user(store: Store, user_id: str) -> None:
    await create_user(store, "bob@example.com")
    _, anns = await create_key(store, EMAIL, models=["m"])
    _, bobs = await create_key(store, "bob@example.com")
    assert await list_keys(store, EMAIL) == [anns]
    assert await list_keys(store) == [anns, bobs]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)  # PostgreSQL plans by the size of tables
async def test_the_grant_is_found_by_index(store: Store) -> None:
    async with store.reading() as connection:
        plan = await connection.execute(
            text("EXPLAIN QUERY PLAN SELECT * FROM api_keys JOIN users ON users.id = user_id WHERE digest = x'00'")
        )
        steps = [row[3] for row in plan]
    assert not [step for step in steps if step.startswith("SCAN")]
