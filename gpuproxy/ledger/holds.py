"""Credit set aside before it is earned: held, then posted, voided or expired, exactly once.

As TigerBeetle's two-phase transfers, with one addition: a hold may be extended, drawn on and given back in part while
it is pending, because what the ledger holds for traffic is the lease of a worker, which lives for long.
A charge never exceeds what is held. Functions work inside the caller's writing transaction, see `transfers`.
"""

from datetime import UTC, datetime
from typing import Literal, get_args
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import Connection, Row, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.ledger.transfers import (
    AMOUNT_NANOUSD_MAX,
    REVENUE,
    Transfer,
    credit_account,
    insert_new,
    lock,
    make_missing,
    post,
)
from gpuproxy.store.schema import accounts, holds

State = Literal["pending", "posted", "voided", "expired"]
MOVES: dict[State, tuple[State, ...]] = {
    "pending": ("posted", "voided", "expired"),
    "posted": (),
    "voided": (),
    "expired": (),
}
EXPIRED_AT_ONCE_MAX = 1_000


class Hold(Struct, frozen=True):
    """Credit set aside: ``amount`` in all, ``posted`` was charged, ``remaining`` is held, the rest went back."""

    id: str
    account_id: str
    owner: str
    state: State
    amount_nanousd: int
    remaining_nanousd: int
    posted_nanousd: int
    idempotency_key: str
    created_at: datetime
    expires_at: datetime | None = None
    resolved_at: datetime | None = None


def place(
    connection: Connection,
    user_id: str,
    amount_nanousd: int,
    idempotency_key: str,
    owner: str = "",
    expires_at: datetime | None = None,
) -> Hold:
    """Set credit aside; the hold of before if this key was used before.

    Raises GatewayError INSUFFICIENT_CREDITS, UNPROCESSABLE for an amount out of range, CONFLICT for a key that
    was used for something else. `owner` names who may charge it.
    """
    wanted = Hold(
        str(uuid4()), credit_account(user_id), owner, "pending", _checked(amount_nanousd), amount_nanousd, 0,
        idempotency_key, datetime.now(UTC), expires_at,
    )  # fmt: skip
    before = _with_key(connection, wanted)
    if before is not None:
        return before
    if not _reserve(connection, wanted.account_id, amount_nanousd):
        raise GatewayError("INSUFFICIENT_CREDITS", "the account has not enough credit left")
    row = {field: getattr(wanted, field) for field in wanted.__struct_fields__}
    if insert_new(connection, holds, row):
        return wanted
    _unreserve(connection, wanted.account_id, amount_nanousd)  # somebody was faster with the same key
    before = _with_key(connection, wanted)
    assert before is not None  # or it could have been inserted
    return before


def extend(connection: Connection, hold_id: str, amount_nanousd: int, expires_at: datetime | None = None) -> bool:
    """Set more aside for a pending hold; False if there is not so much. `expires_at` moves the end if given."""
    hold = _pending(connection, hold_id)
    if not _reserve(connection, hold.account_id, _checked(amount_nanousd)):
        return False
    _update(
        connection,
        hold,
        amount_nanousd=hold.amount_nanousd + amount_nanousd,
        remaining_nanousd=hold.remaining_nanousd + amount_nanousd,
        expires_at=expires_at or hold.expires_at,
    )
    return True


def draw(connection: Connection, hold_id: str, amount_nanousd: int, kind: str, key: str, to: str = REVENUE) -> bool:
    """Charge a part of a pending hold, which stays pending. False if the key was used before.

    Raises GatewayError CONFLICT for a hold that is resolved, UNPROCESSABLE for more than remains.
    """
    hold = _pending(connection, hold_id, to)
    return _charge(connection, hold, Transfer(hold.account_id, to, _covered(hold, amount_nanousd), kind, key), 0)


def give_back(connection: Connection, hold_id: str, amount_nanousd: int) -> int:
    """Return a part of a pending hold to the customer, at most what remains; return how much that was."""
    hold = _pending(connection, hold_id)
    released = max(0, min(amount_nanousd, hold.remaining_nanousd))
    _unreserve(connection, hold.account_id, released)
    _update(connection, hold, remaining_nanousd=hold.remaining_nanousd - released)
    return released


def settle(connection: Connection, hold_id: str, amount_nanousd: int, kind: str, to: str = REVENUE) -> Hold:
    """Resolve a hold: charge up to what remains and give the rest back. Raises as `draw`."""
    hold = _pending(connection, hold_id, to)
    rest = hold.remaining_nanousd - _covered(hold, amount_nanousd)
    if amount_nanousd:
        charged = Transfer(hold.account_id, to, amount_nanousd, kind, f"hold:{hold.id}")
        _charge(connection, hold, charged, rest)
    else:
        _unreserve(connection, hold.account_id, rest)
    return _resolve(connection, hold_id, "posted")


def void(connection: Connection, hold_id: str) -> Hold:
    """Resolve a hold by giving all of it back. Raises GatewayError CONFLICT for one that is resolved."""
    hold = _pending(connection, hold_id)
    _unreserve(connection, hold.account_id, hold.remaining_nanousd)
    return _resolve(connection, hold_id, "voided")


