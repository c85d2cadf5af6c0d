"""Payments as they are stored, and the moves their state may make.

Functions are synchronous and work inside the caller's writing transaction. Whoever changes a payment locks its
customer's credit account first (`locked`), as everything that moves money does; so none waits in a circle.
"""

from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import Connection, Row, and_, or_, select, update

from gpuproxy.errors import GatewayError
from gpuproxy.ledger.transfers import PAYMENTS, WRITE_OFF, Account, credit_account, insert_new, lock_made
from gpuproxy.store.schema import payments

Kind = Literal["checkout", "renewal"]
State = Literal["pending", "completed", "failed", "partly_refunded", "refunded", "disputed"]
PAID: tuple[State, ...] = ("completed", "partly_refunded", "refunded", "disputed")
MOVES: dict[State, tuple[State, ...]] = {
    "pending": ("completed", "failed"),
    "failed": ("completed",),  # the money came after all: it is the customer's
    "completed": ("partly_refunded", "refunded", "disputed"),
    "partly_refunded": ("completed", "refunded", "disputed"),  # back when a refund fails or a dispute is won
    "refunded": ("completed", "partly_refunded", "disputed"),
    "disputed": ("completed", "partly_refunded", "refunded"),
}
ROWS_MAX = 1_000


class Payment(Struct, frozen=True):
    """Money asked for: of ``amount``, ``paid`` came in, and ``refunded`` of that went back."""

    id: str
    user_id: str
    provider: str
    kind: Kind
    state: State
    amount_nanousd: int
    created_at: datetime
    paid_nanousd: int = 0
    refunded_nanousd: int = 0
    reference: str = ""
    checkout_url: str = ""
    instructions: str = ""
    reason: str = ""
    attempts: int = 0
    due_at: datetime | None = None
    completed_at: datetime | None = None

    @property
    def left_nanousd(self) -> int:
        """Return what came in and has not gone back."""
        return self.paid_nanousd - self.refunded_nanousd


def new_payment(user_id: str, provider: str, kind: Kind, amount_nanousd: int, payment_id: str = "") -> Payment:
    """Return a payment that is not stored yet."""
    wanted_id = payment_id or f"pay_{uuid4().hex}"
    return Payment(wanted_id, user_id, provider, kind, "pending", amount_nanousd, datetime.now(UTC))


def add(connection: Connection, payment: Payment) -> bool:
    """Store a payment; False if it is there, or another renewal of this customer is pending."""
    return insert_new(connection, payments, {name: getattr(payment, name) for name in payment.__struct_fields__})


def get(connection: Connection, payment_id: str) -> Payment | None:
    """Return a payment, None if there is none."""
    row = connection.execute(select(payments).where(payments.c.id == payment_id)).first()
    return _payment(row) if row is not None else None


def find(connection: Connection, provider: str, reference: str) -> Payment | None:
    """Return the payment that the provider calls so."""
    named = and_(payments.c.provider == provider, payments.c.reference == reference)
    row = connection.execute(select(payments).where(named).limit(1)).first() if reference else None
    return _payment(row) if row is not None else None


def locked(connection: Connection, payment_id: str) -> tuple[Payment, Account]:
    """Return a payment and its customer's account, as nobody else changes them now. Raises GatewayError NOT_FOUND."""
    known = get(connection, payment_id)
    if known is None:
        raise GatewayError("NOT_FOUND", f"no payment {payment_id!r}")
    account = lock_customer(connection, known.user_id)
    payment = get(connection, payment_id)
    assert payment is not None  # payments are never deleted
    return payment, account


def lock_customer(connection: Connection, user_id: str) -> Account:
    """Lock everything that a payment of this customer touches; return their account."""
    own = credit_account(user_id)
    return lock_made(connection, (own, PAYMENTS, WRITE_OFF))[own]


def move(connection: Connection, payment: Payment, state: State, **values: Any) -> Payment:
    """Bring a locked payment into another state, and set `values`. Raises GatewayError CONFLICT for an illegal move."""
    if state != payment.state and state not in MOVES[payment.state]:
        raise GatewayError("CONFLICT", f"payment {payment.id} is {payment.state} and cannot become {state}")
    statement = update(payments).where(payments.c.id == payment.id).values(state=state, **values)
    connection.execute(statement)
    moved = get(connection, payment.id)
    assert moved is not None
    return moved


def payments_of(connection: Connection, user_id: str, limit: int = 100, cursor: str = "") -> list[Payment]:
    """Return a customer's newest payments, newest first, from behind the one with the id `cursor`."""
    order = (payments.c.created_at, payments.c.id)
    query = select(payments).where(payments.c.user_id == user_id)
    if cursor:
        begin = select(payments.c.created_at).where(payments.c.id == cursor).scalar_subquery()
        query = query.where(or_(order[0] < begin, and_(order[0] == begin, order[1] < cursor)))
    query = query.order_by(order[0].desc(), order[1].desc()).limit(min(limit, ROWS_MAX))
    return [_payment(row) for row in connection.execute(query)]


def _payment(row: Row[Any]) -> Payment:
    return Payment(**cast(dict[str, Any], row._mapping))
