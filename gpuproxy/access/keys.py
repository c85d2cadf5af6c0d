"""API keys as their owners manage them: no key makes, or takes the place of, one that may do more than itself."""

from datetime import UTC, datetime, timedelta

import msgspec
from sqlalchemy import and_, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import ADMIN_SCOPE, KEY_COLUMNS, SCOPES, Key, KeyTerms, add_key, key_from, revoke
from gpuproxy.access.callers import Caller
from gpuproxy.access.paging import Page, after
from gpuproxy.codec.tools import EVERY, covers
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.locks import lock_user
from gpuproxy.store.schema import api_keys, budgets
from gpuproxy.types import ALL_SCOPES

KEYS_MAX = 1_000  # live ones of one user
EXPIRED_AT_ONCE_MAX = 1_000


def terms_for(caller: Caller, wished: KeyTerms, has_scopes: bool) -> KeyTerms:
    """Return the terms of a key this caller makes: what is left out is as the caller's own.

    Raises GatewayError FORBIDDEN for what the caller may not do.
    """
    terms = msgspec.structs.replace(
        wished,
        scopes=wished.scopes if has_scopes else _own_scopes(caller),
        models=caller.models if wished.models is None else wished.models,
        expires_at=caller.expires_at if wished.expires_at is None else wished.expires_at,
        rpm=caller.rpm if wished.rpm is None else wished.rpm,
        rpm_ceiling=caller.rpm_ceiling if wished.rpm_ceiling is None else wished.rpm_ceiling,
        tpm=caller.tpm if wished.tpm is None else wished.tpm,
        streams=caller.streams if wished.streams is None else wished.streams,
        tools=caller.tools if wished.tools is None else wished.tools,
    )
    _check_within(caller, terms)
    return terms


async def issue_key(
    connection: AsyncConnection, caller: Caller, terms: KeyTerms, root_id: str | None = None
) -> tuple[str, Key]:
    """Add a key for the caller; see `add_key`. One made by a key with a budget shares that.

    Raises GatewayError CONFLICT for one too many.
    """
    await connection.run_sync(lock_user, caller.user_id)
    if await live_keys(connection, caller.user_id) >= KEYS_MAX:
        raise GatewayError("CONFLICT", f"there are {KEYS_MAX} keys already; revoke those that are not used")
    if root_id is None and await has_budget(connection, caller):
        root_id = caller.root_id
    return await add_key(connection, caller.user_id, terms, root_id)


async def live_keys(connection: AsyncConnection, user_id: str) -> int:
    """Return how many keys of a user are not revoked."""
    live = and_(api_keys.c.user_id == user_id, api_keys.c.revoked_at.is_(None))
    return (await connection.scalar(select(func.count()).select_from(api_keys).where(live))) or 0


async def has_budget(connection: AsyncConnection, caller: Caller) -> bool:
    """Tell whether the caller is a key with a budget of its own."""
    query = select(budgets.c.id).where(budgets.c.user_id == caller.user_id, budgets.c.key_id == caller.root_id)
    return bool(caller.key_id) and await connection.scalar(query.limit(1)) is not None


async def rotate_key(connection: AsyncConnection, caller: Caller, key_id: str, overlap_s: int) -> tuple[str, Key, Key]:
    """Make a key like this one, which ends after `overlap_s`; return the new secret, the new key, the old one.

    Raises GatewayError NOT_FOUND for a key that is not the caller's, CONFLICT for one that has ended, FORBIDDEN for one
    that may do more than the caller.
    """
    now = datetime.now(UTC)
    key = await _own(connection, caller, key_id)
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise GatewayError("CONFLICT", f"key {key_id} has ended; make a new one")
    limits = (key.rpm, key.rpm_ceiling, key.tpm, key.streams)
    terms = KeyTerms(key.name, key.scopes, key.models, key.expires_at, *limits, key.tools)
    if caller.key_id != key_id:  # the limits were given to the old one and go over to the new
        own = {"rpm": caller.rpm, "rpm_ceiling": None, "tpm": caller.tpm, "streams": caller.streams}
        _check_within(caller, msgspec.structs.replace(terms, **own))
    secret, fresh = await issue_key(connection, caller, terms, key.root_id or key.id)
    ends_at = now + timedelta(seconds=overlap_s)
    if key.expires_at is not None:
        ends_at = min(ends_at, key.expires_at)
    await connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(expires_at=ends_at))
    if overlap_s == 0:
        await revoke(connection, key_id)
    return secret, fresh, await _own(connection, caller, key_id)


