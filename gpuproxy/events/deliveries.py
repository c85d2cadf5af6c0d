"""What becomes of each telling of an event to a webhook: its states, who sends it, when it is tried again.

A sender claims what is due for as long as an attempt may take, so that among several nodes one sends; a claim whose
sender died is taken over. An outcome counts only for the claim it belongs to.
"""

import random
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import uuid4

import msgspec
from msgspec import Struct
from sqlalchemy import ColumnElement, and_, exists, func, literal_column, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.events.outbox import record
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import deliveries, events, webhooks

Move = Literal["claim", "succeed", "fail", "give up", "cancel", "replay"]
MOVES: dict[tuple[str, Move], str] = {
    ("pending", "claim"): "sending",
    ("sending", "claim"): "sending",  # its sender did not come back in time
    ("sending", "succeed"): "delivered",
    ("sending", "fail"): "pending",
    ("sending", "give up"): "dead",
    ("pending", "cancel"): "cancelled",
    ("sending", "cancel"): "cancelled",
    ("delivered", "replay"): "pending",
    ("dead", "replay"): "pending",
    ("cancelled", "replay"): "pending",
}
STATES = ("pending", "sending", "delivered", "dead", "cancelled")

# Standard Webhooks 1.0: the waits after the first attempt and each further one, 75 hours and 35 minutes in all.
WAITS_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER = 0.2  # part of a wait by which it is longer or shorter, so that what failed together does not come together
FAILING_MAX = timedelta(hours=120)  # an endpoint that took nothing for so long is given up
GONE = 410  # "the receiver does not want this any more", says Standard Webhooks
WEBHOOKS_AT_ONCE_MAX = 500

# Literals, not parameters, or PostgreSQL could not see that the partial index fits.
IS_OPEN = deliveries.c.state.in_([literal_column("'pending'"), literal_column("'sending'")])


class Waiting(Struct, frozen=True):
    """A webhook that something is due for."""

    webhook_id: str
    user_id: str
    is_failing: bool


class OldSecret(Struct, frozen=True):
    """A secret before the present one: it signs too until its time is over."""

    sealed: bytes
    until: datetime


class Due(Struct, frozen=True):
    """A claimed delivery with all that an attempt needs. `attempts` counts this one."""

    id: int
    claim: str
    attempts: int
    webhook_id: str
    user_id: str
    url: str
    secret: bytes
    old_secrets: list[OldSecret]
    event_id: str
    name: str
    data: Mapping[str, Any]
    at: datetime


class Outcome(Struct, frozen=True):
    """How an attempt ended. `status` is 0 if no answer came; `error` is empty for a success.

    `rest_s` is for how long the receiver wants nothing (Retry-After), 0 if it did not say.
    """

    status: int
    error: str
    duration_ms: int
    rest_s: int = 0


def after(state: str, move: Move) -> str:
    """Return the state that follows. Raises KeyError for what is not allowed."""
    return MOVES[state, move]


def wait_after(attempts: int, luck: float) -> timedelta | None:
    """Return how long to wait after so many attempts, with `luck` from 0 to 1; None when it was the last."""
    if attempts > len(WAITS_S):
        return None
    return timedelta(seconds=WAITS_S[attempts - 1] * (1 + JITTER * (2 * luck - 1)))


async def waiting_webhooks(store: Store, now: datetime) -> list[Waiting]:
    """Return the webhooks that something is due for and that do not rest, in no order: one index look-up for each that
    is enabled.
    """
    is_due = exists().where(deliveries.c.webhook_id == webhooks.c.id, IS_OPEN, deliveries.c.due_at <= now)
    query = (
        select(webhooks.c.id, webhooks.c.user_id, webhooks.c.failing_since)
        .where(
            webhooks.c.state == "enabled", or_(webhooks.c.rests_until.is_(None), webhooks.c.rests_until <= now), is_due
        )
        .order_by(func.random())
        .limit(WEBHOOKS_AT_ONCE_MAX)
    )
    rows = await store.look(query)
    return [Waiting(row.id, row.user_id, row.failing_since is not None) for row in rows]


async def claim(store: Store, now: datetime, lease: timedelta, counts: Mapping[str, int]) -> list[Due]:
    """Claim up to `counts` deliveries of each webhook, those due longest first."""
    name = uuid4().hex
    async with store.writing() as connection:
        ids: list[int] = []
        for webhook_id, count in counts.items():
            ids += await _claim_of(connection, webhook_id, count, now, now + lease, name)
        return await _claimed(connection, ids)


async def _claim_of(
    connection: AsyncConnection, webhook_id: str, count: int, now: datetime, until: datetime, name: str
) -> list[int]:
    due = and_(deliveries.c.webhook_id == webhook_id, IS_OPEN, deliveries.c.due_at <= now)
    query = select(deliveries.c.id).where(due).order_by(deliveries.c.due_at).limit(count)
    ids = list((await connection.scalars(query.with_for_update(skip_locked=True))).all())
    if ids:
        values = {"state": "sending", "due_at": until, "claim": name, "attempts": deliveries.c.attempts + 1}
        await connection.execute(update(deliveries).where(deliveries.c.id.in_(ids)).values(values))
    return ids


