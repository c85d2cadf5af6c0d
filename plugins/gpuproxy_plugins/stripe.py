"""Stripe: Checkout for customers who pay, a saved card for those who are away, signed webhooks, refunds.

Speaks through Stripe's own SDK, which is imported when the provider is made: only control makes one. Metadata carries
our payment id to Stripe and back: on the session, and on the payment intent, whose events tell the most. Sources:
docs.stripe.com/api (checkout/sessions, payment_intents, refunds, idempotent_requests), docs.stripe.com/webhooks.
"""

import json
import time
from collections.abc import Awaitable, Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from gpuproxy.plugin import (
    Checkout,
    EventKind,
    GatewayError,
    Order,
    Outcome,
    PaymentEvent,
    PaymentProvider,
    PaymentSettings,
    PluginError,
    RefundOrder,
    Registry,
)

TIMEOUT_S = 10.0
RETRIES_MAX = 2  # with the same idempotency key; three time-outs and the pauses stay under 40 s
SIGNATURE_AGE_S_MAX = 300
SESSION_EVENTS: dict[str, EventKind] = {
    "checkout.session.completed": "completed",
    "checkout.session.async_payment_succeeded": "completed",
    "checkout.session.async_payment_failed": "failed",
    "checkout.session.expired": "failed",
}
INTENT_EVENTS: dict[str, EventKind] = {
    "payment_intent.succeeded": "completed",
    "payment_intent.payment_failed": "failed",
    "payment_intent.canceled": "failed",
}
REFUND_EVENTS = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
DISPUTE_EVENTS: dict[str, EventKind] = {
    "charge.dispute.funds_withdrawn": "disputed",
    "charge.dispute.funds_reinstated": "dispute_won",
}


