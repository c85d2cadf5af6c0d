"""Users and keys: who may call, and who may no more."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from gpuproxy.access.accounts import (
    create_key,
    create_user,
    find_user,
    list_keys,
    list_users,
    revoke_key,
    set_active,
    set_user_flags,
)
from gpuproxy.access.changes import newest_change
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import metadata

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


async def test_the_secret_is_kept_nowhere(store: Store, user_id: str) -> None:
    secret, key = await create_key(store, EMAIL)
    async with store.reading() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(text(f"SELECT * FROM {table.name}")):
                assert secret not in repr(tuple(row))
                assert secret[12:] not in repr(tuple(row))
    assert secret.startswith(key.prefix)
    assert len(key.prefix) == 12


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


@pytest.mark.parametrize("flags", [{"is_admin": False}, {"is_active": False}, {"is_admin": True, "is_active": False}])
async def test_the_last_active_admin_stays(store: Store, user_id: str, flags: dict[str, bool]) -> None:
    blocked = await create_user(store, "blocked@example.com", is_admin=True)
    last = await create_user(store, "last@example.com", is_admin=True)
    await set_active(store, blocked.email, False)
    with pytest.raises(GatewayError, match="is the last active admin") as caught:
        async with store.writing() as connection:
            await set_user_flags(connection, last.id, flags)
    assert caught.value.code == "CONFLICT"
    assert await find_user(store, last.email) == last
    await set_active(store, EMAIL, False)  # who is no admin goes


async def test_of_admins_that_remove_each_other_one_stays(store: Store) -> None:
    admins = [await create_user(store, f"admin{number}@example.com", is_admin=True) for number in range(3)]

    async def demote(user_id: str) -> None:
        async with store.writing() as connection:
            await set_user_flags(connection, user_id, {"is_admin": False})

    done = await asyncio.gather(*(demote(each.id) for each in admins), return_exceptions=True)
    assert [getattr(each, "code", None) for each in done if each is not None] == ["CONFLICT"]
    assert sum(user.is_admin for user in await list_users(store)) == 1
