"""Calls that are repeated with the same ``Idempotency-Key`` happen once and are answered the same each time.

A call claims its key first, and stores its answer in the transaction of its effect. So a claim without an answer is
of a call that runs, or of a process that died before anything happened: such a claim may be taken over after a while.
"""

from datetime import UTC, datetime, timedelta
from hashlib import sha256

from msgspec import Struct
from sqlalchemy import ColumnElement, and_, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import idempotency

KEY_CHARACTERS_MAX = 255
KEPT = timedelta(hours=24)
RUNNING_MAX = timedelta(seconds=60)  # longer than any call here; a claim this old is of a process that died


class Claim(Struct, frozen=True):
    """One caller's wish to do one thing once. `request_hash` tells whether a repetition asks for the same."""

    user_id: str
    route: str
    key: str
    request_hash: bytes


class Reply(Struct, frozen=True):
    """What the first call was answered."""

    status: int
    body: bytes


def claim_of(user_id: str, route: str, key: str, request: bytes) -> Claim:
    """Return the claim of a call. Raises GatewayError BAD_REQUEST for a key that is empty, long or not printable."""
    if not (0 < len(key) <= KEY_CHARACTERS_MAX and key.isascii() and key.isprintable()):
        message = f"Idempotency-Key has to be 1 to {KEY_CHARACTERS_MAX} printable ASCII characters"
        raise GatewayError("BAD_REQUEST", message, param="Idempotency-Key")
    return Claim(user_id, route, key, sha256(request).digest())


async def begin(store: Store, claim: Claim) -> Reply | None:
    """Claim the key, or return the reply of the call that had it. After None, `finish` or `abandon` must follow.

    Raises GatewayError CONFLICT while that call runs, UNPROCESSABLE if it asked for something else.
    """
    now = datetime.now(UTC)
    async with store.writing() as connection:
        await connection.execute(delete(idempotency).where(_is_void(now)))
        row = {**_key_of(claim), "request_hash": claim.request_hash, "created_at": now}
        claimed = await connection.execute(store.insert_new(idempotency).values(**row))
        if claimed.rowcount == 1:
            return None
        held = (await connection.execute(select(idempotency).where(_is(claim)))).first()
    if held is not None and held.request_hash != claim.request_hash:
        message = f"Idempotency-Key {claim.key!r} was used for another request; take a new one"
        raise GatewayError("UNPROCESSABLE", message, param="Idempotency-Key")
    if held is None or held.status is None:  # none: the call that had it has just given it back
        raise GatewayError("CONFLICT", f"the call with Idempotency-Key {claim.key!r} still runs", retry_after_s=1)
    return Reply(held.status, held.body)


async def finish(connection: AsyncConnection, claim: Claim, reply: Reply) -> None:
    """Store the reply, in the transaction of the effect. Raises GatewayError CONFLICT if the claim was lost."""
    running = and_(_is(claim), idempotency.c.status.is_(None))
    done = await connection.execute(update(idempotency).where(running).values(status=reply.status, body=reply.body))
    if done.rowcount != 1:
        raise GatewayError("CONFLICT", f"the call with Idempotency-Key {claim.key!r} took too long", retry_after_s=1)


async def abandon(store: Store, claim: Claim) -> None:
    """Give the key back: nothing has happened."""
    async with store.writing() as connection:
        await connection.execute(delete(idempotency).where(_is(claim), idempotency.c.status.is_(None)))


def _is(claim: Claim) -> ColumnElement[bool]:
    return and_(*(idempotency.c[name] == value for name, value in _key_of(claim).items()))


def _key_of(claim: Claim) -> dict[str, str]:
    return {"user_id": claim.user_id, "route": claim.route, "key": claim.key}


def _is_void(now: datetime) -> ColumnElement[bool]:
    """Tell which rows count no more: the old ones, and claims of calls that cannot run any more."""
    of_the_dead = and_(idempotency.c.status.is_(None), idempotency.c.created_at <= now - RUNNING_MAX)
    return (idempotency.c.created_at <= now - KEPT) | of_the_dead
