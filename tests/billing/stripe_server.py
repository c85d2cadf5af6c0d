"""Stripe, as far as it is spoken to here: its HTTP API with its idempotency, its errors, its signed webhooks.

Written after docs.stripe.com/api (errors, idempotent_requests, checkout/sessions, payment_intents, refunds) and
docs.stripe.com/webhooks. The official SDK speaks to it over HTTP; nothing of the SDK is used here.
"""

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

KEY = "sk_test_simulated"
SECRET = "whsec_simulated"
Thing = dict[str, Any]


class Stripe:
    """A Stripe account of one merchant. `faults` are what the next calls of a path meet instead of an answer.

    A fault is a status, "drop" (the connection ends), or "late" (it is done, then the connection ends).
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Thing, str]] = []
        self.faults: dict[str, list[int | str]] = {}
        self.declined: dict[str, str] = {}  # payment method: decline code
        self.things: dict[str, Thing] = {}
        self.events: list[Thing] = []
        self.secrets = [SECRET]
        self._replies: dict[str, tuple[str, int, Thing]] = {}
        self._running: set[str] = set()
        self._count = 0
        app = web.Application()
        for path, handler in (
            ("/v1/checkout/sessions", self._make_session),
            ("/v1/payment_intents", self._make_intent),
            ("/v1/refunds", self._make_refund),
        ):
            app.router.add_post(path, self._served(handler))
        self._server = TestServer(app)

    async def start(self) -> None:
        """Listen on a free port."""
        await self._server.start_server()

    async def stop(self) -> None:
        """Listen no more."""
        await self._server.close()

    @property
    def url(self) -> str:
        """Return the base URL of the API."""
        return str(self._server.make_url("")).rstrip("/")

    def made(self, kind: str) -> list[Thing]:
        """Return the things of a kind, oldest first."""
        return [thing for thing in self.things.values() if thing["object"] == kind]

    # What happens at Stripe, outside the API.

    def pay(self, session_id: str, method: str = "pm_card_visa") -> list[Thing]:
        """Pay a session on Stripe's page; return the events."""
        session = self.things[session_id]
        wished = session["payment_intent_data"]
        intent = self._intent(session["amount_total"], wished.get("metadata", {}), method)
        intent["setup_future_usage"] = wished.get("setup_future_usage")
        session["payment_intent"] = intent["id"]
        intent["customer"] = session["customer"] or (self._id("cus") if session["customer_creation"] else None)
        session["customer"] = intent["customer"]
        if method in self.declined:
            return [self._event("payment_intent.payment_failed", self._decline(intent, method))]
        self._succeed(intent)
        session |= {"status": "complete", "payment_status": "paid"}
        return [
            self._event("payment_intent.succeeded", intent),
            self._event("checkout.session.completed", session),
        ]

    def expire(self, session_id: str) -> Thing:
        """End a session nobody paid; return the event."""
        session = self.things[session_id]
        session["status"] = "expired"
        return self._event("checkout.session.expired", session)

    def refund(self, intent_id: str, amount: int, metadata: Thing | None = None) -> Thing:
        """Give money back, as from the dashboard; return the refund."""
        refund = {
            "id": self._id("re"), "object": "refund", "amount": amount, "currency": "usd", "status": "succeeded",
            "payment_intent": intent_id, "metadata": metadata or {}, "reason": None, "failure_reason": None,
        }  # fmt: skip
        self.things[refund["id"]] = refund
        self._event("refund.created", refund)
        return refund

    def dispute(self, intent_id: str) -> Thing:
        """Let the customer's bank take the money; return the dispute."""
        dispute = {
            "id": self._id("du"), "object": "dispute", "amount": self.things[intent_id]["amount"], "currency": "usd",
            "payment_intent": intent_id, "charge": "ch_x", "reason": "fraudulent", "status": "needs_response",
        }  # fmt: skip
        self._event("charge.dispute.funds_withdrawn", dispute)
        return dispute

    def event(self, kind: str, thing: Thing) -> Thing:
        """Make an event."""
        return self._event(kind, thing)

    def signed(self, event: Thing, at_s: float | None = None, secret: str = "") -> tuple[bytes, dict[str, str]]:
        """Return the body of an event and its headers, as Stripe sends them."""
        body = json.dumps(event, indent=2).encode()
        at = int(time.time() if at_s is None else at_s)
        secrets = [secret] if secret else self.secrets
        signatures = [hmac.new(each.encode(), b"%d." % at + body, sha256).hexdigest() for each in secrets]
        signature = ",".join([f"t={at}", *(f"v1={each}" for each in signatures), "v0=ignored"])
        return body, {"Stripe-Signature": signature, "Content-Type": "application/json; charset=utf-8"}

    async def deliver(self, url: str, event: Thing) -> int:
        """Send an event to a gateway; return the status."""
        body, headers = self.signed(event)
        async with ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
            return answer.status

    # The API.

    def _served(self, handler: Callable[[Thing], Thing]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def serve(request: web.Request) -> web.StreamResponse:
            text = (await request.read()).decode()
            key = request.headers.get("Idempotency-Key", "")
            self.calls.append((request.path, _nested(text), key))
            if request.headers.get("Authorization") != f"Bearer {KEY}":
                return _answer(401, _error("invalid_request_error", f"Invalid API Key provided: {key[:4]}"))
            faults = self.faults.get(request.path, [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                kind = "api_error" if fault >= 500 else "invalid_request_error"
                return _answer(fault, _error(kind, "something went wrong"))
            if fault != "drop":
                status, body, replayed = await self._once(f"{request.path} {key}", text, handler)
            if fault is not None:
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            return _answer(status, body, {"Idempotent-Replayed": "true"} if replayed else {})

        return serve

    async def _once(self, key: str, text: str, handler: Callable[[Thing], Thing]) -> tuple[int, Thing, bool]:
        """Do it, or answer as the first time; refuse a key that is used for something else, or right now."""
        if key in self._running:
            return 409, _error("idempotency_error", "the key is in use", code="idempotency_key_in_use"), False
        if key in self._replies:
            before, status, body = self._replies[key]
            if before != text:
                message = "Keys for idempotent requests can only be used with the same parameters"
                return 400, _error("idempotency_error", message), False
            return status, body, True
        self._running.add(key)
        try:
            await asyncio.sleep(0)
            status, body = 200, handler(_nested(text))
        except RefusedError as refused:
            status, body = refused.status, refused.body
        finally:
            self._running.discard(key)
        if status != 400:  # nothing is stored when validation failed
            self._replies[key] = (text, status, body)
        return status, body, False

    def _make_session(self, given: Thing) -> Thing:
        _need(given, "mode", "line_items", "success_url", "client_reference_id", "payment_intent_data")
        price = given["line_items"]["0"]["price_data"]
        amount = int(price["unit_amount"]) * int(given["line_items"]["0"]["quantity"])
        if amount < 50:
            raise RefusedError(400, _error("invalid_request_error", "too small", code="amount_too_small"))
        session_id = self._id("cs_test")
        session = {
            "id": session_id, "object": "checkout.session", "status": "open", "payment_status": "unpaid",
            "url": f"https://checkout.stripe.test/c/pay/{session_id}", "amount_total": amount,
            "currency": price["currency"], "payment_intent": None, "metadata": given.get("metadata", {}),
            "client_reference_id": given["client_reference_id"], "customer": given.get("customer"),
            "customer_creation": given.get("customer_creation"), "mode": given["mode"],
            "payment_intent_data": given["payment_intent_data"], "success_url": given["success_url"],
        }  # fmt: skip
        self.things[session_id] = session
        return dict(session)

    def _make_intent(self, given: Thing) -> Thing:
        _need(given, "amount", "currency", "customer", "payment_method", "off_session", "confirm")
        intent = self._intent(int(given["amount"]), given.get("metadata", {}), given["payment_method"])
        intent["customer"] = given["customer"]
        if given["payment_method"] in self.declined:
            failed = self._decline(intent, given["payment_method"])
            self._event("payment_intent.payment_failed", failed)
            error = {**failed["last_payment_error"], "payment_intent": dict(failed)}
            raise RefusedError(402, {"error": error})
        self._succeed(intent)
        self._event("payment_intent.succeeded", intent)
        return dict(intent)

    def _make_refund(self, given: Thing) -> Thing:
        _need(given, "payment_intent", "amount")
        intent = self.things.get(given["payment_intent"])
        if intent is None:
            message = f"No such payment_intent: '{given['payment_intent']}'"
            raise RefusedError(404, _error("invalid_request_error", message, code="resource_missing"))
        back = sum(each["amount"] for each in self.made("refund") if each["payment_intent"] == intent["id"])
        if back + int(given["amount"]) > intent["amount_received"]:
            message = "Refund amount is greater than unrefunded amount on charge"
            raise RefusedError(400, _error("invalid_request_error", message))
        return dict(self.refund(intent["id"], int(given["amount"]), given.get("metadata")))

    def _intent(self, amount: int, metadata: Thing, method: str) -> Thing:
        intent = {
            "id": self._id("pi"), "object": "payment_intent", "amount": amount, "amount_received": 0,
            "currency": "usd", "status": "requires_confirmation", "metadata": metadata, "payment_method": method,
            "customer": None, "setup_future_usage": None, "last_payment_error": None,
        }  # fmt: skip
        self.things[intent["id"]] = intent
        return intent

    def _succeed(self, intent: Thing) -> None:
        intent |= {"status": "succeeded", "amount_received": intent["amount"]}

    def _decline(self, intent: Thing, method: str) -> Thing:
        intent["status"] = "requires_payment_method"
        intent["last_payment_error"] = {
            "type": "card_error", "code": "card_declined", "decline_code": self.declined[method],
            "message": "Your card was declined.", "param": None,
        }  # fmt: skip
        return intent

    def _event(self, kind: str, thing: Thing) -> Thing:
        event = {
            "id": self._id("evt"), "object": "event", "api_version": "2026-10-28.endive", "type": kind,
            "created": int(time.time()), "livemode": False, "pending_webhooks": 1,
            "data": {"object": json.loads(json.dumps(thing))}, "request": {"id": None, "idempotency_key": None},
        }  # fmt: skip
        self.events.append(event)
        return event

    def _id(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._count:06}"


class RefusedError(Exception):
    """What Stripe answers instead."""

    def __init__(self, status: int, body: Thing) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


def _error(kind: str, message: str, **more: Any) -> Thing:
    return {"error": {"type": kind, "message": message, **more}}


def _answer(status: int, body: Thing, headers: dict[str, str] | None = None) -> web.Response:
    told = {"Request-Id": "req_simulated", **(headers or {})}
    return web.json_response(body, status=status, headers=told)


def _need(given: Thing, *names: str) -> None:
    for name in names:
        if name not in given:
            message = f"Missing required param: {name}."
            raise RefusedError(400, _error("invalid_request_error", message, code="parameter_missing", param=name))


def _nested(text: str) -> Thing:
    """Decode a form whose names are nested by brackets: ``a[b][0]=c``."""
    found: Thing = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        first, *rest = re.findall(r"[^\[\]]+", name)
        place = found
        for step in [first, *rest][:-1]:
            place = place.setdefault(step, {})
        place[[first, *rest][-1]] = value
    return found
