"""Tickets: good once and for 30 seconds, for who can send no header, as browsers that open a WebSocket.

A ticket stands in a URL, and URLs are logged; a key or token there would be given away. Behind its dot
stands when the token it was made with ends. Nobody can change that: only the digest of the whole is stored.
"""

import secrets
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from msgspec import Struct
from sqlalchemy import delete, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.callers import Caller
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import tickets

PREFIX = "gpw_"
TICKET_BYTES = 32
LIFETIME_S = 30


class Holder(Struct, frozen=True):
    """Who showed a credential, and which: what has to be watched while they listen."""

    user_id: str
    key_id: str = ""
    session_id: str = ""
    until_s: int = 0  # unix seconds, of a token


async def issue_ticket(connection: AsyncConnection, caller: Caller) -> tuple[str, datetime]:
    """Make a ticket that stands for the caller's credential; return it and when it ends."""
    now = datetime.now(UTC)
    await connection.execute(delete(tickets).where(tickets.c.expires_at <= now))
    ticket = f"{PREFIX}{secrets.token_urlsafe(TICKET_BYTES)}.{caller.token_until_s}"
    expires_at = now + timedelta(seconds=LIFETIME_S)
    row = {
        "digest": sha256(ticket.encode()).digest(),
        "user_id": caller.user_id,
        "key_id": caller.key_id,
        "session_id": caller.session_id,
        "expires_at": expires_at,
    }
    await connection.execute(insert(tickets).values(row))
    return ticket, expires_at


async def redeem_ticket(store: Store, ticket: str) -> Holder | None:
    """Use a ticket up; None if it is unknown, used or too old. Its credential may have been revoked meanwhile."""
    digest = sha256(ticket.encode(errors="surrogateescape")).digest()
    is_good = (tickets.c.digest == digest, tickets.c.expires_at > datetime.now(UTC))
    used = delete(tickets).where(*is_good).returning(tickets.c.user_id, tickets.c.key_id, tickets.c.session_id)
    async with store.writing() as connection:
        row = (await connection.execute(used)).first()
    return None if row is None else Holder(*row, until_s=int(ticket.partition(".")[2] or 0))