async def _claimed(connection: AsyncConnection, ids: list[int]) -> list[Due]:
    if not ids:
        return []
    query = (
        select(
            deliveries.c.id, deliveries.c.claim, deliveries.c.attempts, deliveries.c.webhook_id, webhooks.c.user_id,
            webhooks.c.url, webhooks.c.secret, webhooks.c.old_secrets, deliveries.c.event_id, deliveries.c.name,
            events.c.data, events.c.at,
        )
        .select_from(deliveries)
        .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
        .join(events, events.c.id == deliveries.c.event_id)
        .where(deliveries.c.id.in_(ids))
        .order_by(deliveries.c.id)
    )  # fmt: skip
    rows = (await connection.execute(query)).mappings()
    return [Due(**{**row, "old_secrets": old_secrets(row["old_secrets"])}) for row in rows]


def old_secrets(stored: Any) -> list[OldSecret]:
    """Return what the column of that name holds, the newest first."""
    return msgspec.convert(stored, list[OldSecret])


async def settle(store: Store, due: Due, outcome: Outcome, now: datetime) -> str:
    """Write down how an attempt ended; return the delivery's state, "" if it was somebody else's by now."""
    values = {
        "claim": "",
        "status": outcome.status,
        "error": outcome.error,
        "duration_ms": outcome.duration_ms,
        "attempted_at": now,
    }
    is_ours = and_(deliveries.c.id == due.id, deliveries.c.claim == due.claim, deliveries.c.state == "sending")
    # The webhook is locked first: whoever disables it goes on from there to its deliveries, and nobody the other way.
    health = select(webhooks.c.failing_since, webhooks.c.url).where(webhooks.c.id == due.webhook_id)
    async with store.writing() as connection:
        webhook = (await connection.execute(health.with_for_update(key_share=True))).first()
        is_same = webhook is not None and webhook.url == due.url  # or this was the word of the receiver before
        move, due_at = _verdict(due, outcome, now, is_same)
        state = after("sending", move)
        done = await connection.execute(update(deliveries).where(is_ours).values(state=state, due_at=due_at, **values))
        if webhook is None or done.rowcount != 1:
            return ""
        if is_same:
            await _note_health(connection, due, outcome, now, webhook.failing_since)
    return state


def _verdict(due: Due, outcome: Outcome, now: datetime, is_same: bool) -> tuple[Move, datetime]:
    if not outcome.error:
        return "succeed", now
    wait = wait_after(due.attempts, random.random())  # noqa: S311 (jitter, no secret)
    if wait is None or (outcome.status == GONE and is_same):
        return "give up", now
    return "fail", now + max(wait, timedelta(seconds=outcome.rest_s))


async def _note_health(
    connection: AsyncConnection, due: Due, outcome: Outcome, now: datetime, failing_since: datetime | None
) -> None:
    since = (failing_since or now) if outcome.error else None
    values: dict[str, Any] = {} if since == failing_since else {"failing_since": since}
    if outcome.rest_s:  # all of its deliveries wait, not this one alone
        values["rests_until"] = now + timedelta(seconds=outcome.rest_s)
    if values:
        await connection.execute(update(webhooks).where(webhooks.c.id == due.webhook_id).values(values))
    if outcome.status == GONE:
        await disable(connection, due.webhook_id, "it answered 410 Gone")
    elif since is not None and now - since >= FAILING_MAX:
        hours = int(FAILING_MAX.total_seconds()) // 3_600
        await disable(connection, due.webhook_id, f"it took nothing for {hours} hours; the last try: {outcome.error}")


async def disable(connection: AsyncConnection, webhook_id: str, reason: str) -> None:
    """Send a webhook nothing any more, and tell its owner over ``/ws``. Again changes nothing."""
    is_enabled = and_(webhooks.c.id == webhook_id, webhooks.c.state == "enabled")
    values = {"state": "disabled", "disabled_reason": reason}
    query = update(webhooks).where(is_enabled).values(values).returning(webhooks.c.user_id, webhooks.c.url)
    row = (await connection.execute(query)).first()
    if row is not None:
        await cancel_open(connection, deliveries.c.webhook_id == webhook_id)
        data = {"webhook_id": webhook_id, "url": row.url, "reason": reason}
        await connection.run_sync(record, "webhook.disabled", row.user_id, data)


async def cancel_open(connection: AsyncConnection, chosen: ColumnElement[bool]) -> None:
    """Give up what is not delivered yet; it can be replayed."""
    values = {"state": after("pending", "cancel"), "claim": ""}
    await connection.execute(update(deliveries).where(chosen, IS_OPEN).values(values))
