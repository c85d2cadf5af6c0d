"""Budgets: what a user, or one key, may spend at most in a window of time, however much credit there is.

Like credit a budget is held to where leases are handed out, not call by call: what was charged in the window and what
workers and rentals hold unspent never exceed it together. So it is never exceeded, over all workers and nodes. A charge
counts in the window in which it is booked, a moment after its call ended.

Windows of one length follow one another from 1970-01-01 UTC: those of a day begin at midnight UTC. Keys that came from
one another by rotation share their budgets. Functions work inside the caller's writing transaction, see `transfers`;
whoever changes what was spent has locked the customer's account.
"""

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import BigInteger, ColumnElement, Connection, and_, cast, delete, func, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.transfers import credit_account, insert_new, lock
from gpuproxy.store.locks import lock_user
from gpuproxy.store.schema import api_keys, budgets, holds

WINDOW_S_MIN = 300
WINDOW_S_MAX = 2_592_000
BUDGETS_MAX = 100  # of one user, over all keys
TOLD_PERCENT = (80, 100)
KEY_MARK = "#"  # in the owner of a hold: what follows names the keys it is for
RENTAL = "rental:"  # what the owner of a rental's hold begins with
USERS_AT_ONCE = 500  # parameters of one query

_column = budgets.c


class Budget(Struct, frozen=True):
    """A budget. `key_id` is empty for all keys of the user; `spent`, `told` are of the window `window_number`."""

    id: str
    user_id: str
    key_id: str
    window_s: int
    limit_nanousd: int
    is_admins: bool
    window_number: int
    spent_nanousd: int
    told_percent: int
    created_at: datetime

    def number(self, now_s: float) -> int:
        """Return which window a time is in. The next, if a clock ahead of ours has begun that: none begins twice."""
        number = int(now_s // self.window_s)
        return self.window_number if self.window_number == number + 1 else number

    def spent(self, now_s: float) -> int:
        """Return what was charged in the window of a time."""
        return self.spent_nanousd if self.window_number == self.number(now_s) else 0

    def told(self, now_s: float) -> int:
        """Return the percentage that was told in the window of a time."""
        return self.told_percent if self.window_number == self.number(now_s) else 0

    def ends_ns(self, now_s: float) -> int:
        """Return when the window of a time ends, in unix nanoseconds."""
        return (self.number(now_s) + 1) * self.window_s * 10**9

    def ends_at(self, now_s: float) -> datetime:
        """Return when the window of a time ends."""
        return datetime.fromtimestamp(self.ends_ns(now_s) // 10**9, UTC)


class Room(Struct, frozen=True):
    """What budgets leave of a grant, and which one leaves the least; None: there is no budget."""

    nanousd: int
    tightest: Budget | None = None


def set_budget(
    connection: Connection, user_id: str, key_id: str, window_s: int, limit_nanousd: int, is_admins: bool
) -> Budget:
    """Add a budget, or give the one of the same user, key and window another limit.

    Raises GatewayError NOT_FOUND for a key that is not the user's, UNPROCESSABLE for a window out of range, CONFLICT
    for one too many.
    """
    if not WINDOW_S_MIN <= window_s <= WINDOW_S_MAX:
        message = f"window_s={window_s} is out of range; {WINDOW_S_MIN} (5 minutes) to {WINDOW_S_MAX} (30 days)"
        raise GatewayError("UNPROCESSABLE", message, param="window_s")
    root = _root(connection, user_id, key_id) if key_id else ""
    same = (_column.user_id == user_id, _column.key_id == root, _column.window_s == window_s)
    chosen = and_(*same, _column.is_admins == is_admins)
    change = update(budgets).where(chosen).values(limit_nanousd=limit_nanousd)
    if not connection.execute(change).rowcount:
        _check_count(connection, user_id)
        new = Budget(
            str(uuid4()), user_id, root, window_s, limit_nanousd, is_admins, 0, 0, 0, datetime.now(UTC)
        )  # fmt: skip
        if not insert_new(connection, budgets, {name: getattr(new, name) for name in new.__struct_fields__}):
            connection.execute(change)  # somebody was faster
    return _budgets(connection, chosen)[0]


def remove_budget(connection: Connection, budget_id: str, user_id: str | None, may_all: bool) -> Budget:
    """Take a budget away. `user_id` is whose it must be, None: anybody's; `may_all` tells that it may be an admin's.

    Raises GatewayError NOT_FOUND, FORBIDDEN for one that an admin has set.
    """
    chosen = _column.id == budget_id if user_id is None else and_(_column.id == budget_id, _column.user_id == user_id)
    found = _budgets(connection, chosen)
    if not found:
        raise GatewayError("NOT_FOUND", f"no budget {budget_id!r}")
    if found[0].is_admins and not may_all:
        raise GatewayError("FORBIDDEN", "an admin has set this budget; ask one to change it")
    connection.execute(delete(budgets).where(chosen))
    return found[0]


def budgets_of(connection: Connection, user_id: str) -> list[Budget]:
    """Return all budgets of a user, oldest first; at most BUDGETS_MAX and those of admins."""
    return _budgets(connection, _column.user_id == user_id)


def room(connection: Connection, user_id: str, key_id: str, now_s: float | None = None) -> Room:
    """Return what may be granted now to a key (`key_id` is its root; empty: it has no budget of its own)."""
    return min(rooms(connection, user_id, key_id, now_s), key=lambda each: each.nanousd, default=Room(1 << 62))


def rooms(connection: Connection, user_id: str, key_id: str, now_s: float | None = None) -> list[Room]:
    """Return what each budget leaves now."""
    now_s = time.time() if now_s is None else now_s
    found = _budgets(connection, and_(_column.user_id == user_id, _column.key_id.in_({"", key_id})))
    return [
        Room(max(0, each.limit_nanousd - each.spent(now_s) - _outstanding(connection, each)), each) for each in found
    ]


def refused(connection: Connection, budget: Budget, now_s: float | None = None) -> None:
    """Note that something was refused for want of budget: told once in a window."""
    now_s = time.time() if now_s is None else now_s
    lock(connection, [credit_account(budget.user_id)])
    for found in _budgets(connection, _column.id == budget.id):  # anew: more may be spent by now, or it is removed
        if found.told(now_s) < 100:
            _tell(connection, found, found.spent(now_s), 100, now_s)


def spend(connection: Connection, charged: Mapping[tuple[str, str], int], now_s: float | None = None) -> None:
    """Count what was charged, by user and key, and tell when 80 and 100 % of a budget are reached."""
    found = _budgets_of_all(connection, {user_id for user_id, _ in charged})
    if not found:
        return
    roots = roots_of(connection, {key_id for _, key_id in charged})
    sums: dict[tuple[str, str], int] = {}
    for (user_id, key_id), amount in charged.items():
        for subject in {"", roots.get(key_id, key_id)}:
            sums[(user_id, subject)] = sums.get((user_id, subject), 0) + amount
    for budget in found:
        if amount := sums.get((budget.user_id, budget.key_id), 0):
            _count(connection, budget, amount, time.time() if now_s is None else now_s)


def _count(connection: Connection, budget: Budget, amount: int, now_s: float) -> None:
    spent = budget.spent(now_s) + amount
    percent = spent * 100 // budget.limit_nanousd
    _tell(connection, budget, spent, max((each for each in TOLD_PERCENT if percent >= each), default=0), now_s)


def _tell(connection: Connection, budget: Budget, spent: int, percent: int, now_s: float) -> None:
    """Store what was spent; record an event if a percentage is reached that was not told yet."""
    told = budget.told(now_s)
    values = {"window_number": budget.number(now_s), "spent_nanousd": spent, "told_percent": max(told, percent)}
    connection.execute(update(budgets).where(_column.id == budget.id).values(**values))
    if percent > told:
        name = "budget.exceeded" if percent == 100 else "budget.warning"
        record(connection, name, budget.user_id, _data(budget, spent, percent, now_s))


def _data(budget: Budget, spent: int, percent: int, now_s: float) -> dict[str, Any]:
    return {
        "budget_id": budget.id,
        "key_id": budget.key_id,
        "window_s": budget.window_s,
        "window_ends_at": budget.ends_at(now_s).isoformat(),
        "limit": float(format_usd(budget.limit_nanousd)),
        "limit_nanousd": budget.limit_nanousd,
        "spent": float(format_usd(spent)),
        "spent_nanousd": spent,
        "percent": percent,
    }


def _outstanding(connection: Connection, budget: Budget) -> int:
    """Return what workers and rentals hold unspent, of the user or of the budget's keys."""
    owner = holds.c.owner
    is_counted = (
        owner.like(f"%{KEY_MARK}{budget.key_id}") if budget.key_id else owner.like("lease:%") | owner.like(f"{RENTAL}%")
    )
    chosen = (holds.c.state == "pending") & (holds.c.account_id == credit_account(budget.user_id)) & is_counted
    query = select(cast(func.coalesce(func.sum(holds.c.remaining_nanousd), 0), BigInteger)).where(chosen)
    return int(connection.scalar(query) or 0)


def _budgets(connection: Connection, chosen: ColumnElement[bool]) -> list[Budget]:
    query = select(budgets).where(chosen).order_by(_column.created_at, _column.id)
    return [Budget(**row._mapping) for row in connection.execute(query)]


def _budgets_of_all(connection: Connection, user_ids: Iterable[str]) -> list[Budget]:
    wanted = sorted(user_ids)
    starts = range(0, len(wanted), USERS_AT_ONCE)
    parts = (_budgets(connection, _column.user_id.in_(wanted[at : at + USERS_AT_ONCE])) for at in starts)
    return [budget for part in parts for budget in part]


def _root(connection: Connection, user_id: str, key_id: str) -> str:
    query = select(func.coalesce(api_keys.c.root_id, api_keys.c.id))
    root = connection.scalar(query.where(api_keys.c.id == key_id, api_keys.c.user_id == user_id))
    if root is None:
        raise GatewayError("NOT_FOUND", f"no key {key_id!r} in this account")
    return str(root)


def roots_of(connection: Connection, key_ids: Iterable[str]) -> dict[str, str]:
    """Return the root of those keys that are not their own."""
    wanted = sorted(key_ids)
    found: dict[str, str] = {}
    for at in range(0, len(wanted), USERS_AT_ONCE):
        chosen = and_(api_keys.c.id.in_(wanted[at : at + USERS_AT_ONCE]), api_keys.c.root_id.is_not(None))
        found |= {
            row.id: row.root_id for row in connection.execute(select(api_keys.c.id, api_keys.c.root_id).where(chosen))
        }
    return found


def _check_count(connection: Connection, user_id: str) -> None:
    lock_user(connection, user_id)
    counted = connection.scalar(select(func.count()).select_from(budgets).where(_column.user_id == user_id))
    if (counted or 0) >= BUDGETS_MAX:
        raise GatewayError("CONFLICT", f"there are {BUDGETS_MAX} budgets already; remove those that are not used")