async def revoke_own_key(connection: AsyncConnection, caller: Caller, key_id: str) -> Key:
    """Take a key of the caller's back for good; again changes nothing. Raises GatewayError NOT_FOUND."""
    if (await _own(connection, caller, key_id)).revoked_at is None:
        await revoke(connection, key_id)
    return await _own(connection, caller, key_id)


async def own_key(connection: AsyncConnection, caller: Caller, key_id: str) -> Key:
    """Return a key of the caller's. Raises GatewayError NOT_FOUND."""
    return await _own(connection, caller, key_id)


async def list_own_keys(store: Store, caller: Caller, page: Page) -> list[Key]:
    """Return the caller's keys, oldest first."""
    query = select(*KEY_COLUMNS).where(api_keys.c.user_id == caller.user_id)
    async with store.reading() as connection:
        return [key_from(row) for row in await connection.execute(after(query, api_keys, page))]


async def revoke_expired_keys(store: Store) -> int:
    """Revoke keys whose time has passed, so that workers hear of those whose end was moved; return how many."""
    now = datetime.now(UTC)
    is_due = and_(api_keys.c.revoked_at.is_(None), api_keys.c.expires_at <= now)
    query = select(api_keys.c.id).where(is_due).limit(EXPIRED_AT_ONCE_MAX)
    due = await store.look(query)
    if not due:
        return 0
    async with store.writing() as connection:
        return sum([await revoke(connection, row.id) for row in due])


async def _own(connection: AsyncConnection, caller: Caller, key_id: str) -> Key:
    query = select(*KEY_COLUMNS).where(api_keys.c.id == key_id, api_keys.c.user_id == caller.user_id)
    row = (await connection.execute(query.with_for_update())).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no key {key_id!r} in this account")
    return key_from(row)


def _own_scopes(caller: Caller) -> tuple[str, ...]:
    """Return what a key gets that nothing was said about: never admin, which has to be asked for."""
    return tuple(scope for scope in caller.scopes if scope != ADMIN_SCOPE) if caller.key_id else ALL_SCOPES


def _check_within(caller: Caller, terms: KeyTerms) -> None:
    for name, is_over in _excess(caller, terms).items():
        if is_over:
            message = f"{name}: a key may do no more than the credential it is made with"
            raise GatewayError("FORBIDDEN", message, param=name)


def _excess(caller: Caller, terms: KeyTerms) -> dict[str, bool]:
    return {
        "scopes": any(scope in SCOPES and not _may_give(caller, scope) for scope in terms.scopes),
        "models": caller.models is not None and not set(terms.models or ("",)) <= set(caller.models),
        "expires_days": caller.expires_at is not None
        and (terms.expires_at is None or terms.expires_at > caller.expires_at),
        "rpm": not caller.is_admin and terms.rpm != caller.rpm,  # each has a minute of its own: many are more than one
        "rpm_ceiling": not caller.is_admin and (terms.rpm_ceiling or 0) > (caller.rpm_ceiling or 0),
        "tpm": not caller.is_admin and terms.tpm != caller.tpm,
        "streams": not caller.is_admin and terms.streams != caller.streams,
        "tools": caller.tools is not None and not all(covers(caller.tools, rule) for rule in terms.tools or (EVERY,)),
    }


def _may_give(caller: Caller, scope: str) -> bool:
    if scope == ADMIN_SCOPE:
        return caller.is_admin and not caller.key_id  # a leaked key must not bear others of its power
    return scope in caller.scopes or (scope == "read" and "account" in caller.scopes)
