"""Webhooks of an account: made, listed, changed, deleted; their secrets; their deliveries, tested and replayed.

Secrets arrive here sealed. A thing of another account is not found, as one that does not exist.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from msgspec import Struct, to_builtins
from sqlalchemy import Row, and_, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.errors import GatewayError
from gpuproxy.events import usage
from gpuproxy.events.catalogue import EVERYTHING, canonical, subscribable
from gpuproxy.events.deliveries import STATES, OldSecret, after, cancel_open, old_secrets
from gpuproxy.events.outbox import store_event
from gpuproxy.store.locks import lock_user
from gpuproxy.store.schema import deliveries, events, webhook_events, webhooks

Kind = Literal["events", "billing"]
OLD_SECRETS_MAX = 4  # each makes the header that carries signatures longer


class Webhook(Struct, frozen=True):
    """A webhook without its secret. `state` is enabled or disabled."""

    id: str
    kind: str
    url: str
    events: tuple[str, ...]
    description: str
    state: str
    disabled_reason: str
    failing_since: datetime | None
    old_secret_until: datetime | None
    created_at: datetime


class Delivery(Struct, frozen=True):
    """What became of telling one event to one webhook. `next_at` is when it is tried again."""

    id: str
    webhook_id: str
    event_id: str
    event: str
    state: str
    attempts: int
    status_code: int
    error: str
    duration_ms: int
    attempted_at: datetime | None
    next_at: datetime | None
    created_at: datetime


class Draft(Struct, frozen=True):
    """A webhook to be made; `secret` is sealed for `id`."""

    id: str
    kind: Kind
    url: str
    events: tuple[str, ...]
    description: str
    secret: bytes


def check_events(names: Iterable[str], kind: str) -> tuple[str, ...]:
    """Return the names without repetitions, the first spelling of each. Raises GatewayError UNPROCESSABLE."""
    known = subscribable(kind == "billing")
    chosen: dict[str, str] = {}
    for name in names:
        if name != EVERYTHING and name not in known:
            message = f"events: no event {name[:60]!r} for a webhook like this; known: {', '.join(known)}, {EVERYTHING}"
            raise GatewayError("UNPROCESSABLE", message, param="events")
        chosen.setdefault(canonical(name), name)
    if EVERYTHING in chosen:
        return (EVERYTHING,) if kind == "events" else tuple(dict.fromkeys(canonical(name) for name in known))
    return tuple(chosen.values())


async def add_webhook(connection: AsyncConnection, user_id: str, draft: Draft, count_max: int) -> Webhook:
    """Make a webhook. Raises GatewayError CONFLICT if the account has `count_max`."""
    await connection.run_sync(lock_user, user_id)
    count = await connection.scalar(select(func.count()).select_from(webhooks).where(webhooks.c.user_id == user_id))
    if (count or 0) >= count_max:
        raise GatewayError("CONFLICT", f"the account has {count} webhooks, the most it may have; delete one")
    row: dict[str, Any] = {
        "id": draft.id, "user_id": user_id, "kind": draft.kind, "url": draft.url, "description": draft.description,
        "state": "enabled", "disabled_reason": "", "secret": draft.secret, "created_at": datetime.now(UTC),
    }  # fmt: skip
    await connection.execute(insert(webhooks).values(row))
    await _subscribe(connection, draft.id, draft.events)
    made = await own_webhook(connection, user_id, draft.id)
    await _want_usage(connection, user_id, made)
    return made


async def own_webhook(connection: AsyncConnection, user_id: str, webhook_id: str, is_locked: bool = False) -> Webhook:
    """Return a webhook of the user, if asked for so that nobody else changes it now. Raises GatewayError NOT_FOUND."""
    query = select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.user_id == user_id)
    if is_locked:
        query = query.with_for_update(key_share=True)
    row = (await connection.execute(query)).first()
    if row is None:
        raise GatewayError("NOT_FOUND", f"no webhook {webhook_id[:64]!r}")
    return (await _with_events(connection, [row]))[0]


async def own_webhooks(connection: AsyncConnection, user_id: str, kind: Kind | None) -> list[Webhook]:
    """Return the user's webhooks, oldest first; all kinds for None."""
    chosen = webhooks.c.user_id == user_id
    query = select(webhooks).where(chosen if kind is None else and_(chosen, webhooks.c.kind == kind))
    rows = (await connection.execute(query.order_by(webhooks.c.created_at, webhooks.c.id))).all()
    return await _with_events(connection, rows)


