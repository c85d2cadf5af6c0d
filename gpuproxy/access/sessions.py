"""Sessions: one log-in and the tokens that came from it.

A refresh token is 256 random bits, kept as their digest, good once. Who shows a used one has stolen it, or somebody
else has: the session ends (RFC 9700 §4.14.2). Access tokens end with their session.
"""

import secrets
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import ColumnElement, and_, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import passwords, refresh_tokens, sessions, users

PREFIX = "gpr_"
TOKEN_BYTES = 32


class Session(Struct, frozen=True):
    """A session that lives, and the refresh token that carries it on."""

    id: str
    user_id: str
    refresh_token: str


async def start_session(connection: AsyncConnection, user_id: str, password_hash: str, lifetime_s: float) -> Session:
    """Begin a session of the user, in the caller's writing transaction.

    Raises GatewayError UNAUTHORIZED if the password is no longer the one that was checked.
    """
    now = datetime.now(UTC)
    await _forget_expired(connection, now)
    query = select(passwords.c.hash).where(passwords.c.user_id == user_id).with_for_update()
    if await connection.scalar(query) != password_hash:
        raise GatewayError("UNAUTHORIZED", "the password has just been changed; log in with the new one")
    session_id, expires_at = str(uuid4()), now + timedelta(seconds=lifetime_s)
    row = {"id": session_id, "user_id": user_id, "created_at": now, "expires_at": expires_at}
    await connection.execute(insert(sessions).values(**row))
    return Session(session_id, user_id, await _new_token(connection, session_id, expires_at))


async def continue_session(store: Store, refresh_token: str, lifetime_s: float) -> Session:
    """Take a refresh token for a new one. A used one ends its session.

    Raises GatewayError UNAUTHORIZED for a token that is unknown, used or expired, or whose session or user is.
    """
    async with store.writing() as connection:
        session = await _continued(connection, _digest_of(refresh_token), datetime.now(UTC), lifetime_s)
    if session is None:
        raise GatewayError("UNAUTHORIZED", "the refresh token is unknown, expired or used; log in again")
    return session


async def prolong_session(store: Store, session_id: str, lifetime_s: float) -> None:
    """Let a session that lives go on for so long from now."""
    is_live = and_(sessions.c.id == session_id, sessions.c.revoked_at.is_(None))
    expires_at = datetime.now(UTC) + timedelta(seconds=lifetime_s)
    async with store.writing() as connection:
        await connection.execute(update(sessions).where(is_live).values(expires_at=expires_at))


async def end_session(connection: AsyncConnection, session_id: str) -> None:
    """Make every token of the session worthless."""
    await _end(connection, sessions.c.id == session_id)


async def end_sessions_of(connection: AsyncConnection, user_id: str) -> None:
    """Make every token of the user worthless."""
    await _end(connection, sessions.c.user_id == user_id)


async def _continued(connection: AsyncConnection, digest: bytes, now: datetime, lifetime_s: float) -> Session | None:
    """Return the session of a live token; None otherwise, and end the session if the token was used before."""
    joined = refresh_tokens.join(sessions, sessions.c.id == refresh_tokens.c.session_id)
    is_live = and_(sessions.c.revoked_at.is_(None), refresh_tokens.c.expires_at > now, users.c.is_active)
    query = (
        select(sessions.c.id, sessions.c.user_id)
        .select_from(joined.join(users, users.c.id == sessions.c.user_id))
        .where(refresh_tokens.c.digest == digest, is_live)
    )
    row = (await connection.execute(query)).first()
    if row is None:
        return None
    unused = and_(refresh_tokens.c.digest == digest, refresh_tokens.c.used_at.is_(None))
    if (await connection.execute(update(refresh_tokens).where(unused).values(used_at=now))).rowcount == 0:
        await end_session(connection, row.id)
        return None
    expires_at = now + timedelta(seconds=lifetime_s)
    await connection.execute(update(sessions).where(sessions.c.id == row.id).values(expires_at=expires_at))
    return Session(row.id, row.user_id, await _new_token(connection, row.id, expires_at))


async def _new_token(connection: AsyncConnection, session_id: str, expires_at: datetime) -> str:
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    row = {"digest": _digest_of(token), "session_id": session_id, "expires_at": expires_at}
    await connection.execute(insert(refresh_tokens).values(**row))
    return token


async def _end(connection: AsyncConnection, chosen: ColumnElement[bool]) -> None:
    live = and_(chosen, sessions.c.revoked_at.is_(None))
    await connection.execute(update(sessions).where(live).values(revoked_at=datetime.now(UTC)))


async def _forget_expired(connection: AsyncConnection, now: datetime) -> None:
    """Delete what can be used no more; done when a session begins, so the tables do not grow for ever."""
    of_expired = select(sessions.c.id).where(sessions.c.expires_at <= now)
    gone = or_(refresh_tokens.c.expires_at <= now, refresh_tokens.c.session_id.in_(of_expired))
    await connection.execute(delete(refresh_tokens).where(gone))
    await connection.execute(delete(sessions).where(sessions.c.expires_at <= now))


def _digest_of(token: str) -> bytes:
    return sha256(token.encode()).digest()
