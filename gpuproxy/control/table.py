"""Every route of the management API, in one table: what it takes and gives, and who may call it.

``/openapi.json`` and ``/docs`` are made of it, and the tests call each row as everybody.
"""

from gpuproxy.access.accounts import User
from gpuproxy.control import (
    admin_users,
    auth,
    books,
    credits,
    docs,
    events,
    export,
    health,
    keys,
    openapi,
    prices,
    user,
    webhooks,
)
from gpuproxy.control.billing_routes import BILLING_ROUTES
from gpuproxy.control.query import PAGE
from gpuproxy.control.route import Route
from gpuproxy.events.webhooks import Delivery

AUTH = "/api/v1/auth"
HOOKS = "/api/v1/webhooks"
TABLE: tuple[Route, ...] = (
    Route("POST", f"{AUTH}/register", auth.register, "anyone", auth.Credentials, auth.LoggedIn, status=201),
    Route("POST", f"{AUTH}/login", auth.log_in, "anyone", auth.Credentials, auth.LoggedIn),
    Route("POST", f"{AUTH}/refresh", auth.refresh, "anyone", auth.Refresh, auth.LoggedIn),
    Route("POST", f"{AUTH}/logout", auth.log_out, "account", gives=auth.LoggedOut),
    Route("POST", f"{AUTH}/password", auth.change_password, "account", auth.PasswordChange, auth.LoggedIn),
    Route("POST", f"{AUTH}/apikey", keys.make, "account", keys.NewKey, keys.MadeKey, status=201, is_once=True),
    Route("GET", f"{AUTH}/apikey", keys.list_all, "account", gives=keys.KeyInfo, shape="list", query=PAGE),
    Route("DELETE", f"{AUTH}/apikey/{{id}}", keys.revoke, "account", gives=keys.KeyInfo),
    Route(
        "POST",
        f"{AUTH}/apikey/{{id}}/rotate",
        keys.rotate,
        "account",
        keys.Rotation,
        keys.RotatedKey,
        status=201,
        is_once=True,
    ),
    *BILLING_ROUTES,
    Route("GET", "/api/v1/user/profile", user.profile, "key", gives=User),
    Route("GET", "/api/v1/user/usage", user.usage, "key", gives=user.UsageSums, query=user.USAGE_QUERY),
    Route(
        "GET", "/api/v1/user/usage/calls", user.calls, "key", gives=user.CallInfo, shape="list", query=user.CALLS_QUERY
    ),
    Route("GET", "/api/v1/user/credits", credits.show, "key", gives=credits.CreditsInfo),
    Route(
        "GET",
        "/api/v1/user/transactions",
        credits.transactions,
        "read",
        gives=credits.TransactionInfo,
        shape="list",
        query=PAGE,
    ),
    Route("GET", "/api/v1/user/export", export.own, "read", shape="other"),
    Route("GET", "/api/v1/admin/export/users", export.everybody, "admin", shape="other", query=export.FORMAT_QUERY),
    Route(
        "POST",
        "/api/v1/admin/credits/add",
        credits.add_credits,
        "admin",
        credits.CreditGift,
        credits.CreditGiven,
        is_once=True,
    ),
    Route(
        "GET", "/api/v1/admin/prices", prices.history, "admin", gives=prices.PriceInfo, shape="list", query=prices.QUERY
    ),
    Route(
        "POST",
        "/api/v1/admin/prices",
        prices.set_price,
        "admin",
        prices.NewPrice,
        prices.PriceInfo,
        status=201,
        is_once=True,
    ),
    Route("GET", "/api/v1/admin/ledger/verify", books.verify, "admin", gives=books.Verdict),
    Route("GET", "/api/v1/admin/users", admin_users.list_all, "admin", gives=User, shape="list", query=PAGE),
    Route("PATCH", "/api/v1/admin/users/{id}", admin_users.change, "admin", admin_users.UserChange, User),
    Route(
        "POST",
        HOOKS,
        webhooks.make_webhook,
        "account",
        webhooks.NewWebhook,
        webhooks.MadeWebhook,
        status=201,
        is_once=True,
    ),
    Route("GET", HOOKS, webhooks.list_webhooks, "read", gives=webhooks.WebhookInfo, shape="list"),
    Route(
        "POST",
        f"{HOOKS}/billing",
        webhooks.make_billing_webhook,
        "account",
        webhooks.NewBillingWebhook,
        webhooks.MadeWebhook,
        status=201,
        is_once=True,
    ),
    Route("GET", f"{HOOKS}/billing", webhooks.list_billing_webhooks, "read", gives=webhooks.WebhookInfo, shape="list"),
    Route("GET", f"{HOOKS}/{{id}}", webhooks.show_webhook, "read", gives=webhooks.WebhookInfo),
    Route("PATCH", f"{HOOKS}/{{id}}", webhooks.change_webhook, "account", webhooks.WebhookChange, webhooks.WebhookInfo),
    Route("DELETE", f"{HOOKS}/{{id}}", webhooks.delete_webhook, "account", gives=webhooks.WebhookInfo),
    Route(
        "POST",
        f"{HOOKS}/{{id}}/rotate-secret",
        webhooks.rotate_secret,
        "account",
        webhooks.SecretRotation,
        webhooks.MadeWebhook,
        status=201,
        is_once=True,
    ),
    Route("POST", f"{HOOKS}/{{id}}/test", webhooks.send_test, "account", gives=Delivery, status=202),
    Route(
        "GET",
        f"{HOOKS}/{{id}}/deliveries",
        webhooks.list_deliveries,
        "read",
        gives=Delivery,
        shape="list",
        query=webhooks.DELIVERIES_QUERY,
    ),
    Route("POST", f"{HOOKS}/deliveries/{{id}}/replay", webhooks.replay_delivery, "account", gives=Delivery, status=202),
    Route("POST", "/api/v1/ws/ticket", events.make_ticket, "read", gives=events.Ticket, status=201),
    Route("GET", "/ws", events.events, "anyone", shape="other"),
    Route("GET", "/", health.about, "anyone", gives=health.About, shape="plain"),
    Route("GET", "/health", health.health, "anyone", gives=health.Health, shape="plain"),
    Route("GET", "/health/live", health.live, "anyone", gives=health.Status, shape="plain"),
    Route("GET", "/health/ready", health.ready, "anyone", gives=health.Status, shape="plain"),
    Route("GET", "/openapi.json", openapi.show, "anyone", shape="other"),
    Route("GET", "/docs", docs.show, "anyone", shape="other"),
)