async def change_webhook(
    connection: AsyncConnection,
    user_id: str,
    webhook_id: str,
    values: dict[str, Any],
    names: tuple[str, ...] | None,
    is_enabled: bool | None,
) -> Webhook:
    """Change a webhook; None leaves a thing as it is. Disabling gives up what is not delivered yet."""
    found = await own_webhook(connection, user_id, webhook_id, is_locked=True)
    if is_enabled is not None and is_enabled != (found.state == "enabled"):
        state, reason = ("enabled", "") if is_enabled else ("disabled", "you disabled it")
        values = {**values, "state": state, "disabled_reason": reason}
    if "url" in values or is_enabled:
        # Another receiver, or one that is said to be well again.
        values = {**values, "rests_until": None, "failing_since": None}
    if values:
        await connection.execute(update(webhooks).where(webhooks.c.id == webhook_id).values(values))
    if names is not None:
        await connection.execute(delete(webhook_events).where(webhook_events.c.webhook_id == webhook_id))
        await _subscribe(connection, webhook_id, names)
    if is_enabled is False:
        await cancel_open(connection, deliveries.c.webhook_id == webhook_id)
    changed = await own_webhook(connection, user_id, webhook_id)
    await _want_usage(connection, user_id, changed)
    return changed


async def remove_webhook(connection: AsyncConnection, user_id: str, webhook_id: str) -> Webhook:
    """Delete a webhook with its deliveries; return what it was."""
    found = await own_webhook(connection, user_id, webhook_id)
    await connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))
    return found


async def replace_secret(
    connection: AsyncConnection, user_id: str, webhook_id: str, sealed: bytes, overlap_s: int
) -> Webhook:
    """Sign with another secret from now on, and with the one before as well until the overlap ends.

    So do those whose overlap has not ended yet, OLD_SECRETS_MAX in all; with an overlap of 0 none of them does.
    """
    await own_webhook(connection, user_id, webhook_id, is_locked=True)
    is_it, now = webhooks.c.id == webhook_id, datetime.now(UTC)
    row = (await connection.execute(select(webhooks.c.secret, webhooks.c.old_secrets).where(is_it))).one()
    before = OldSecret(row.secret, now + timedelta(seconds=overlap_s))
    kept = [before, *(each for each in old_secrets(row.old_secrets) if each.until > now)] if overlap_s else []
    values = {"secret": sealed, "old_secrets": to_builtins(kept[:OLD_SECRETS_MAX])}
    await connection.execute(update(webhooks).where(is_it).values(values))
    return await own_webhook(connection, user_id, webhook_id)


async def owe_test(connection: AsyncConnection, user_id: str, webhook_id: str) -> Delivery:
    """Send a webhook the event ``webhook.test``. Raises GatewayError CONFLICT if it is disabled."""
    found = await own_webhook(connection, user_id, webhook_id, is_locked=True)
    _check_enabled(found)
    at, data = datetime.now(UTC), {"webhook_id": webhook_id}
    event_id = await connection.run_sync(store_event, "webhook.test", user_id, data, at)
    row: dict[str, Any] = {
        "webhook_id": webhook_id, "event_id": event_id, "name": "webhook.test", "state": "pending", "attempts": 0,
        "due_at": at, "claim": "", "status": 0, "error": "", "duration_ms": 0, "created_at": at,
    }  # fmt: skip
    made = await connection.execute(insert(deliveries).values(row).returning(deliveries))
    return _shown(made.one())


