"""The change feed: every right that is taken away or given back, once, by what holds now."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from gpuproxy.access.accounts import create_key, create_user, revoke_key, set_active
from gpuproxy.access.changes import (
    CHANGES_AT_ONCE,
    ChangedKeys,
    announce,
    forget_changes,
    revoked_keys_since,
    unread_changes,
)
from gpuproxy.access.grants import grant_for
from gpuproxy.codec.key import digest_of
from gpuproxy.errors import GatewayError
from gpuproxy.store.cursor import Cursor
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import changes

EMAIL = "ann@example.com"


@pytest.fixture
async def user_id(store: Store) -> str:
    return (await create_user(store, EMAIL)).id


async def changed_after(store: Store, seq: int) -> ChangedKeys:
    return (await unread_changes(store, Cursor(seq)))[1]


async def test_a_revoked_key_has_no_grant_and_is_announced(store: Store, user_id: str) -> None:
    secret, key = await create_key(store, EMAIL)
    assert await revoke_key(store, key.id) is True
    assert await grant_for(store, digest_of(secret.encode())) is None
    assert await changed_after(store, 0) == ChangedKeys((key.id,))


async def test_a_blocked_user_loses_all_keys_until_let_in_again(store: Store, user_id: str) -> None:
    made = [await create_key(store, EMAIL) for _ in range(2)]
    digests = [digest_of(secret.encode()) for secret, _ in made]
    await set_active(store, EMAIL, False)
    assert [await grant_for(store, digest) for digest in digests] == [None, None]
    key_ids = tuple(key.id for _, key in made)
    assert await changed_after(store, 0) == ChangedKeys(key_ids)
    await set_active(store, EMAIL, True)
    assert await changed_after(store, 1) == ChangedKeys((), key_ids)
    assert None not in [await grant_for(store, digest) for digest in digests]


async def test_the_feed_is_read_from_where_it_was_left(store: Store, user_id: str) -> None:
    keys = [(await create_key(store, EMAIL))[1].id for _ in range(3)]
    await revoke_key(store, keys[0])
    first = await changed_after(store, 0)
    await revoke_key(store, keys[1])
    assert first == ChangedKeys((keys[0],))
    assert await changed_after(store, 1) == ChangedKeys((keys[1],))
    assert await changed_after(store, 2) == ChangedKeys()


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
    assert await changed_after(store, 0) == ChangedKeys((revoked,), (kept,))
    assert await revoked_keys_since(store, datetime.now(UTC) - timedelta(seconds=60)) == (revoked,)


async def test_a_failed_change_is_not_announced(store: Store) -> None:
    with pytest.raises(GatewayError):
        await set_active(store, "nobody@example.com", False)
    async with store.reading() as connection:
        assert (await connection.execute(select(changes))).all() == []


async def test_old_changes_are_forgotten_and_newer_ones_stay_and_are_read(store: Store, user_id: str) -> None:
    keys = [(await create_key(store, EMAIL))[1].id for _ in range(3)]
    await revoke_key(store, keys[0])
    await revoke_key(store, keys[1])
    now = datetime.now(UTC)
    async with store.writing() as connection:
        await connection.execute(update(changes).where(changes.c.seq == 1).values(at=now - timedelta(days=8)))
    assert [await forget_changes(store, now - timedelta(days=7)) for _ in range(2)] == [1, 0]
    assert await changed_after(store, 0) == ChangedKeys((keys[1],))
    assert await forget_changes(store, now + timedelta(days=1)) == 1
    await revoke_key(store, keys[2])
    assert await changed_after(store, 2) == ChangedKeys((keys[2],)), "numbers are not given again"


async def test_changes_are_forgotten_a_bounded_number_at_a_time(store: Store) -> None:
    async with store.writing() as connection:
        for _ in range(CHANGES_AT_ONCE + 1):
            await announce(connection, "key_revoked", "k")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert [await forget_changes(store, tomorrow) for _ in range(3)] == [CHANGES_AT_ONCE, 1, 0]
