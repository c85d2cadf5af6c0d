"""Paying for credit: ``/api/v1/billing/…``."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

from aiohttp import web
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from sqlalchemy import Connection, and_, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.audit import note
from gpuproxy.billing import payments, renewals, reversals
from gpuproxy.billing.cents import to_cents
from gpuproxy.billing.payments import Payment, locked, new_payment
from gpuproxy.billing.reversals import Reversal
from gpuproxy.billing.settle import complete, fail
from gpuproxy.control.money import GivenUsd, Usd, nanousd_given, usd
from gpuproxy.control.once import once, once_calling
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.paying import CASHIER, PAYMENTS
from gpuproxy.control.query import page_asked
from gpuproxy.control.respond import page_of
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd
from gpuproxy.plugin import Checkout, Order, PaymentProvider
from gpuproxy.store import schema
from gpuproxy.store.locks import lock_user

PENDING_MAX = 100  # payments one customer may leave unpaid

ProviderName = Annotated[str, Meta(max_length=64, description="may be left out where there is one")]


class NewCheckout(Struct, forbid_unknown_fields=True):
    """Credit to be paid for: `amount_usd`, or `amount`, which is the same. `save_method` keeps the way of paying."""

    amount_usd: GivenUsd | UnsetType = UNSET
    amount: GivenUsd | UnsetType = UNSET
    provider: ProviderName = ""
    currency: Annotated[str, Meta(max_length=8)] = "usd"
    save_method: bool = False


class PaymentInfo(Struct):
    """A payment: pay it at `checkout_url` or as `instructions` say. Credit comes when it is completed."""

    id: str
    provider: str
    kind: str
    state: str
    amount_usd: Usd
    paid_usd: Usd
    refunded_usd: Usd
    currency: str
    checkout_url: str
    instructions: str
    reason: str
    created_at: datetime
    completed_at: datetime | None


class NewRefund(Struct, forbid_unknown_fields=True):
    """A payment to give back; all that is left of it unless `amount_usd` says how much."""

    payment_id: Annotated[str, Meta(max_length=64)]
    amount_usd: GivenUsd | UnsetType = UNSET
    reason: Annotated[str, Meta(max_length=200)] = ""


class RefundInfo(Struct):
    """A refund. A pending one has left the customer's credit; the provider is still to say what became of it."""

    id: str
    payment_id: str
    state: str
    amount_usd: Usd
    reason: str
    created_at: datetime


class Confirmation(Struct, forbid_unknown_fields=True):
    """Whether the money came, and how much if it was not what was asked for."""

    is_received: bool = True
    amount_usd: GivenUsd | UnsetType = UNSET
    reason: Annotated[str, Meta(max_length=200)] = ""


async def checkout(request: web.Request, body: NewCheckout) -> web.Response:
    """Begin to pay for credit."""
    provider = provider_named(request.app[PAYMENTS], body.provider)
    amount = _amount_of(body)
    check_amount(provider, amount, "amount_usd")
    caller, store = request[CALLER], request.app[STORE]

    async def calls(seed: str) -> PaymentInfo:
        wanted = new_payment(caller.user_id, provider.name, "checkout", amount, f"pay_{seed}")
        async with store.writing() as connection:
            payment, saved = await connection.run_sync(_begun, wanted)
        order = Order(payment.id, caller.user_id, caller.email, to_cents(amount), body.save_method, saved)
        offered = await provider.checkout(order)
        async with store.writing() as connection:
            return info(await connection.run_sync(_offered, payment.id, offered))

    return await once_calling(request, body, 201, calls)


async def list_payments(request: web.Request) -> web.Response:
    """List the caller's payments, newest first."""
    page = page_asked(request)
    async with request.app[STORE].reading() as connection:
        found = await connection.run_sync(payments.payments_of, request[CALLER].user_id, page.limit, page.cursor)
    return page_of([info(payment) for payment in found], page.limit)


async def refund(request: web.Request, body: NewRefund) -> web.Response:
    """Give a payment back, in whole or in part, out of the customer's credit."""
    caller, store, cashier = request[CALLER], request.app[STORE], request.app[CASHIER]
    amount = amount_given(body.amount_usd, "amount_usd")

    async def calls(seed: str) -> RefundInfo:
        async with store.writing() as connection:
            ordered = await connection.run_sync(
                reversals.order_refund, body.payment_id, amount, body.reason, f"re_{seed}"
            )
            detail = {"refund_id": ordered.id, "amount_usd": format_usd(ordered.amount_nanousd), "reason": body.reason}
            await note(connection, caller, "payment.refund", body.payment_id, detail)
        if ordered.state == "pending":
            ordered = await cashier.refund(ordered)
        return refund_info(ordered)

    return await once_calling(request, body, 201, calls)


