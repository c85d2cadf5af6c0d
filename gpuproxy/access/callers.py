"""Who calls the management API, and what they may do: by API key, or by the access token of a session."""

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime

from msgspec import Struct
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import ADMIN_SCOPE
from gpuproxy.access.tokens import LEEWAY_S, Claims
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import api_keys, sessions, users
from gpuproxy.types import ALL_SCOPES

IDS_MAX = 500  # in one statement


class Caller(Struct, frozen=True):
    """Who calls. `key_id` or `session_id` is set, by the kind of the credential.

    `models`, `tools`, `expires_at` and the limits are the bounds of a key; None where there is none. Its budgets are
    those of the key `root_id`. `token_until_s` is when a token is good no more, in unix seconds; 0 for a key.
    """

    user_id: str
    email: str
    scopes: tuple[str, ...]
    key_id: str = ""
    session_id: str = ""
    models: tuple[str, ...] | None = None
    expires_at: datetime | None = None
    rpm: int | None = None
    rpm_ceiling: int | None = None
    tpm: int | None = None
    streams: int | None = None
    root_id: str = ""
    tools: tuple[str, ...] | None = None
    token_until_s: int = 0

    @property
    def is_admin(self) -> bool:
        """Tell whether this credential may do what only admins may."""
        return ADMIN_SCOPE in self.scopes


async def caller_by_key(store: Store, digest: bytes) -> Caller | None:
    """Return who holds the key with this digest; None if it is unknown, expired or revoked, or its user blocked."""
    shown = (api_keys, users.c.email, users.c.is_admin)
    query = (
        select(*shown)
        .select_from(api_keys.join(users, users.c.id == api_keys.c.user_id))
        .where(api_keys.c.digest == digest, api_keys.c.revoked_at.is_(None), users.c.is_active)
    )
    async with store.reading() as connection:
        row = (await connection.execute(query)).first()
    if row is None or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
        return None
    scopes = tuple(scope for scope in row.scopes if scope != ADMIN_SCOPE or row.is_admin)
    models = None if row.models is None else tuple(row.models)
    limits = (row.rpm, row.rpm_ceiling, row.tpm, row.streams)
    tools = None if row.tools is None else tuple(row.tools)
    bounds = (models, row.expires_at, *limits)
    return Caller(row.user_id, row.email, scopes, row.id, "", *bounds, row.root_id or row.id, tools)


async def caller_by_token(store: Store, claims: Claims) -> Caller | None:
    """Return who holds a token with these claims; None if its session has ended or its user is blocked."""
    async with store.reading() as connection:
        return await _of_session(connection, claims)


async def _of_session(connection: AsyncConnection, claims: Claims) -> Caller | None:
    query = (
        select(users.c.id, users.c.email, users.c.is_admin)
        .select_from(sessions.join(users, users.c.id == sessions.c.user_id))
        .where(sessions.c.id == claims.sid, sessions.c.revoked_at.is_(None), users.c.is_active)
    )
    row = (await connection.execute(query)).first()
    if row is None or row.id != claims.sub:
        return None
    scopes = (*ALL_SCOPES, ADMIN_SCOPE) if row.is_admin else ALL_SCOPES
    return Caller(row.id, row.email, scopes, session_id=claims.sid, token_until_s=claims.exp + LEEWAY_S)


async def invalid_credentials(
    store: Store, key_ids: Collection[str], session_ids: Collection[str]
) -> tuple[set[str], set[str]]:
    """Return those of the keys and sessions that are good no more: expired, revoked, or their user blocked."""
    now, keys, lives = datetime.now(UTC), set(key_ids), set(session_ids)
    live_key = (api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now))
    live_session = (sessions.c.revoked_at.is_(None), sessions.c.expires_at > now)
    async with store.reading() as connection:
        for table, is_live, left in ((api_keys, live_key, keys), (sessions, live_session, lives)):
            living = select(table.c.id).join(users, users.c.id == table.c.user_id).where(users.c.is_active, *is_live)
            for some in _batches(sorted(left), IDS_MAX):
                left -= set((await connection.scalars(living.where(table.c.id.in_(some)))).all())
    return keys, lives


def _batches(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield the ids, at most `size` together."""
    for begin in range(0, len(ids), size):
        yield ids[begin : begin + size]
