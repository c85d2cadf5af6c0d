"""Logging in, and sessions: who has the password, and which tokens still count."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from argon2 import PasswordHasher
from postgres import who_waits
from sqlalchemy import func, select, text, update

from gpuproxy.access import logins
from gpuproxy.access.accounts import create_user, set_active
from gpuproxy.access.callers import caller_by_token
from gpuproxy.access.logins import Login, change_password, log_in, register, set_password
from gpuproxy.access.passwords import Hasher
from gpuproxy.access.sessions import continue_session, end_session
from gpuproxy.access.tokens import claims_for
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import passwords, refresh_tokens, sessions

EMAIL, PASSWORD, OTHER = "ann@example.com", "correct horse battery", "another horse battery"
LIFE_S = 3_600.0


@pytest.fixture
def hasher() -> Iterator[Hasher]:
    opened = Hasher()
    yield opened
    opened.close()


@pytest.fixture
async def login(store: Store, hasher: Hasher) -> Login:
    return await register(store, hasher, EMAIL, PASSWORD, LIFE_S)


async def code_of(work: object) -> str:
    """Return the code of the error the awaitable ends with, or ""."""
    try:
        await work  # type: ignore[misc]
    except GatewayError as error:
        return error.code
    return ""


async def lives(store: Store, login: Login) -> bool:
    return await caller_by_token(store, claims_for(login.user.id, login.session.id, 60)) is not None


async def test_who_registers_is_logged_in(store: Store, hasher: Hasher, login: Login) -> None:
    caller = await caller_by_token(store, claims_for(login.user.id, login.session.id, 60))
    assert caller is not None
    assert (caller.email, caller.is_admin, caller.key_id) == (EMAIL, False, "")
    again = await log_in(store, hasher, "Ann@Example.com", PASSWORD, LIFE_S)
    assert again.user == login.user
    assert again.session.id != login.session.id


async def test_an_address_registers_once(store: Store, hasher: Hasher, login: Login) -> None:
    assert await code_of(register(store, hasher, EMAIL.upper(), OTHER, LIFE_S)) == "CONFLICT"
    assert await code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)) == ""


async def test_neither_a_wrong_password_nor_a_wrong_address_logs_in(store: Store, hasher: Hasher, login: Login) -> None:
    told = set()
    for email, password in ((EMAIL, OTHER), ("bob@example.com", PASSWORD), ("", ""), ("x" * 999, "y" * 999)):
        with pytest.raises(GatewayError) as caught:
            await log_in(store, hasher, email, password, LIFE_S)
        told.add((caught.value.code, caught.value.message))
    assert told == {("UNAUTHORIZED", "the e-mail address or the password is wrong")}


async def test_a_user_without_password_cannot_log_in_until_the_operator_sets_one(store: Store, hasher: Hasher) -> None:
    await create_user(store, EMAIL)
    assert await code_of(log_in(store, hasher, EMAIL, "", LIFE_S)) == "UNAUTHORIZED"
    await set_password(store, EMAIL, PASSWORD)
    assert await code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)) == ""


async def test_only_who_knows_the_password_learns_of_the_block(store: Store, hasher: Hasher, login: Login) -> None:
    await set_active(store, EMAIL, False)
    assert await code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)) == "FORBIDDEN"
    assert await code_of(log_in(store, hasher, EMAIL, OTHER, LIFE_S)) == "UNAUTHORIZED"
    assert await code_of(continue_session(store, login.session.refresh_token, LIFE_S)) == "UNAUTHORIZED"
    assert not await lives(store, login)


async def test_a_new_password_ends_every_session(store: Store, hasher: Hasher, login: Login) -> None:
    changed = await change_password(store, hasher, EMAIL, PASSWORD, OTHER, LIFE_S)
    assert not await lives(store, login)
    assert await lives(store, changed)
    assert await code_of(continue_session(store, login.session.refresh_token, LIFE_S)) == "UNAUTHORIZED"
    assert await code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)) == "UNAUTHORIZED"
    assert await code_of(log_in(store, hasher, EMAIL, OTHER, LIFE_S)) == ""
    assert await code_of(change_password(store, hasher, EMAIL, PASSWORD, OTHER, LIFE_S)) == "UNAUTHORIZED"


async def test_a_log_in_that_a_password_change_overtakes_fails(store: Store, hasher: Hasher, login: Login) -> None:
    async with store.writing() as connection:
        await connection.execute(update(passwords).values(hash="changed"))
        logging_in = asyncio.create_task(code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)))
        await asyncio.sleep(0.1)  # the old password is checked meanwhile
    assert await logging_in == "UNAUTHORIZED"


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_of_two_that_set_a_password_at_once_the_later_wins(store: Store, hasher: Hasher, login: Login) -> None:
    async with store.writing() as connection:
        await logins._put(connection, login.user.id, "another's")
        later = asyncio.create_task(set_password(store, EMAIL, OTHER))
        await who_waits(store)
    await later
    assert await code_of(log_in(store, hasher, EMAIL, OTHER, LIFE_S)) == ""


async def test_a_weak_hash_is_replaced_at_the_next_log_in(store: Store, hasher: Hasher, login: Login) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=8_192, parallelism=1).hash(PASSWORD)
    async with store.writing() as connection:
        await connection.execute(update(passwords).values(hash=weak))
    for _ in range(2):
        await log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)
        async with store.reading() as connection:
            stored = await connection.scalar(select(passwords.c.hash))
        assert not hasher.is_outdated(stored)


async def test_a_weak_hash_keeps_none_out_of_many_who_log_in_at_once(
    store: Store, hasher: Hasher, login: Login
) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=8_192, parallelism=1).hash(PASSWORD)
    async with store.writing() as connection:
        await connection.execute(update(passwords).values(hash=weak))
    codes = await asyncio.gather(*(code_of(log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)) for _ in range(4)))
    assert codes == [""] * 4


async def test_a_refresh_token_is_good_once_and_its_second_use_ends_the_session(store: Store, login: Login) -> None:
    first = login.session.refresh_token
    second = (await continue_session(store, first, LIFE_S)).refresh_token
    third = (await continue_session(store, second, LIFE_S)).refresh_token
    assert await lives(store, login)
    assert await code_of(continue_session(store, first, LIFE_S)) == "UNAUTHORIZED"
    assert await code_of(continue_session(store, third, LIFE_S)) == "UNAUTHORIZED"
    assert not await lives(store, login)


async def test_of_racing_uses_of_a_refresh_token_at_most_one_wins(store: Store, login: Login) -> None:
    token = login.session.refresh_token
    told = await asyncio.gather(*(code_of(continue_session(store, token, LIFE_S)) for _ in range(6)))
    assert sorted(told) == ["", *["UNAUTHORIZED"] * 5]
    assert not await lives(store, login)


@pytest.mark.parametrize("token", ["", "gpr_x", "ey.ey.ey", "gpr_" + "A" * 43])
async def test_an_unknown_refresh_token_ends_nothing(store: Store, login: Login, token: str) -> None:
    assert await code_of(continue_session(store, token, LIFE_S)) == "UNAUTHORIZED"
    assert await lives(store, login)


async def test_an_ended_session_is_not_continued(store: Store, login: Login) -> None:
    async with store.writing() as connection:
        await end_session(connection, login.session.id)
    assert not await lives(store, login)
    assert await code_of(continue_session(store, login.session.refresh_token, LIFE_S)) == "UNAUTHORIZED"


async def test_a_refresh_token_expires_and_is_forgotten(store: Store, hasher: Hasher, login: Login) -> None:
    async with store.writing() as connection:
        past = datetime.now(UTC) - timedelta(seconds=1)
        await connection.execute(update(refresh_tokens).values(expires_at=past))
        await connection.execute(update(sessions).values(expires_at=past))
    assert await code_of(continue_session(store, login.session.refresh_token, LIFE_S)) == "UNAUTHORIZED"
    await log_in(store, hasher, EMAIL, PASSWORD, LIFE_S)
    async with store.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(sessions)) == 1
        assert await connection.scalar(select(func.count()).select_from(refresh_tokens)) == 1


async def test_a_token_is_of_the_user_its_session_is_of(store: Store, login: Login) -> None:
    other = await create_user(store, "bob@example.com")
    assert await caller_by_token(store, claims_for(other.id, login.session.id, 60)) is None


async def test_neither_password_nor_token_is_kept(store: Store, login: Login) -> None:
    async with store.reading() as connection:
        for table in ("passwords", "sessions", "refresh_tokens"):
            rows = repr((await connection.execute(text(f"SELECT * FROM {table}"))).all())
            assert PASSWORD not in rows
            assert login.session.refresh_token[4:] not in rows
