"""Users and their API keys: create, list, block, revoke.

Whatever takes a right away, or gives it back, is announced in the same transaction, see `changes`.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import Row, and_, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.changes import KEY_REVOKED, USER_BLOCKED, USER_UNBLOCKED, announce
from gpuproxy.access.paging import Page, after
from gpuproxy.codec.key import SHOWN_CHARACTERS, digest_of, generate
from gpuproxy.codec.tools import RULES_MAX, is_rule
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, users
from gpuproxy.types import ALL_SCOPES

ADMIN_SCOPE = "admin"
SCOPES = {  # of API keys; who logs in has all their account allows
    "inference": "call models and tools",
    "account": "read and manage the own account",
    "read": "read the own account",
    ADMIN_SCOPE: "manage all accounts; only for keys of admins",
}
RPM_MAX = 1_000_000_000
EMAIL_CHARACTERS_MAX = 254  # RFC 5321 §4.5.3.1.3
NAME_CHARACTERS_MAX = 100

_matches_email = re.compile(r"[^@\s\x00-\x1f]+@[^@\s\x00-\x1f]+").fullmatch


class User(Struct, frozen=True):
    """One account holder."""

    id: str
    email: str
    is_admin: bool
    is_active: bool
    created_at: datetime


class Key(Struct, frozen=True):
    """What may be shown of an API key; `prefix` is its first characters.

    `models` is None when all are allowed, `tools`, which are rules, when all are; `rpm` and `tpm`, requests and tokens
    per minute, when the user's hold, 0 for no limit, and so `streams`, how many may be open at once; `rpm_ceiling`, how
    far a call may raise `rpm`, when none may. `root_id` is the key whose budgets it shares, None for its own.
    """

    id: str
    user_id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime
    rpm: int | None = None
    rpm_ceiling: int | None = None
    tpm: int | None = None
    streams: int | None = None
    root_id: str | None = None
    tools: tuple[str, ...] | None = None


class KeyTerms(Struct, frozen=True):
    """What a key is to be; see `Key`."""

    name: str = ""
    scopes: tuple[str, ...] = ALL_SCOPES
    models: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    rpm: int | None = None
    rpm_ceiling: int | None = None
    tpm: int | None = None
    streams: int | None = None
    tools: tuple[str, ...] | None = None


KEY_COLUMNS = tuple(api_keys.c[field] for field in Key.__struct_fields__)


async def create_user(store: Store, email: str, is_admin: bool = False) -> User:
    """Add a user. Raises GatewayError UNPROCESSABLE for a malformed address, CONFLICT for a known one."""
    async with store.writing() as connection:
        return await add_user(connection, email, is_admin)


async def add_user(connection: AsyncConnection, email: str, is_admin: bool) -> User:
    """Do what `create_user` does, inside the caller's writing transaction; it must end if this raises."""
    user = User(str(uuid4()), _checked_email(email), is_admin, True, datetime.now(UTC))
    try:
        await connection.execute(insert(users).values(**_fields(user)))
    except IntegrityError:
        raise GatewayError("CONFLICT", f"user {user.email} exists already") from None
    return user


async def find_user(store: Store, email: str) -> User:
    """Return the user with this address. Raises GatewayError NOT_FOUND."""
    async with store.reading() as connection:
        return await _user(connection, email)


async def list_users(store: Store) -> list[User]:
    """Return all users, oldest first."""
    async with store.reading() as connection:
        rows = await connection.execute(select(users).order_by(users.c.created_at, users.c.id))
        return [User(**row._mapping) for row in rows]


async def page_of_users(store: Store, page: Page) -> list[User]:
    """Return some of all users, oldest first."""
    async with store.reading() as connection:
        return [User(**row._mapping) for row in await connection.execute(after(select(users), users, page))]


async def set_active(store: Store, email: str, is_active: bool) -> User:
    """Block a user (all keys stop within a second) or let them in again.

    Raises GatewayError NOT_FOUND, CONFLICT for the last active admin.
    """
    async with store.writing() as connection:
        user = await _user(connection, email)
        return await set_user_flags(connection, user.id, {"is_active": is_active})


async def set_user_flags(connection: AsyncConnection, user_id: str, flags: Mapping[str, bool]) -> User:
    """Set ``is_active``, ``is_admin`` or both, in the caller's writing transaction.

    Raises GatewayError NOT_FOUND, CONFLICT if no active admin would be left.
    """
    if False in flags.values():
        await _check_others_lead(connection, user_id)
    done = await connection.execute(update(users).where(users.c.id == user_id).values(**flags))
    if done.rowcount == 0:
        raise GatewayError("NOT_FOUND", f"no user {user_id!r}")
    if "is_active" in flags:
        await announce(connection, USER_UNBLOCKED if flags["is_active"] else USER_BLOCKED, user_id)
    return await user_by_id(connection, user_id)


async def _check_others_lead(connection: AsyncConnection, user_id: str) -> None:
    is_leading = and_(users.c.is_admin, users.c.is_active)
    # Two admins that take each other's rights away must not both succeed: the second looks when the first is done.
    admins = select(users.c.id).where(is_leading).order_by(users.c.id).with_for_update(key_share=True)
    if list(await connection.scalars(admins)) == [user_id]:
        raise GatewayError("CONFLICT", f"user {user_id!r} is the last active admin; make another one first")


async def user_by_id(connection: AsyncConnection, user_id: str) -> User:
    """Return the user. Raises GatewayError NOT_FOUND."""
    row = (await connection.execute(select(users).where(users.c.id == user_id))).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no user {user_id!r}")
    return User(**row._mapping)