async def confirm(request: web.Request, body: Confirmation) -> web.Response:
    """Say whether a payment that is made by hand has come."""
    caller, payment_id = request[CALLER], request.match_info["id"]
    amount = amount_given(body.amount_usd, "amount_usd")
    by_hand = [name for name, provider in request.app[PAYMENTS].items() if provider.is_confirmed_by_hand]

    def confirmed(connection: Connection) -> Payment:
        payment, _ = locked(connection, payment_id)
        if payment.provider not in by_hand:
            raise GatewayError("CONFLICT", f"{payment.provider} tells by itself whether a payment came")
        if payment.state in payments.PAID or not (body.is_received or payment.state == "pending"):
            raise GatewayError("CONFLICT", f"the payment is {payment.state} already")
        if not body.is_received:
            return fail(connection, payment, body.reason or "no money came")
        return complete(connection, payment, amount or payment.amount_nanousd, payment.reference)

    async def work(connection: AsyncConnection) -> PaymentInfo:
        payment = await connection.run_sync(confirmed)
        detail = {"state": payment.state, "paid_usd": format_usd(payment.paid_nanousd), "reason": body.reason}
        await note(connection, caller, "payment.confirm", payment_id, detail)
        return info(payment)

    return await once(request, body, 200, work)


def provider_named(providers: Mapping[str, PaymentProvider], name: str) -> PaymentProvider:
    """Return the provider asked for, or the only one. Raises GatewayError."""
    if not providers:
        raise GatewayError("NOT_FOUND", "no payment provider is configured; the operator adds [[payments]]")
    wanted = name or (next(iter(providers)) if len(providers) == 1 else "")
    if wanted not in providers:
        message = f"no payment provider {name[:64]!r}; known: {', '.join(sorted(providers))}"
        raise GatewayError("UNPROCESSABLE", message, param="provider")
    return providers[wanted]


def amount_given(given: Raw | UnsetType, name: str) -> int | None:
    """Return an amount of dollars in nanodollars, None if it is left out. Raises GatewayError, naming the field."""
    return None if given is UNSET else nanousd_given(given, name)


def check_amount(provider: PaymentProvider, amount_nanousd: int, name: str) -> None:
    """Raise GatewayError UNPROCESSABLE for an amount the provider does not take."""
    least, most = provider.amount_cents_min, provider.amount_cents_max
    if not least <= to_cents(amount_nanousd) <= most:
        bounds = f"{least // 100}.{least % 100:02} to {most // 100}.{most % 100:02}"
        message = f"{name}: {format_usd(amount_nanousd)} is out of range; {provider.name} takes {bounds} dollars"
        raise GatewayError("UNPROCESSABLE", message, param=name)


def info(payment: Payment) -> PaymentInfo:
    """Return what is shown of a payment."""
    return PaymentInfo(
        payment.id,
        payment.provider,
        payment.kind,
        payment.state,
        usd(payment.amount_nanousd),
        usd(payment.paid_nanousd),
        usd(payment.refunded_nanousd),
        "usd",
        payment.checkout_url,
        payment.instructions,
        payment.reason,
        payment.created_at,
        payment.completed_at,
    )


def refund_info(refund: Reversal) -> RefundInfo:
    """Return what is shown of a refund."""
    amount = usd(refund.amount_nanousd)
    return RefundInfo(refund.id, refund.payment_id, refund.state, amount, refund.reason, refund.created_at)


def _amount_of(body: NewCheckout) -> int:
    given = [value for value in (body.amount_usd, body.amount) if value is not UNSET]
    if len(given) != 1:
        raise GatewayError("UNPROCESSABLE", "write amount_usd, the dollars to pay, once", param="amount_usd")
    if body.currency.lower() != "usd":
        raise GatewayError("UNPROCESSABLE", f"currency {body.currency!r} is not taken; pay in usd", param="currency")
    return nanousd_given(given[0], "amount_usd")


def _begun(connection: Connection, wanted: Payment) -> tuple[Payment, str]:
    """Store a payment, or find the one of before; return it and the customer's saved method."""
    lock_user(connection, wanted.user_id)
    pending = and_(schema.payments.c.user_id == wanted.user_id, schema.payments.c.state == "pending")
    count = connection.scalar(select(func.count()).select_from(schema.payments).where(pending)) or 0
    if count >= PENDING_MAX:
        message = f"{count} payments wait to be paid; pay or leave them to end"
        raise GatewayError("RATE_LIMITED", message, retry_after_s=3_600)
    payment = wanted if payments.add(connection, wanted) else payments.get(connection, wanted.id)
    assert payment is not None  # or it could have been added
    same = ("user_id", "provider", "amount_nanousd")
    if any(getattr(payment, name) != getattr(wanted, name) for name in same):
        raise GatewayError("CONFLICT", "this Idempotency-Key was used for another payment; take a new one")
    return payment, renewals.saved_method(connection, wanted.user_id, wanted.provider)


def _offered(connection: Connection, payment_id: str, offered: Checkout) -> Payment:
    """Note how to pay; a payment that was faster keeps the reference it has."""
    values = {"checkout_url": offered.url, "instructions": offered.instructions}
    is_it = schema.payments.c.id == payment_id
    connection.execute(update(schema.payments).where(is_it).values(**values))
    is_new = and_(is_it, schema.payments.c.reference == "")
    connection.execute(update(schema.payments).where(is_new).values(reference=offered.reference))
    payment = payments.get(connection, payment_id)
    assert payment is not None  # it was stored before the provider was asked
    return payment