async def replay(connection: AsyncConnection, user_id: str, delivery_id: str) -> Delivery:
    """Send again from the beginning what is over. Raises GatewayError NOT_FOUND, CONFLICT."""
    mine = and_(deliveries.c.id == _number(delivery_id), webhooks.c.user_id == user_id)
    query = select(deliveries.c.webhook_id).join(webhooks, webhooks.c.id == deliveries.c.webhook_id).where(mine)
    webhook_id = await connection.scalar(query)
    if webhook_id is None:
        raise GatewayError("NOT_FOUND", f"no delivery {delivery_id[:64]!r}")
    _check_enabled(await own_webhook(connection, user_id, webhook_id, is_locked=True))
    is_it = deliveries.c.id == _number(delivery_id)
    state = await connection.scalar(select(deliveries.c.state).where(is_it).with_for_update())
    try:
        values = {"state": after(str(state), "replay"), "attempts": 0, "due_at": datetime.now(UTC)}
    except KeyError:
        raise GatewayError("CONFLICT", f"delivery {delivery_id} is {state}; only what is over is replayed") from None
    done = await connection.execute(update(deliveries).where(is_it).values(values).returning(deliveries))
    return _shown(done.one())


async def newest_deliveries(
    connection: AsyncConnection, user_id: str, webhook_id: str, state: str | None, limit: int, cursor: str
) -> list[Delivery]:
    """Return a webhook's deliveries, newest first, those before the id `cursor` if there is one."""
    await own_webhook(connection, user_id, webhook_id)
    query = select(deliveries).where(deliveries.c.webhook_id == webhook_id)
    if state is not None:
        query = query.where(deliveries.c.state == state)
    if cursor:
        query = query.where(deliveries.c.id < _number(cursor))
    rows = (await connection.execute(query.order_by(deliveries.c.id.desc()).limit(limit))).all()
    return [_shown(row) for row in rows]


async def forget_old(connection: AsyncConnection, before: datetime, count_max: int) -> int:
    """Delete events from before a time, with their deliveries, `count_max` at most; return how many."""
    oldest = select(events.c.seq).where(events.c.at < before).order_by(events.c.seq).limit(count_max)
    return (await connection.execute(delete(events).where(events.c.seq.in_(oldest)))).rowcount


async def _subscribe(connection: AsyncConnection, webhook_id: str, names: Sequence[str]) -> None:
    rows = [{"webhook_id": webhook_id, "name": name} for name in names]
    if rows:
        await connection.execute(insert(webhook_events), rows)


async def _want_usage(connection: AsyncConnection, user_id: str, webhook: Webhook) -> None:
    if webhook.state == "enabled" and usage.wants(webhook.events):
        await connection.run_sync(usage.want, user_id, datetime.now(UTC))


async def _with_events(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Webhook]:
    ids = [row.id for row in rows]
    query = select(webhook_events).where(webhook_events.c.webhook_id.in_(ids)).order_by(webhook_events.c.name)
    names: dict[str, list[str]] = {each: [] for each in ids}
    for name in (await connection.execute(query)).all():
        names[name.webhook_id].append(name.name)
    return [
        Webhook(
            row.id, row.kind, row.url, tuple(names[row.id]), row.description, row.state, row.disabled_reason,
            row.failing_since, max((old.until for old in old_secrets(row.old_secrets)), default=None), row.created_at,
        )
        for row in rows
    ]  # fmt: skip


def _check_enabled(webhook: Webhook) -> None:
    if webhook.state != "enabled":
        raise GatewayError("CONFLICT", f"webhook {webhook.id} is disabled: {webhook.disabled_reason}; enable it first")


def check_state(state: str | None) -> str | None:
    """Return the state of deliveries asked for. Raises GatewayError UNPROCESSABLE."""
    if state is not None and state not in STATES:
        message = f"state={state[:20]!r} is unknown; known: {', '.join(STATES)}"
        raise GatewayError("UNPROCESSABLE", message, param="state")
    return state


def _number(delivery_id: str) -> int:
    return int(delivery_id) if delivery_id.isascii() and delivery_id.isdigit() and len(delivery_id) < 19 else 0


def _shown(row: Any) -> Delivery:
    return Delivery(
        str(row.id), row.webhook_id, row.event_id, row.name, row.state, row.attempts, row.status, row.error,
        row.duration_ms, row.attempted_at, row.due_at if row.state == "pending" else None, row.created_at,
    )  # fmt: skip
