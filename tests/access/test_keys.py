"""Keys as their owners manage them: never more rights than the credential they come from."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sqlalchemy import text, update

from gpuproxy.access import keys
from gpuproxy.access.accounts import SCOPES, Key, KeyTerms, create_key, create_user
from gpuproxy.access.callers import Caller, caller_by_key
from gpuproxy.access.changes import newest_change, unread_changes
from gpuproxy.access.grants import grant_for
from gpuproxy.access.keys import (
    issue_key,
    list_own_keys,
    revoke_expired_keys,
    revoke_own_key,
    rotate_key,
    terms_for,
)
from gpuproxy.access.paging import Page
from gpuproxy.codec.key import digest_of
from gpuproxy.errors import GatewayError
from gpuproxy.store.cursor import Cursor
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys
from gpuproxy.types import ALL_SCOPES

EMAIL = "ann@example.com"
SOON = datetime(2090, 1, 1, tzinfo=UTC)
LATER = SOON + timedelta(days=1)
OWNER = Caller("u1", EMAIL, ALL_SCOPES, session_id="s")
ADMIN = Caller("u1", EMAIL, (*ALL_SCOPES, "admin"), session_id="s")
KEY = Caller("u1", EMAIL, ALL_SCOPES, "k", "", ("m1", "m2"), SOON, 50)
PLAIN_KEY = Caller("u1", EMAIL, ALL_SCOPES, "k")
ADMIN_KEY = Caller("u1", EMAIL, (*ALL_SCOPES, "admin"), "k")
ALLOWED = [
    (OWNER, KeyTerms(scopes=("read",), models=("m",), expires_at=SOON)),
    (OWNER, KeyTerms(scopes=("inference", "account"))),
    (ADMIN, KeyTerms(scopes=("admin",), rpm=0)),
    (KEY, KeyTerms(scopes=("inference", "read"), models=("m2",), expires_at=SOON, rpm=50)),
    (PLAIN_KEY, KeyTerms()),
    (ADMIN_KEY, KeyTerms(rpm=0, rpm_ceiling=5, tpm=0)),
]
REFUSED = {
    "scopes": [(OWNER, KeyTerms(scopes=("admin",))), (ADMIN_KEY, KeyTerms(scopes=("admin",)))],
    "models": [(KEY, KeyTerms(models=("m1", "m3")))],
    "expires_days": [(KEY, KeyTerms(expires_at=LATER))],
    "rpm_ceiling": [(OWNER, KeyTerms(rpm_ceiling=1))],
    "tpm": [(OWNER, KeyTerms(tpm=1)), (OWNER, KeyTerms(tpm=0))],
    "rpm": [(OWNER, KeyTerms(rpm=1)), (OWNER, KeyTerms(rpm=0)), (KEY, KeyTerms(rpm=49)), (PLAIN_KEY, KeyTerms(rpm=1))],
}


@pytest.mark.parametrize(("caller", "wished"), ALLOWED)
def test_a_key_may_do_what_its_maker_may(caller: Caller, wished: KeyTerms) -> None:
    assert terms_for(caller, wished, True).scopes == wished.scopes


@pytest.mark.parametrize(("param", "case"), [(param, case) for param, cases in REFUSED.items() for case in cases])
def test_a_key_may_do_no_more_than_its_maker(param: str, case: tuple[Caller, KeyTerms]) -> None:
    with pytest.raises(GatewayError) as caught:
        terms_for(*case, True)
    assert (caught.value.code, caught.value.param) == ("FORBIDDEN", param)


def test_what_is_left_out_is_as_the_makers_own() -> None:
    assert terms_for(KEY, KeyTerms(), False) == KeyTerms("", ALL_SCOPES, ("m1", "m2"), SOON, 50)
    assert terms_for(ADMIN, KeyTerms(), False).scopes == ALL_SCOPES
    assert terms_for(ADMIN_KEY, KeyTerms(), False).scopes == ALL_SCOPES


scopes = some.lists(some.sampled_from(sorted(SCOPES)), min_size=1, unique=True).map(tuple)
models = some.none() | some.lists(some.sampled_from("abc"), min_size=1).map(tuple)
ends = some.none() | some.sampled_from([SOON, LATER])
limits = some.none() | some.integers(0, 300)


@given(scopes, models, ends, limits, scopes, models, ends, limits)
def test_no_wish_makes_a_key_stronger(
    own: tuple[str, ...],
    own_models: tuple[str, ...] | None,
    own_end: datetime | None,
    own_rpm: int | None,
    wished: tuple[str, ...],
    wished_models: tuple[str, ...] | None,
    wished_end: datetime | None,
    wished_rpm: int | None,
) -> None:
    caller = Caller("u", EMAIL, own, "k", "", own_models, own_end, own_rpm)
    try:
        terms = terms_for(caller, KeyTerms("", wished, wished_models, wished_end, wished_rpm), True)
    except GatewayError:
        return
    assert "admin" not in terms.scopes
    assert set(terms.scopes) - {"read"} <= set(own)
    assert own_models is None or set(terms.models or ("not bounded",)) <= set(own_models)
    assert own_end is None or (terms.expires_at is not None and terms.expires_at <= own_end)
    assert "admin" in own or terms.rpm == own_rpm


async def owner(store: Store, email: str = EMAIL) -> Caller:
    return Caller((await create_user(store, email)).id, email, ALL_SCOPES, session_id="s")


async def made(store: Store, caller: Caller, terms: KeyTerms) -> tuple[str, Key]:
    async with store.writing() as connection:
        return await issue_key(connection, caller, terms)


async def is_good(store: Store, secret: str) -> bool:
    return await grant_for(store, digest_of(secret.encode())) is not None


async def test_a_rotated_key_lives_on_beside_the_new_for_a_while(store: Store) -> None:
    caller = await owner(store)
    terms = KeyTerms("laptop", ("inference",), ("m",), None)
    old_secret, old = await made(store, caller, terms)
    async with store.writing() as connection:
        secret, fresh, ending = await rotate_key(connection, caller, old.id, 60)
    assert (fresh.name, fresh.scopes, fresh.models, fresh.expires_at, fresh.rpm) == (
        "laptop",
        ("inference",),
        ("m",),
        None,
        None,
    )
    assert ending.expires_at is not None
    assert timedelta(seconds=50) < ending.expires_at - datetime.now(UTC) <= timedelta(seconds=60)
    assert [await is_good(store, each) for each in (old_secret, secret)] == [True, True]


async def test_the_old_key_ends_on_every_worker_when_its_time_is_up(store: Store) -> None:
    caller = await owner(store)
    old_secret, old = await made(store, caller, KeyTerms())
    async with store.writing() as connection:
        await rotate_key(connection, caller, old.id, 60)
    assert await revoke_expired_keys(store) == 0
    async with store.writing() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.id == old.id).values(expires_at=datetime.now(UTC)))
    assert [await revoke_expired_keys(store) for _ in range(2)] == [1, 0]
    assert (await unread_changes(store, Cursor(0)))[1].lost == (old.id,)
    assert not await is_good(store, old_secret)


async def test_a_rotation_without_overlap_ends_the_old_key_at_once(store: Store) -> None:
    caller = await owner(store)
    old_secret, old = await made(store, caller, KeyTerms())
    async with store.writing() as connection:
        await rotate_key(connection, caller, old.id, 0)
    assert not await is_good(store, old_secret)
    assert await newest_change(store) == 1


async def test_a_rotation_prolongs_nothing(store: Store) -> None:
    caller = await owner(store)
    soon = datetime.now(UTC) + timedelta(seconds=30)
    _, old = await made(store, caller, KeyTerms(expires_at=soon))
    async with store.writing() as connection:
        _, fresh, ending = await rotate_key(connection, caller, old.id, 3_600)
    assert fresh.expires_at == ending.expires_at == soon


async def test_no_key_rotates_a_stronger_one_but_itself(store: Store) -> None:
    caller = await owner(store)
    _, strong = await made(store, caller, KeyTerms())
    weak_secret, weak = await made(store, caller, KeyTerms(models=("m",)))
    by_weak = await caller_by_key(store, digest_of(weak_secret.encode()))
    assert by_weak is not None
    with pytest.raises(GatewayError) as caught:
        async with store.writing() as connection:
            await rotate_key(connection, by_weak, strong.id, 60)
    assert caught.value.code == "FORBIDDEN"
    async with store.writing() as connection:
        await rotate_key(connection, by_weak, weak.id, 60)


async def test_a_key_that_has_ended_is_not_rotated(store: Store) -> None:
    caller = await owner(store)
    _, key = await made(store, caller, KeyTerms())
    async with store.writing() as connection:
        await revoke_own_key(connection, caller, key.id)
    with pytest.raises(GatewayError, match="has ended") as caught:
        async with store.writing() as connection:
            await rotate_key(connection, caller, key.id, 60)
    assert caught.value.code == "CONFLICT"


async def test_revoking_twice_is_as_revoking_once(store: Store) -> None:
    caller = await owner(store)
    secret, key = await made(store, caller, KeyTerms())
    ended = []
    for _ in range(2):
        async with store.writing() as connection:
            ended.append(await revoke_own_key(connection, caller, key.id))
    assert ended[0] == ended[1]
    assert await newest_change(store) == 1
    assert not await is_good(store, secret)


async def test_a_strangers_key_is_as_one_that_is_not_there(store: Store) -> None:
    caller, stranger = await owner(store), await owner(store, "bob@example.com")
    _, key = await made(store, caller, KeyTerms())
    told = set()
    for key_id in (key.id, "nix"):
        for work in (revoke_own_key, lambda *given: rotate_key(*given, 60)):
            with pytest.raises(GatewayError) as caught:
                async with store.writing() as connection:
                    await work(connection, stranger, key_id)
            told.add((caught.value.code, caught.value.message.replace(key_id, "ID")))
    assert told == {("NOT_FOUND", "no key 'ID' in this account")}


async def test_the_list_is_read_page_by_page(store: Store) -> None:
    caller = await owner(store)
    await create_key(store, (await _other(store)).email)
    ids = [(await made(store, caller, KeyTerms(str(number))))[1].id for number in range(5)]
    seen: list[str] = []
    while page := await list_own_keys(store, caller, Page(2, seen[-1] if seen else "")):
        assert len(page) <= 2
        seen += [key.id for key in page]
    assert seen == ids


async def _other(store: Store) -> Caller:
    return await owner(store, "bob@example.com")


async def test_an_account_has_a_bounded_number_of_keys(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEYS_MAX", 2)
    caller = await owner(store)
    for _ in range(2):
        _, key = await made(store, caller, KeyTerms())
    with pytest.raises(GatewayError) as caught:
        await made(store, caller, KeyTerms())
    assert caught.value.code == "CONFLICT"
    async with store.writing() as connection:
        await revoke_own_key(connection, caller, key.id)
    await made(store, caller, KeyTerms())


async def test_the_right_of_an_admins_key_ends_with_the_admins(store: Store) -> None:
    await create_user(store, EMAIL, is_admin=True)
    secret, _ = await create_key(store, EMAIL, scopes=("admin",))
    digest = digest_of(secret.encode())
    caller = await caller_by_key(store, digest)
    assert caller is not None
    assert caller.is_admin
    async with store.writing() as connection:
        await connection.execute(text("UPDATE users SET is_admin = false"))
    caller = await caller_by_key(store, digest)
    assert caller is not None
    assert caller.scopes == ()


async def test_expired_keys_are_found_by_index(store: Store) -> None:
    if not store.is_sqlite:
        pytest.skip("PostgreSQL plans by the size of tables, and these are empty")
    async with store.reading() as connection:
        plan = await connection.execute(
            text("EXPLAIN QUERY PLAN SELECT id FROM api_keys WHERE revoked_at IS NULL AND expires_at <= '2024'")
        )
        steps = [row[3] for row in plan]
    assert [step for step in steps if "ix_api_keys_expires_at" in step]