class Stripe:
    """Takes money by Stripe."""

    name: str = "stripe"
    amount_cents_min: int = 50
    amount_cents_max: int = 99_999_999
    is_confirmed_by_hand: bool = False

    def __init__(self, settings: PaymentSettings) -> None:
        import stripe
        from aiohttp import ClientError

        _check(settings)
        self._sdk: Any = stripe  # whose types are of dictionaries nobody writes by name
        self._broken = (ClientError, OSError)
        self._secrets = settings.webhook_secrets
        self._return_url = settings.return_url
        self._http = self._sdk.AIOHTTPClient(timeout=TIMEOUT_S)
        self._client = self._sdk.StripeClient(
            settings.api_key,
            base_addresses={"api": settings.base_url.rstrip("/")} if settings.base_url else {},
            max_network_retries=RETRIES_MAX,
            http_client=self._http,
        )

    async def checkout(self, order: Order) -> Checkout:
        """Open a Checkout Session, where the customer pays on Stripe's page."""
        intent: dict[str, Any] = {"metadata": {"payment_id": order.payment_id, "by": "checkout"}}
        if order.is_to_save:
            intent["setup_future_usage"] = "off_session"
        params: dict[str, Any] = {
            "mode": "payment",
            "client_reference_id": order.payment_id,
            "metadata": {"payment_id": order.payment_id},
            "line_items": [{"quantity": 1, "price_data": _price(order.amount_cents)}],
            "payment_intent_data": intent,
            "success_url": self._back(order.payment_id, "success"),
            "cancel_url": self._back(order.payment_id, "cancel"),
            **_customer(order),
        }
        create = self._client.v1.checkout.sessions.create_async
        session = await self._asked(create(params, _once(order.payment_id)))
        return Checkout(session.id, session.url or "")

    async def charge_saved(self, order: Order) -> Outcome:
        """Charge the saved card with a payment intent, off session."""
        customer, _, method = order.saved_method.partition("/")
        params: dict[str, Any] = {
            "amount": order.amount_cents,
            "currency": "usd",
            "customer": customer,
            "payment_method": method,
            "off_session": True,
            "confirm": True,
            "metadata": {"payment_id": order.payment_id, "by": "renewal"},
        }
        create = self._client.v1.payment_intents.create_async
        try:
            intent = await self._asked(create(params, _once(order.payment_id)))
        except _RefusedError as refused:
            return Outcome("failed", refused.reference, refused.reason)
        if intent.status == "succeeded":
            return Outcome("completed", intent.id)
        if intent.status == "processing":
            return Outcome("pending", intent.id)
        return Outcome("failed", intent.id, f"the payment needs the customer: {intent.status}")

    async def refund(self, order: RefundOrder) -> Outcome:
        """Give back a payment intent, in whole or in part."""
        params: dict[str, Any] = {
            "payment_intent": order.reference,
            "amount": order.amount_cents,
            "metadata": {"payment_id": order.payment_id, "refund_id": order.refund_id},
        }
        create = self._client.v1.refunds.create_async
        try:
            refund = await self._asked(create(params, _once(order.refund_id)))
        except _RefusedError as refused:
            return Outcome("failed", refused.reference, refused.reason)
        if refund.status in ("failed", "canceled"):
            return Outcome("failed", refund.id, refund.failure_reason or f"the refund is {refund.status}")
        return Outcome("completed" if refund.status == "succeeded" else "pending", refund.id)

    def parse_webhook(self, headers: Mapping[str, str], body: bytes) -> list[PaymentEvent]:
        """Check the signature and read the event."""
        event = self._verified(headers.get("stripe-signature", ""), body)
        try:
            found = _read(event)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"the event {str(event.get('type'))[:60]!r} cannot be read: {type(error).__name__} {error}"
            raise GatewayError("UNPROCESSABLE", message) from error
        return [found] if found is not None else []

    async def close(self) -> None:
        """Close connections."""
        if self._http._cached_session is not None:  # close_async would open one to close it
            await self._http.close_async()

    def _back(self, payment_id: str, outcome: str) -> str:
        return f"{self._return_url}?payment_id={quote(payment_id)}&outcome={outcome}"

    def _verified(self, signature: str, body: bytes) -> dict[str, Any]:
        """Return the event if one of the secrets signed it within the last five minutes."""
        why = "no webhook secret is configured"
        for secret in self._secrets:
            try:
                self._sdk.Webhook.construct_event(body, signature, secret, SIGNATURE_AGE_S_MAX)
            except self._sdk.SignatureVerificationError as error:
                why = error.user_message or "it is wrong"
            except (ValueError, RecursionError, AttributeError, TypeError) as error:
                raise GatewayError("BAD_REQUEST", f"the body is no event: {type(error).__name__}") from error
            else:
                _check_is_past(signature)
                event: dict[str, Any] = json.loads(body)
                return event
        raise GatewayError("BAD_REQUEST", f"Stripe-Signature is not accepted: {why}", param="Stripe-Signature")

    async def _asked(self, call: Awaitable[Any]) -> Any:
        """Return Stripe's answer. Raises _RefusedError for a definite no, GatewayError for no sure outcome."""
        try:
            return await call
        except (self._sdk.CardError, self._sdk.InvalidRequestError) as error:
            raise _refused(error) from error
        except self._sdk.APIConnectionError as error:
            raise GatewayError("UPSTREAM_UNREACHABLE", "stripe cannot be reached or does not answer") from error
        except self._sdk.RateLimitError as error:
            raise GatewayError("UPSTREAM_BUSY", "stripe takes no more for now", retry_after_s=5) from error
        except self._sdk.StripeError as error:  # a key in use, a wrong credential, their fault
            raise GatewayError("UPSTREAM_INVALID", f"stripe: {_message(error)}") from error
        except self._broken as error:
            raise GatewayError("UPSTREAM_UNREACHABLE", "stripe broke off its answer") from error


class _RefusedError(GatewayError):
    """A definite no: no money moved."""

    def __init__(self, reason: str, reference: str) -> None:
        super().__init__("UNPROCESSABLE", f"stripe: {reason}")
        self.reason = reason
        self.reference = reference


def _refused(error: Any) -> _RefusedError:
    body: Any = error.json_body if isinstance(error.json_body, dict) else {}
    told = body.get("error") or {}
    code = told.get("decline_code") or told.get("code") or ""
    reason = f"{_message(error)} ({code})" if code else _message(error)
    intent = told.get("payment_intent") or {}
    return _RefusedError(reason, intent.get("id") or "")


def _message(error: Any) -> str:
    told: str = error.user_message or type(error).__name__
    return told.splitlines()[0][:200]


def _check(settings: PaymentSettings) -> None:
    lacking = {
        "api_key_env": settings.api_key,
        "webhook_secret_env": settings.webhook_secrets,
        "return_url": settings.return_url,
    }
    if missing := [name for name, value in lacking.items() if not value]:
        raise ValueError(f"stripe needs {', '.join(missing)}")
    if settings.options:
        raise ValueError(f"stripe has no options; take out {', '.join(sorted(settings.options))}")