async def create_key(
    store: Store,
    email: str,
    name: str = "",
    expires_at: datetime | None = None,
    models: Sequence[str] | None = None,
    scopes: Sequence[str] = ALL_SCOPES,
    rpm: int | None = None,
    rpm_ceiling: int | None = None,
    tpm: int | None = None,
    streams: int | None = None,
    tools: Sequence[str] | None = None,
) -> tuple[str, Key]:
    """Add an API key for the user; return it, the only time it can be seen, and what is kept of it.

    Raises GatewayError NOT_FOUND for an unknown user, UNPROCESSABLE for bad terms.
    """
    allowed = None if models is None else tuple(models)
    rules = None if tools is None else tuple(tools)
    terms = KeyTerms(name, tuple(scopes), allowed, expires_at, rpm, rpm_ceiling, tpm, streams, rules)
    async with store.writing() as connection:
        user = await _user(connection, email)
        return await add_key(connection, user.id, terms)


async def add_key(
    connection: AsyncConnection, user_id: str, terms: KeyTerms, root_id: str | None = None
) -> tuple[str, Key]:
    """Do what `create_key` does, inside the caller's writing transaction. Raises GatewayError UNPROCESSABLE."""
    now = datetime.now(UTC)
    _check_terms(terms, now)
    secret = generate()
    made: dict[str, Any] = {"prefix": secret[:SHOWN_CHARACTERS], "revoked_at": None, "created_at": now}
    key = Key(str(uuid4()), user_id, root_id=root_id, **_fields(terms), **made)
    await connection.execute(insert(api_keys).values(**_fields(key), digest=digest_of(secret.encode())))
    return secret, key


async def list_keys(store: Store, email: str | None = None) -> list[Key]:
    """Return the keys of one user, or all, oldest first. Raises GatewayError NOT_FOUND."""
    async with store.reading() as connection:
        query = select(*KEY_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id)
        if email is not None:
            query = query.where(api_keys.c.user_id == (await _user(connection, email)).id)
        return [key_from(row) for row in await connection.execute(query)]


async def revoke_key(store: Store, key_id: str) -> bool:
    """Take a key back for good. Return False if it was revoked before. Raises GatewayError NOT_FOUND."""
    async with store.writing() as connection:
        is_done = await revoke(connection, key_id)
        if not is_done:
            await _check_key(connection, key_id)
        return is_done


async def revoke(connection: AsyncConnection, key_id: str) -> bool:
    """Do what `revoke_key` does, inside the caller's writing transaction; False for an unknown key too."""
    live = and_(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    done = await connection.execute(update(api_keys).where(live).values(revoked_at=datetime.now(UTC)))
    if done.rowcount:
        await announce(connection, KEY_REVOKED, key_id)
    return bool(done.rowcount)


async def _user(connection: AsyncConnection, email: str) -> User:
    row = (await connection.execute(select(users).where(users.c.email == email.lower()))).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no user {email}; create one with: gpuproxy user create {email}")
    return User(**row._mapping)


async def _check_key(connection: AsyncConnection, key_id: str) -> None:
    if await connection.scalar(select(api_keys.c.id).where(api_keys.c.id == key_id)) is None:
        raise GatewayError("NOT_FOUND", f"no key {key_id!r}; list them with: gpuproxy key list")


def _checked_email(email: str) -> str:
    if len(email) > EMAIL_CHARACTERS_MAX or _matches_email(email) is None:
        raise GatewayError("UNPROCESSABLE", f"{email[:300]!r} is not an e-mail address; write name@host", param="email")
    return email.lower()


def _check_terms(terms: KeyTerms, now: datetime) -> None:
    unknown = [scope for scope in terms.scopes if scope not in SCOPES]
    if len(terms.name) > NAME_CHARACTERS_MAX or not terms.name.isprintable():
        raise _bad_term("name", f"a key's name is up to {NAME_CHARACTERS_MAX} printable characters")
    if unknown or not terms.scopes:
        raise _bad_term("scopes", f"no scope {unknown[0]!r}" if unknown else "the list of scopes is empty")
    if terms.models is not None and not all(terms.models):
        raise _bad_term("models", "the list of models has an empty name")
    if terms.tools is not None:
        _check_rules(terms.tools)
    if terms.expires_at is not None and terms.expires_at <= now:
        raise _bad_term("expires_at", f"the key would expire in the past, {terms.expires_at}")
    for name in ("rpm", "rpm_ceiling", "tpm", "streams"):
        limit = getattr(terms, name)
        if limit is not None and not 0 <= limit <= RPM_MAX:
            raise _bad_term(name, f"{name}={limit} is out of range; 0 (no limit) to {RPM_MAX}")


def _check_rules(rules: Sequence[str]) -> None:
    wrong = [rule for rule in rules if not is_rule(rule)]
    if wrong:
        raise _bad_term("tools", f"{wrong[0][:60]!r} is no rule; write server/tool, with * for any text in either half")
    if not 0 < len(rules) <= RULES_MAX:
        raise _bad_term("tools", f"a key has 1 to {RULES_MAX} rules of tools; there are {len(rules)}")


def _bad_term(param: str, message: str) -> GatewayError:
    remedy = f"; known: {', '.join(SCOPES)}" if param == "scopes" else ""
    return GatewayError("UNPROCESSABLE", message + remedy, param=param)


def _fields(record: Struct) -> dict[str, Any]:
    return {field: getattr(record, field) for field in record.__struct_fields__}


def key_from(row: Row[Any]) -> Key:
    """Return the key of a row of KEY_COLUMNS."""
    fields = dict(row._mapping)
    fields["scopes"] = tuple(fields["scopes"])
    for name in ("models", "tools"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Key(**fields)
