"""Webhooks of the caller's account: ``/api/v1/webhooks…``."""

from datetime import datetime
from typing import Annotated, Any
from uuid import uuid4

from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.paging import ROWS_MAX
from gpuproxy.control.once import once
from gpuproxy.control.parts import CALLER, CONFIG, KEYRING, STORE
from gpuproxy.control.query import page_asked
from gpuproxy.control.respond import listing, page_of, success
from gpuproxy.events import webhooks
from gpuproxy.events.catalogue import EVERYTHING
from gpuproxy.events.sender import context_of
from gpuproxy.events.signing import check_secret, new_secret
from gpuproxy.events.webhooks import Draft, Kind, Webhook
from gpuproxy.guard import Guard, is_literal, parse_target

OVERLAP_S_MAX = 604_800
EVENTS_MAX = 64
DELIVERIES_QUERY = {
    "state": "only those that are pending, sending, delivered, dead or cancelled",
    "limit": f"how many, 1 to {ROWS_MAX}; 100 if left out",
    "cursor": "the next_cursor of the page before",
}

Url = Annotated[str, Meta(min_length=8, max_length=2_048, examples=["https://example.com/webhook"])]
Names = Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(min_length=1, max_length=EVENTS_MAX)]
Secret = Annotated[str, Meta(max_length=128, description="whsec_… or 16 to 128 characters; made if it is left out")]
Description = Annotated[str, Meta(max_length=256)]


class NewWebhook(Struct, forbid_unknown_fields=True):
    """Where to tell which events; `events` may be ``["*"]`` for all."""

    url: Url
    events: Names
    secret: Secret | None = None
    description: Description = ""


class NewBillingWebhook(Struct, forbid_unknown_fields=True):
    """Where to tell what happens to payments and credit; all of it if `events` is left out."""

    url: Url
    events: Names = (EVERYTHING,)
    secret: Secret | None = None
    description: Description = ""


class WebhookChange(Struct, forbid_unknown_fields=True):
    """What shall be otherwise; what is left out stays."""

    url: Url | UnsetType = UNSET
    events: Names | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class SecretRotation(Struct, forbid_unknown_fields=True):
    """How long the old secret signs beside the new one, in seconds; a new one of yours, or one is made."""

    overlap_s: Annotated[int, Meta(ge=0, le=OVERLAP_S_MAX)] = 86_400
    secret: Secret | None = None


class WebhookInfo(Struct):
    """A webhook without its secret. `failing_since` is set while it does not answer.

    `old_secret_until` is when the last of its old secrets signs no more.
    """

    id: str
    kind: str
    url: str
    events: tuple[str, ...]
    description: str
    enabled: bool
    disabled_reason: str
    failing_since: datetime | None
    old_secret_until: datetime | None
    created_at: datetime


class MadeWebhook(WebhookInfo, kw_only=True):
    """A webhook and the secret that signs; it is shown this once."""

    secret: str


async def make_webhook(request: web.Request, body: NewWebhook) -> web.Response:
    """Be told of events by HTTP; the secret is shown this once."""
    return await _make(request, body, "events")


async def make_billing_webhook(request: web.Request, body: NewBillingWebhook) -> web.Response:
    """Be told of payments and credit by HTTP; the secret is shown this once."""
    return await _make(request, body, "billing")


async def _make(request: web.Request, body: NewWebhook | NewBillingWebhook, kind: Kind) -> web.Response:
    names = webhooks.check_events(body.events, kind)
    _check_url(request, body.url)
    webhook_id, secret = f"whk_{uuid4().hex}", _secret(body.secret)
    sealed = request.app[KEYRING].seal(secret.encode(), context_of(webhook_id))
    draft = Draft(webhook_id, kind, body.url, names, body.description, sealed)
    count_max = request.app[CONFIG].webhooks.per_account_max

    async def work(connection: AsyncConnection) -> MadeWebhook:
        made = await webhooks.add_webhook(connection, request[CALLER].user_id, draft, count_max)
        return MadeWebhook(**_shown(made), secret=secret)

    return await once(request, body, 201, work)