def _check_is_past(signature: str) -> None:
    """Refuse a time in the future; the SDK looks at the past only."""
    signed_at_s = next(int(part[2:]) for part in signature.split(",") if part.startswith("t="))
    if signed_at_s > time.time() + SIGNATURE_AGE_S_MAX:
        raise GatewayError("BAD_REQUEST", "Stripe-Signature is of the future", param="Stripe-Signature")


def _once(key: str) -> Any:
    return {"idempotency_key": key}


def _price(amount_cents: int) -> dict[str, Any]:
    return {"currency": "usd", "unit_amount": amount_cents, "product_data": {"name": "Credit"}}


def _customer(order: Order) -> dict[str, str]:
    """Name the customer Stripe knows; else their address, and have one made if the card is to be saved."""
    if order.saved_method:
        return {"customer": order.saved_method.partition("/")[0]}
    made = {"customer_creation": "always"} if order.is_to_save else {}
    return {"customer_email": order.email, **made}


def _read(event: dict[str, Any]) -> PaymentEvent | None:
    kind, thing = event["type"], event["data"]["object"]
    if kind in SESSION_EVENTS:
        return _read_session(event["id"], SESSION_EVENTS[kind], thing)
    if kind in INTENT_EVENTS:
        return _read_intent(event["id"], INTENT_EVENTS[kind], thing)
    if kind in REFUND_EVENTS:
        return _read_refund(event["id"], thing)
    if kind in DISPUTE_EVENTS:
        return _reversal(event["id"], DISPUTE_EVENTS[kind], thing)
    return None


def _read_session(event_id: str, kind: EventKind, session: dict[str, Any]) -> PaymentEvent | None:
    if kind == "completed" and session["payment_status"] != "paid":
        return None  # a slow way of paying; async_payment_succeeded or _failed follows
    reason = "" if kind == "completed" else f"the checkout is {session.get('status') or 'over'}"
    return PaymentEvent(
        event_id,
        kind,
        _our_id(session) or _text(session.get("client_reference_id")),
        _id_of(session.get("payment_intent")) or (session["id"] if kind == "failed" else ""),
        session.get("amount_total") or 0,
        session.get("currency") or "",
        reason=reason,
    )


def _read_intent(event_id: str, kind: EventKind, intent: dict[str, Any]) -> PaymentEvent | None:
    is_checkout = (intent.get("metadata") or {}).get("by") == "checkout"
    if kind == "failed" and is_checkout:
        return None  # a declined card; the customer may try another in the same session
    error = intent.get("last_payment_error") or {}
    return PaymentEvent(
        event_id,
        kind,
        _our_id(intent),
        _text(intent["id"]),
        intent.get("amount_received") or 0,
        intent.get("currency") or "",
        saved_method=_saved(intent) if kind == "completed" else "",
        reason=error.get("message") or ("" if kind == "completed" else "the payment failed"),
    )


def _saved(intent: dict[str, Any]) -> str:
    customer, method = _id_of(intent.get("customer")), _id_of(intent.get("payment_method"))
    is_kept = intent.get("setup_future_usage") == "off_session"
    return f"{customer}/{method}" if is_kept and customer and method else ""


def _read_refund(event_id: str, refund: dict[str, Any]) -> PaymentEvent | None:
    if refund["status"] == "requires_action":
        return None
    if refund["status"] in ("failed", "canceled"):
        return _reversal(event_id, "refund_failed", refund)
    return _reversal(event_id, "refunded", refund)


def _reversal(event_id: str, kind: EventKind, thing: dict[str, Any]) -> PaymentEvent:
    metadata = thing.get("metadata") or {}
    return PaymentEvent(
        event_id,
        kind,
        reference=_id_of(thing.get("payment_intent")),
        amount_cents=thing["amount"],
        currency=thing["currency"],
        reversal=_text(thing["id"]),
        refund_id=_text(metadata.get("refund_id")),
        reason=thing.get("reason") or thing.get("failure_reason") or "",
    )


def _our_id(thing: dict[str, Any]) -> str:
    return _text((thing.get("metadata") or {}).get("payment_id"))


def _id_of(thing: Any) -> str:
    """Return the id of what Stripe tells by its id or, expanded, in whole."""
    return _text(thing.get("id") if isinstance(thing, dict) else thing)


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no id")
    return value or ""


def register(registry: Registry) -> None:
    """Enter by the one door; without the SDK say so at once, without importing it."""
    if find_spec("stripe") is None:
        raise PluginError("plugin 'stripe' needs the package stripe; install it: pip install 'gpuproxy[stripe]'")
    registry.payment(Stripe)


_: type[PaymentProvider] = Stripe
