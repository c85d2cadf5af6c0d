"""Credit that renews itself: what customers have agreed to, and whom to charge now.

Nobody is charged twice for one shortfall: the intent is stored before the provider is asked, under the lock of the
customer's account and only while none is pending (the database has an index for that); the credit comes in the
transaction that ends the intent, so there is no moment with neither.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from msgspec import Struct
from sqlalchemy import BigInteger, Connection, and_, exists, func, or_, select, update
from sqlalchemy import cast as sql_cast

from gpuproxy.billing.payments import Payment, add, lock_customer, new_payment
from gpuproxy.events.outbox import record
from gpuproxy.ledger.transfers import CREDIT, insert_new
from gpuproxy.store.schema import accounts, auto_renewals, payment_methods, payments, users

BACKOFF = timedelta(hours=1)  # doubled with each failure: card networks punish who tries a dead card often
BACKOFF_MAX = timedelta(hours=24)
FAILURES_MAX = 8
ASK_AGAIN = timedelta(seconds=60)  # longer than a call to a provider takes

_column = auto_renewals.c


class Renewal(Struct, frozen=True):
    """What a customer agreed to: below ``threshold`` add ``amount``, in a month no more than ``monthly_cap``.

    `reason` says why the last one did not happen; after FAILURES_MAX failures it is switched off.
    """

    user_id: str
    provider: str = ""
    is_enabled: bool = False
    threshold_nanousd: int = 0
    amount_nanousd: int = 0
    monthly_cap_nanousd: int = 0
    failures: int = 0
    next_attempt_at: datetime | None = None
    reason: str = ""


def get(connection: Connection, user_id: str) -> Renewal:
    """Return what the customer agreed to; nothing, if nothing."""
    columns = [_column[name] for name in Renewal.__struct_fields__]
    row = connection.execute(select(*columns).where(_column.user_id == user_id)).first()
    return Renewal(**cast(dict[str, Any], row._mapping)) if row is not None else Renewal(user_id)


def put(connection: Connection, wished: Renewal) -> None:
    """Store what the customer agrees to; failures of before are forgotten."""
    row = {name: getattr(wished, name) for name in wished.__struct_fields__} | {"updated_at": datetime.now(UTC)}
    if not insert_new(connection, auto_renewals, row):
        connection.execute(update(auto_renewals).where(_column.user_id == wished.user_id).values(**row))


def save_method(connection: Connection, payment: Payment, method: str) -> None:
    """Remember how this customer can be charged while away."""
    key = {"user_id": payment.user_id, "provider": payment.provider}
    row = {"method": method, "saved_at": datetime.now(UTC)}
    if not insert_new(connection, payment_methods, {**key, **row}):
        is_theirs = and_(*(payment_methods.c[name] == value for name, value in key.items()))
        connection.execute(update(payment_methods).where(is_theirs).values(**row))


def saved_method(connection: Connection, user_id: str, provider: str) -> str:
    """Return how this customer can be charged while away, "" if they cannot."""
    is_theirs = and_(payment_methods.c.user_id == user_id, payment_methods.c.provider == provider)
    return connection.scalar(select(payment_methods.c.method).where(is_theirs)) or ""


def short_of_credit(connection: Connection, now: datetime, count_max: int) -> list[str]:
    """Return customers who are under their threshold and may be charged."""
    is_pending = exists().where(
        payments.c.user_id == _column.user_id, payments.c.kind == "renewal", payments.c.state == "pending"
    )
    free = func.coalesce(accounts.c.posted_nanousd - accounts.c.held_nanousd, 0)
    is_theirs = and_(accounts.c.owner_user_id == _column.user_id, accounts.c.kind == CREDIT)
    joined = auto_renewals.join(users, users.c.id == _column.user_id).outerjoin(accounts, is_theirs)
    is_due = and_(_column.is_enabled, users.c.is_active, _is_rested(now), free < _column.threshold_nanousd, ~is_pending)
    query = select(_column.user_id).select_from(joined).where(is_due).order_by(_column.user_id).limit(count_max)
    return list(connection.scalars(query))


def intend(connection: Connection, user_id: str, now: datetime) -> Payment | None:
    """Store that the customer is to be charged; None if they need not, may not, or are being charged already."""
    account = lock_customer(connection, user_id)
    wished = get(connection, user_id)
    is_rested = wished.next_attempt_at is None or wished.next_attempt_at <= now
    if not (wished.is_enabled and is_rested):
        return None
    if account.posted_nanousd - account.held_nanousd >= wished.threshold_nanousd:
        return None
    if not saved_method(connection, user_id, wished.provider):
        switch_off(connection, user_id, "no way of paying is saved; pay once with save_method")
        return None
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if _charged_since(connection, user_id, month) + wished.amount_nanousd > wished.monthly_cap_nanousd:
        next_month = (month + timedelta(days=32)).replace(day=1)
        _note(connection, user_id, next_attempt_at=next_month, reason="the cap of this month is reached")
        return None
    payment = new_payment(user_id, wished.provider, "renewal", wished.amount_nanousd)
    payment = _due_later(payment, now)
    return payment if add(connection, payment) else None


def claim_due(connection: Connection, now: datetime, count_max: int) -> list[Payment]:
    """Return charges whose outcome is unknown and which this process is to ask for again."""
    query = select(payments).where(payments.c.due_at <= now).order_by(payments.c.due_at).limit(count_max)
    found = [Payment(**cast(dict[str, Any], row._mapping)) for row in connection.execute(query)]
    return [payment for payment in found if _postponed(connection, payment, now)]


def note_success(connection: Connection, payment: Payment) -> None:
    """Forget failures."""
    _note(connection, payment.user_id, failures=0, next_attempt_at=None, reason="")


def note_failure(connection: Connection, payment: Payment) -> None:
    """Wait longer before the next attempt; give up after FAILURES_MAX."""
    failures = get(connection, payment.user_id).failures + 1
    pause = min(BACKOFF * 2 ** min(failures - 1, 10), BACKOFF_MAX)
    values: dict[str, Any] = {"failures": failures, "next_attempt_at": datetime.now(UTC) + pause}
    _note(connection, payment.user_id, reason=payment.reason, **values)
    if failures >= FAILURES_MAX:
        switch_off(connection, payment.user_id, payment.reason)


def switch_off(connection: Connection, user_id: str, reason: str) -> None:
    """Charge this customer no more until they agree anew, and tell them, unless it was off; "": they wanted it."""
    is_on = and_(_column.user_id == user_id, _column.is_enabled)
    values = {"is_enabled": False, "reason": reason}
    provider = connection.scalar(update(auto_renewals).where(is_on).values(**values).returning(_column.provider))
    if provider is not None:
        told = {"provider": provider, "reason": reason or "you switched it off"}
        record(connection, "subscription.cancelled", user_id, told)


def _note(connection: Connection, user_id: str, **values: Any) -> None:
    connection.execute(update(auto_renewals).where(_column.user_id == user_id).values(**values))


def _is_rested(now: datetime) -> Any:
    return or_(_column.next_attempt_at.is_(None), _column.next_attempt_at <= now)


def _charged_since(connection: Connection, user_id: str, since: datetime) -> int:
    """Sum up renewals that came or may come."""
    is_theirs = and_(payments.c.user_id == user_id, payments.c.kind == "renewal", payments.c.state != "failed")
    total = sql_cast(func.coalesce(func.sum(payments.c.amount_nanousd), 0), BigInteger)
    return connection.scalar(select(total).where(is_theirs, payments.c.created_at >= since)) or 0


def _due_later(payment: Payment, now: datetime) -> Payment:
    """Let whoever finds it after a crash ask again."""
    fields = {name: getattr(payment, name) for name in payment.__struct_fields__}
    return Payment(**{**fields, "created_at": now, "due_at": now + ASK_AGAIN})


def _postponed(connection: Connection, payment: Payment, now: datetime) -> bool:
    """Move the next attempt into the future; False if somebody was faster."""
    pause = ASK_AGAIN * 2 ** min(payment.attempts, 6)
    is_same = and_(payments.c.id == payment.id, payments.c.state == "pending", payments.c.due_at == payment.due_at)
    values = {"due_at": now + pause, "attempts": payment.attempts + 1}
    return connection.execute(update(payments).where(is_same).values(**values)).rowcount == 1
