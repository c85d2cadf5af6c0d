"""Money that goes back: refunds ordered here, refunds made at the provider's, disputes.

What goes back comes out of the customer's credit. A refund ordered here takes it before the provider is asked, so that
it cannot be spent meanwhile, and is refused if it is not there. What a provider took by itself is gone: of that the
customer's credit bears what there is, the rest is written off. Either switches the customer's renewal off, or the
money would be charged again at once.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast
from uuid import uuid4

from msgspec import Struct
from sqlalchemy import Connection, Row, and_, func, select, update

from gpuproxy.billing import renewals
from gpuproxy.billing.cents import to_cents, to_nanousd
from gpuproxy.billing.payments import PAID, Payment, State, locked, move
from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.transfers import PAYMENTS, WRITE_OFF, Transfer, credit_account, insert_new, post
from gpuproxy.plugin import PaymentEvent, RefundOrder
from gpuproxy.store.schema import payment_reversals

ReversalKind = Literal["refund", "dispute"]
ReversalState = Literal["pending", "completed", "failed"]
MOVES: dict[ReversalState, tuple[ReversalState, ...]] = {
    "pending": ("completed", "failed"),
    "completed": ("failed",),  # a refund that came back, a dispute that was won
    "failed": (),
}
ASK_AGAIN = timedelta(seconds=60)

_column = payment_reversals.c


class Reversal(Struct, frozen=True):
    """Money that goes back: of ``amount``, ``taken`` came out of the customer's credit, the rest was written off."""

    id: str
    payment_id: str
    kind: ReversalKind
    state: ReversalState
    amount_nanousd: int
    taken_nanousd: int
    created_at: datetime
    reference: str = ""
    reason: str = ""
    attempts: int = 0
    due_at: datetime | None = None


def order_refund(
    connection: Connection, payment_id: str, amount_nanousd: int | None, reason: str, refund_id: str
) -> Reversal:
    """Take a refund out of the customer's credit, for the provider to carry out; the one of before if it is there.

    Raises GatewayError NOT_FOUND, UNPROCESSABLE for more than is left of the payment, CONFLICT for one that is not
    paid, INSUFFICIENT_CREDITS if the customer has spent it.
    """
    payment, account = locked(connection, payment_id)
    before = get(connection, refund_id)
    if before is not None:
        return before
    if payment.state not in PAID or not payment.left_nanousd:
        raise GatewayError("CONFLICT", f"payment {payment.id} is {payment.state}; there is nothing to refund")
    amount = payment.left_nanousd if amount_nanousd is None else amount_nanousd
    to_cents(amount)
    if amount > payment.left_nanousd:
        message = f"{format_usd(amount)} is more than the {format_usd(payment.left_nanousd)} left of the payment"
        raise GatewayError("UNPROCESSABLE", message, param="amount_usd")
    unspent = max(0, account.posted_nanousd - account.held_nanousd)  # an overdraft is ours
    if amount > unspent:
        message = f"the customer has {format_usd(unspent)} of it left; refund no more than that"
        raise GatewayError("INSUFFICIENT_CREDITS", message)
    due_at = datetime.now(UTC) + ASK_AGAIN
    wanted = Reversal(
        refund_id, payment.id, "refund", "pending", amount, amount, datetime.now(UTC), reason=reason, due_at=due_at
    )
    _take(connection, payment, wanted)
    return wanted


def settle_refund(
    connection: Connection, refund_id: str, state: ReversalState, reference: str, reason: str
) -> Reversal:
    """Note what became of a refund ordered here; one that failed is credited again. One that is settled stays."""
    known = get(connection, refund_id)
    if known is None:
        raise GatewayError("NOT_FOUND", f"no refund {refund_id!r}")
    payment, _ = locked(connection, known.payment_id)
    _settle(connection, payment, refund_id, state, reference, reason)
    return _got(connection, refund_id)


def take_back(connection: Connection, payment_id: str, event: PaymentEvent) -> Payment:
    """Take out of credit what a provider says has gone back, once."""
    payment, account = locked(connection, payment_id)
    known = _of_event(connection, payment, event)
    if known is not None:
        return _settle(connection, payment, known.id, "completed", event.reversal, "")
    amount = min(to_nanousd(event.amount_cents), payment.left_nanousd)
    taken = min(amount, account.free_nanousd)
    wanted = _new(payment, event, "completed", amount, taken)
    payment = _take(connection, payment, wanted)
    _tell(connection, payment, wanted)
    return payment


def give_again(connection: Connection, payment_id: str, event: PaymentEvent) -> Payment:
    """Credit again what a provider says has not gone back, or came back."""
    payment, _ = locked(connection, payment_id)
    known = _of_event(connection, payment, event)
    if known is not None:
        return _settle(connection, payment, known.id, "failed", event.reversal, event.reason)
    insert_new(connection, payment_reversals, _row(_new(payment, event, "failed", 0, 0)))  # told before it was taken
    return payment


def get(connection: Connection, reversal_id: str) -> Reversal | None:
    """Return a reversal, None if there is none."""
    row = connection.execute(select(payment_reversals).where(_column.id == reversal_id)).first()
    return _reversal(row) if row is not None else None


def as_order(payment: Payment, refund: Reversal) -> RefundOrder:
    """Return what the provider is asked to do."""
    return RefundOrder(refund.id, payment.id, payment.reference, to_cents(refund.amount_nanousd))


def is_any_due(connection: Connection, now: datetime) -> bool:
    """Tell whether `claim_due` would find something."""
    return connection.scalar(select(_column.id).where(_column.due_at <= now).limit(1)) is not None