async def list_webhooks(request: web.Request) -> web.Response:
    """List the account's webhooks of every kind, oldest first."""
    return await _list(request, None)


async def list_billing_webhooks(request: web.Request) -> web.Response:
    """List the account's billing webhooks, oldest first."""
    return await _list(request, "billing")


async def _list(request: web.Request, kind: Kind | None) -> web.Response:
    async with request.app[STORE].reading() as connection:
        found = await webhooks.own_webhooks(connection, request[CALLER].user_id, kind)
    return listing([WebhookInfo(**_shown(webhook)) for webhook in found])


async def show_webhook(request: web.Request) -> web.Response:
    """Show a webhook."""
    async with request.app[STORE].reading() as connection:
        found = await webhooks.own_webhook(connection, *_whose(request))
    return success(WebhookInfo(**_shown(found)))


async def change_webhook(request: web.Request, body: WebhookChange) -> web.Response:
    """Change where or what a webhook is told, or switch it off or on."""
    values = {name: value for name in ("url", "description") if (value := getattr(body, name)) is not UNSET}
    if body.url is not UNSET:
        _check_url(request, body.url)
    is_enabled = None if body.enabled is UNSET else body.enabled
    async with request.app[STORE].writing() as connection:
        names = None
        if body.events is not UNSET:
            kind = (await webhooks.own_webhook(connection, *_whose(request))).kind
            names = webhooks.check_events(body.events, kind)
        changed = await webhooks.change_webhook(connection, *_whose(request), values, names, is_enabled)
    return success(WebhookInfo(**_shown(changed)))


async def delete_webhook(request: web.Request) -> web.Response:
    """Delete a webhook with what it is still owed."""
    async with request.app[STORE].writing() as connection:
        found = await webhooks.remove_webhook(connection, *_whose(request))
    return success(WebhookInfo(**_shown(found)))


async def rotate_secret(request: web.Request, body: SecretRotation) -> web.Response:
    """Sign with a new secret; the one before signs too until the overlap ends. With an overlap of 0 no old one does."""
    user_id, webhook_id = _whose(request)
    secret = _secret(body.secret)
    sealed = request.app[KEYRING].seal(secret.encode(), context_of(webhook_id))

    async def work(connection: AsyncConnection) -> MadeWebhook:
        changed = await webhooks.replace_secret(connection, user_id, webhook_id, sealed, body.overlap_s)
        return MadeWebhook(**_shown(changed), secret=secret)

    return await once(request, body, 201, work)


async def send_test(request: web.Request) -> web.Response:
    """Send the webhook a test event."""
    async with request.app[STORE].writing() as connection:
        return success(await webhooks.owe_test(connection, *_whose(request)), 202)


async def list_deliveries(request: web.Request) -> web.Response:
    """List what a webhook was sent and what became of it, newest first."""
    page, state = page_asked(request), webhooks.check_state(request.query.get("state"))
    async with request.app[STORE].reading() as connection:
        found = await webhooks.newest_deliveries(connection, *_whose(request), state, page.limit, page.cursor)
    return page_of(found, page.limit)


async def replay_delivery(request: web.Request) -> web.Response:
    """Send a delivery again that is over, however it ended."""
    async with request.app[STORE].writing() as connection:
        return success(await webhooks.replay(connection, *_whose(request)), 202)


def _whose(request: web.Request) -> tuple[str, str]:
    return request[CALLER].user_id, request.match_info["id"]


def _secret(given: str | None) -> str:
    if given is None:
        return new_secret()
    check_secret(given)
    return given


def _check_url(request: web.Request, url: str) -> None:
    """Refuse at once what every attempt would refuse. Names are judged at each attempt: they may change."""
    target, egress = parse_target(url, "url"), request.app[CONFIG].egress
    if is_literal(target.host) and f"{target.host}:{target.port}" not in egress.connect_to:
        Guard(egress.allow).check(target.host, [target.host], "url")


def _shown(webhook: Webhook) -> dict[str, Any]:
    fields = structs.asdict(webhook)
    return {**{name: fields[name] for name in fields if name != "state"}, "enabled": webhook.state == "enabled"}
