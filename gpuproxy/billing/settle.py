"""What a provider told becomes credit, exactly once: however often, in whatever order, on however many nodes it comes.

Three things each suffice for that: an event's id is stored with its effect; a payment is credited only on its way out
of ``pending`` or ``failed``, under the lock of its customer's account; the transfer's key is the payment's id.

An event may name a payment by the provider's reference before we know that reference: a refund can be told before the
success. Such events wait in the table until the success brings the reference. Whoever lets one wait holds the lock
that all successes need, so none passes between the look for its payment and the wait.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, and_, delete, select, update

from gpuproxy.billing import renewals, reversals
from gpuproxy.billing.cents import to_nanousd
from gpuproxy.billing.payments import Payment, find, get, locked, move
from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.transfers import PAYMENTS, Transfer, credit_account, insert_new, lock_made, post
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import PaymentEvent
from gpuproxy.store.schema import payment_events

WAITING_MAX = timedelta(days=30)  # providers tell again for days, not weeks; then it concerned somebody else
REASON_CHARACTERS_MAX = 200

logger = get_logger(__name__)


def take(connection: Connection, provider: str, event: PaymentEvent) -> bool:
    """Do what an event asks for; False if it was done before or concerns no payment of ours.

    Raises GatewayError UNPROCESSABLE for a currency other than usd.
    """
    known = _payment_of(connection, provider, event)
    if known is None:
        return _keep_waiting(connection, provider, event)
    _check_currency(event)
    payment, _ = locked(connection, known.id)
    if not _store(connection, provider, event, payment.id):
        return False
    _apply(connection, payment, event)
    return True


def complete(connection: Connection, payment: Payment, paid_nanousd: int, reference: str) -> Payment:
    """Credit a locked payment that has succeeded; one that was credited before stays as it is."""
    if payment.state not in ("pending", "failed"):
        return payment
    given = Transfer(PAYMENTS, credit_account(payment.user_id), paid_nanousd, "payment", f"payment:{payment.id}")
    post(connection, [given])
    values = {"paid_nanousd": paid_nanousd, "reference": reference or payment.reference, "reason": "", "due_at": None}
    payment = move(connection, payment, "completed", completed_at=datetime.now(UTC), **values)
    record(connection, "payment.completed", payment.user_id, told(payment, paid_nanousd))
    if payment.kind == "renewal":
        renewals.note_success(connection, payment)
        record(connection, "subscription.renewed", payment.user_id, told(payment, paid_nanousd))
    return _take_waiting(connection, payment)


def fail(connection: Connection, payment: Payment, reason: str) -> Payment:
    """Close a locked payment that will not come; only one that is pending changes."""
    if payment.state != "pending":
        return payment
    payment = move(connection, payment, "failed", reason=reason[:REASON_CHARACTERS_MAX], due_at=None)
    data = {**told(payment, payment.amount_nanousd), "reason": payment.reason}
    record(connection, "payment.failed", payment.user_id, data)
    if payment.kind == "renewal":
        renewals.note_failure(connection, payment)
    return payment


def told(payment: Payment, amount_nanousd: int) -> dict[str, str]:
    """Return what an event says of a payment."""
    return {
        "payment_id": payment.id,
        "provider": payment.provider,
        "kind": payment.kind,
        "amount_usd": format_usd(amount_nanousd),
        "currency": "usd",
    }


def forget_waiting(connection: Connection, now: datetime) -> int:
    """Drop events that found no payment for long; return how many."""
    is_old = and_(payment_events.c.payment_id.is_(None), payment_events.c.at < now - WAITING_MAX)
    return connection.execute(delete(payment_events).where(is_old)).rowcount


def _check_currency(event: PaymentEvent) -> None:
    if event.kind not in ("failed", "noted") and event.currency != "usd":
        message = f"payment event {event.id} is in {event.currency[:8]!r}; only usd is taken, set the provider to it"
        raise GatewayError("UNPROCESSABLE", message, param="currency")


def _payment_of(connection: Connection, provider: str, event: PaymentEvent) -> Payment | None:
    payment = get(connection, event.payment_id) if event.payment_id else None
    if payment is None or payment.provider != provider:
        payment = find(connection, provider, event.reference)
    return payment


def _keep_waiting(connection: Connection, provider: str, event: PaymentEvent) -> bool:
    """Store what takes money back; a success that names no payment of ours is somebody else's."""
    if not (event.reversal and event.reference and event.currency == "usd"):
        logger.info("payment event concerns nothing here", provider=provider, id=event.id, kind=event.kind)
        return False
    with connection.begin_nested() as nested:
        lock_made(connection, [PAYMENTS])
        if _payment_of(connection, provider, event) is None:
            _store(connection, provider, event, None)
            return False
        nested.rollback()  # and with it the lock, which comes after those of customers
    return take(connection, provider, event)


def _store(connection: Connection, provider: str, event: PaymentEvent, payment_id: str | None) -> bool:
    row = {
        "provider": provider,
        "id": event.id,
        "payment_id": payment_id,
        "reference": event.reference,
        "content": msgspec.to_builtins(event),
        "at": datetime.now(UTC),
    }
    if insert_new(connection, payment_events, row):
        return True
    if payment_id is None:
        return False
    return _claim(connection, provider, event.id, payment_id)


def _claim(connection: Connection, provider: str, event_id: str, payment_id: str) -> bool:
    """Take an event that waited; False if it was taken before."""
    waits = and_(
        payment_events.c.provider == provider, payment_events.c.id == event_id, payment_events.c.payment_id.is_(None)
    )
    return connection.execute(update(payment_events).where(waits).values(payment_id=payment_id)).rowcount == 1


def _take_waiting(connection: Connection, payment: Payment) -> Payment:
    waits = and_(
        payment_events.c.provider == payment.provider,
        payment_events.c.reference == payment.reference,
        payment_events.c.payment_id.is_(None),
    )
    query = select(payment_events.c.id, payment_events.c.content).where(waits).order_by(payment_events.c.at)
    for row in connection.execute(query).all():
        if _claim(connection, payment.provider, row.id, payment.id):
            payment = _apply(connection, payment, _event(row.content))
    return payment


def _event(content: Mapping[str, Any]) -> PaymentEvent:
    return msgspec.convert(content, PaymentEvent)


def _apply(connection: Connection, payment: Payment, event: PaymentEvent) -> Payment:
    if event.saved_method:
        renewals.save_method(connection, payment, event.saved_method)
    amount = to_nanousd(event.amount_cents)
    match event.kind:
        case "completed":
            return complete(connection, payment, amount, event.reference)
        case "failed":
            return fail(connection, payment, event.reason)
        case "refunded" | "disputed":  # what can go back has come: the news of that is late
            payment = complete(connection, payment, payment.amount_nanousd, event.reference)
            return reversals.take_back(connection, payment.id, event)
        case "refund_failed" | "dispute_won":
            payment = complete(connection, payment, payment.amount_nanousd, event.reference)
            return reversals.give_again(connection, payment.id, event)
        case "noted":
            return payment