def expire(connection: Connection, now: datetime) -> int:
    """Give back what pending holds past their end still hold; return how many, EXPIRED_AT_ONCE_MAX at most."""
    is_over = (holds.c.state == "pending") & (holds.c.expires_at <= now)
    query = select(holds.c.id, holds.c.account_id).where(is_over).order_by(holds.c.account_id)
    found = connection.execute(query.limit(EXPIRED_AT_ONCE_MAX)).all()
    lock(connection, {row.account_id for row in found})
    count = 0
    for row in found:
        hold = get(connection, row.id)
        if hold is None or hold.state != "pending" or hold.expires_at is None or hold.expires_at > now:
            continue  # resolved or extended before the lock was had
        _unreserve(connection, hold.account_id, hold.remaining_nanousd)
        _resolve(connection, hold.id, "expired")
        count += 1
    return count


def get(connection: Connection, hold_id: str) -> Hold | None:
    """Return the hold, None if there is none."""
    row = connection.execute(select(holds).where(holds.c.id == hold_id)).first()
    return _hold(row) if row is not None else None


def pending_of(connection: Connection, owner: str) -> list[Hold]:
    """Return the pending holds of an owner."""
    chosen = (holds.c.state == "pending") & (holds.c.owner == owner)
    return [_hold(row) for row in connection.execute(select(holds).where(chosen).order_by(holds.c.account_id))]


def _checked(amount_nanousd: int) -> int:
    if not 0 < amount_nanousd <= AMOUNT_NANOUSD_MAX:
        raise GatewayError("UNPROCESSABLE", f"{amount_nanousd} nanodollars is out of range", param="amount")
    return amount_nanousd


def _covered(hold: Hold, amount_nanousd: int) -> int:
    if not 0 <= amount_nanousd <= hold.remaining_nanousd:
        message = f"{amount_nanousd} nanodollars is more than the {hold.remaining_nanousd} that remain in the hold"
        raise GatewayError("UNPROCESSABLE", message, param="amount")
    return amount_nanousd


def _with_key(connection: Connection, wanted: Hold) -> Hold | None:
    row = connection.execute(select(holds).where(holds.c.idempotency_key == wanted.idempotency_key)).first()
    if row is None:
        return None
    before = _hold(row)
    if (before.account_id, before.owner) != (wanted.account_id, wanted.owner):
        raise GatewayError("CONFLICT", f"idempotency key {wanted.idempotency_key!r} belongs to another hold")
    return before


def _pending(connection: Connection, hold_id: str, *others: str) -> Hold:
    """Return a pending hold with its account, and `others`, locked; so nobody else changes it either."""
    account_id = connection.scalar(select(holds.c.account_id).where(holds.c.id == hold_id))
    if account_id is None:
        raise GatewayError("NOT_FOUND", f"no hold {hold_id!r}")
    if others:
        make_missing(connection, others)
    lock(connection, (account_id, *others))
    hold = get(connection, hold_id)
    assert hold is not None  # holds are never deleted
    if hold.state != "pending":
        raise GatewayError("CONFLICT", f"the hold is {hold.state} already")
    return hold


def _reserve(connection: Connection, account_id: str, amount_nanousd: int) -> bool:
    """Move from free to held, in one statement: whoever races for the last credit, it is spent once."""
    free = accounts.c.posted_nanousd - accounts.c.held_nanousd + accounts.c.overdraft_nanousd
    statement = update(accounts).where(accounts.c.id == account_id, free >= amount_nanousd)
    done = connection.execute(statement.values(held_nanousd=accounts.c.held_nanousd + amount_nanousd))
    return done.rowcount == 1


def _unreserve(connection: Connection, account_id: str, amount_nanousd: int) -> None:
    if amount_nanousd:
        statement = update(accounts).where(accounts.c.id == account_id)
        connection.execute(statement.values(held_nanousd=accounts.c.held_nanousd - amount_nanousd))


def _charge(connection: Connection, hold: Hold, transfer: Transfer, released_nanousd: int) -> bool:
    """Turn held credit into a transfer and release more; False if the transfer was posted before."""
    amount = transfer.amount_nanousd
    _unreserve(connection, hold.account_id, amount + released_nanousd)  # first: a transfer takes free credit only
    if not post(connection, [transfer]):
        _reserve(connection, hold.account_id, amount + released_nanousd)
        return False
    _update(
        connection,
        hold,
        remaining_nanousd=hold.remaining_nanousd - amount - released_nanousd,
        posted_nanousd=hold.posted_nanousd + amount,
    )
    return True


def _update(connection: Connection, hold: Hold, **values: object) -> None:
    connection.execute(update(holds).where(holds.c.id == hold.id).values(**values))


def _resolve(connection: Connection, hold_id: str, state: State) -> Hold:
    may_move = holds.c.state.in_([name for name in get_args(State) if state in MOVES[name]])
    values = {"state": state, "remaining_nanousd": 0, "resolved_at": datetime.now(UTC)}
    done = connection.execute(update(holds).where(holds.c.id == hold_id, may_move).values(**values))
    hold = get(connection, hold_id)
    if hold is None or done.rowcount != 1:
        raise GatewayError("CONFLICT", f"the hold {hold_id!r} is resolved already")
    return hold


def _hold(row: Row[tuple[object, ...]]) -> Hold:
    return Hold(**row._mapping)
