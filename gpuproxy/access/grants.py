"""What a key may do, as workers are told it: one statement for each key that is asked about."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, bindparam, func, select

from gpuproxy.store.engine import Store
from gpuproxy.store.schema import account_terms, api_keys, budgets, users
from gpuproxy.types import Grant


def _grant_query() -> Select[Any]:
    may_call: ColumnElement[bool] = and_(
        api_keys.c.digest == bindparam("wanted"), api_keys.c.revoked_at.is_(None), users.c.is_active
    )
    joined = api_keys.join(users, users.c.id == api_keys.c.user_id)
    key = api_keys.c
    terms, budget = account_terms.c, budgets.c
    markup_bps = select(terms.markup_bps).where(terms.user_id == key.user_id).scalar_subquery().label("markup_bps")
    shared = and_(budget.user_id == key.user_id, budget.key_id == func.coalesce(key.root_id, key.id))
    budget_key = select(func.min(budget.key_id)).where(shared).scalar_subquery().label("budget_key")
    bounds = (key.rpm, key.rpm_ceiling, key.tpm, key.streams, key.tools, markup_bps, budget_key)
    shown = select(key.id, key.user_id, key.scopes, key.models, key.expires_at, *bounds)
    return shown.select_from(joined).where(may_call)


_GRANT = _grant_query()


async def grant_for(store: Store, digest: bytes, rpm: int = 0, tpm: int = 0, streams: int = 0) -> Grant | None:
    """Return what the key with this SHA-256 digest may do; None if unknown, expired, revoked or blocked.

    `rpm`, `tpm` and `streams` are the limits of users, which hold where a key has none of its own.
    """
    async with store.reading() as connection:
        row = (await connection.execute(_GRANT, {"wanted": digest})).first()
    if row is None or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
        return None
    models = None if row.models is None else tuple(row.models)
    return Grant(
        row.id,
        row.user_id,
        tuple(row.scopes),
        models,
        _unix_ns(row.expires_at),
        rpm=rpm if row.rpm is None else row.rpm,
        is_rpm_shared=row.rpm is None,
        rpm_ceiling=row.rpm_ceiling or 0,
        tpm=tpm if row.tpm is None else row.tpm,
        is_tpm_shared=row.tpm is None,
        markup_bps=row.markup_bps or 0,
        budget_key=row.budget_key or "",
        streams=streams if row.streams is None else row.streams,
        is_streams_shared=row.streams is None,
        tools=None if row.tools is None else tuple(row.tools),
    )


def _unix_ns(time: datetime | None) -> int:
    """Return unix time in nanoseconds, 0 for None; exact, which `timestamp()` is not."""
    if time is None:
        return 0
    since = time - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000