def claim_due(connection: Connection, now: datetime, count_max: int) -> list[Reversal]:
    """Return refunds whose outcome is unknown and which this process is to ask for again."""
    query = select(payment_reversals).where(_column.due_at <= now).order_by(_column.due_at).limit(count_max)
    return [refund for row in connection.execute(query).all() if _postponed(connection, refund := _reversal(row), now)]


def _postponed(connection: Connection, refund: Reversal, now: datetime) -> bool:
    """Move a refund's next attempt into the future; False if somebody was faster."""
    pause = ASK_AGAIN * 2 ** min(refund.attempts, 6)
    is_same = and_(_column.id == refund.id, _column.due_at == refund.due_at)
    values = {"due_at": now + pause, "attempts": refund.attempts + 1}
    return connection.execute(update(payment_reversals).where(is_same).values(**values)).rowcount == 1


def give_up(connection: Connection, refund: Reversal, reason: str) -> None:
    """Ask no more for a refund that nobody knows the outcome of; a webhook may still settle it."""
    connection.execute(update(payment_reversals).where(_column.id == refund.id).values(due_at=None, reason=reason))


def _new(payment: Payment, event: PaymentEvent, state: ReversalState, amount: int, taken: int) -> Reversal:
    kind: ReversalKind = "dispute" if event.kind in ("disputed", "dispute_won") else "refund"
    reversal_id, now = event.refund_id or f"re_{uuid4().hex}", datetime.now(UTC)
    return Reversal(reversal_id, payment.id, kind, state, amount, taken, now, event.reversal, event.reason[:200])


def _of_event(connection: Connection, payment: Payment, event: PaymentEvent) -> Reversal | None:
    is_meant = _column.id == event.refund_id if event.refund_id else _column.reference == event.reversal
    query = select(payment_reversals).where(_column.payment_id == payment.id, is_meant)
    row = connection.execute(query.limit(1)).first()
    return _reversal(row) if row is not None else None


def _take(connection: Connection, payment: Payment, wanted: Reversal) -> Payment:
    """Store a reversal and post it: out of credit, and out of our own what credit does not bear."""
    insert_new(connection, payment_reversals, _row(wanted))
    renewals.switch_off(connection, payment.user_id, f"a {wanted.kind} took credit back; agree to renewal anew")
    own, key = credit_account(payment.user_id), f"reversal:{wanted.id}"
    rest = wanted.amount_nanousd - wanted.taken_nanousd
    _post(
        connection,
        Transfer(own, PAYMENTS, wanted.taken_nanousd, wanted.kind, key),
        Transfer(WRITE_OFF, PAYMENTS, rest, wanted.kind, f"{key}:write_off"),
    )
    return _recount(connection, payment, wanted.amount_nanousd)


def _settle(
    connection: Connection, payment: Payment, reversal_id: str, state: ReversalState, reference: str, reason: str
) -> Payment:
    """Bring a reversal of a locked payment into another state; a move that is not legal was made before."""
    known = _got(connection, reversal_id)
    if state not in MOVES[known.state] and not (state == known.state == "pending"):
        return payment
    values: dict[str, Any] = {"state": state, "reference": reference or known.reference, "reason": reason[:200]}
    values["due_at"] = None if reference or state != "pending" else known.due_at
    connection.execute(update(payment_reversals).where(_column.id == reversal_id).values(**values))
    if state == "failed":
        return _restore(connection, payment, known)
    if state == "completed":
        _tell(connection, payment, known)
    return payment


def _restore(connection: Connection, payment: Payment, known: Reversal) -> Payment:
    own, key = credit_account(payment.user_id), f"restored:{known.id}"
    rest = known.amount_nanousd - known.taken_nanousd
    _post(
        connection,
        Transfer(PAYMENTS, own, known.taken_nanousd, f"{known.kind}_undone", key),
        Transfer(PAYMENTS, WRITE_OFF, rest, f"{known.kind}_undone", f"{key}:write_off"),
    )
    return _recount(connection, payment, -known.amount_nanousd)


def _recount(connection: Connection, payment: Payment, change_nanousd: int) -> Payment:
    refunded = payment.refunded_nanousd + change_nanousd
    is_disputed = connection.scalar(
        select(func.count()).where(
            _column.payment_id == payment.id, _column.kind == "dispute", _column.state == "completed"
        )
    )
    state = _state_of(payment, refunded, bool(is_disputed))
    return move(connection, payment, state, refunded_nanousd=refunded)


def _state_of(payment: Payment, refunded_nanousd: int, is_disputed: bool) -> State:
    if is_disputed:
        return "disputed"
    if not refunded_nanousd:
        return "completed"
    return "refunded" if refunded_nanousd == payment.paid_nanousd else "partly_refunded"


def _tell(connection: Connection, payment: Payment, reversal: Reversal) -> None:
    data = {
        "payment_id": payment.id,
        "provider": payment.provider,
        "refund_id": reversal.id,
        "kind": reversal.kind,
        "amount_usd": format_usd(reversal.amount_nanousd),
        "currency": "usd",
    }
    record(connection, "payment.refunded", payment.user_id, data)


def _post(connection: Connection, *wanted: Transfer) -> None:
    post(connection, _over_nothing(wanted))


def _over_nothing(wanted: Iterable[Transfer]) -> list[Transfer]:
    return [each for each in wanted if each.amount_nanousd]


def _got(connection: Connection, reversal_id: str) -> Reversal:
    known = get(connection, reversal_id)
    assert known is not None  # reversals are never deleted
    return known


def _row(reversal: Reversal) -> dict[str, Any]:
    return {name: getattr(reversal, name) for name in reversal.__struct_fields__}


def _reversal(row: Row[Any]) -> Reversal:
    return Reversal(**cast(dict[str, Any], row._mapping))
