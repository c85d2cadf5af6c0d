"""The rows of the table that are about paying."""

from gpuproxy.control import auto_renew, billing, payment_webhooks
from gpuproxy.control.query import PAGE
from gpuproxy.control.route import Route

BILLING = "/api/v1/billing"
BILLING_ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        f"{BILLING}/checkout",
        billing.checkout,
        "account",
        billing.NewCheckout,
        billing.PaymentInfo,
        status=201,
        is_once=True,
    ),
    Route(
        "GET", f"{BILLING}/payments", billing.list_payments, "read", gives=billing.PaymentInfo, shape="list", query=PAGE
    ),
    Route(
        "POST",
        f"{BILLING}/payments/{{id}}/confirm",
        billing.confirm,
        "admin",
        billing.Confirmation,
        billing.PaymentInfo,
        is_once=True,
    ),
    Route(
        "POST",
        f"{BILLING}/refunds",
        billing.refund,
        "admin",
        billing.NewRefund,
        billing.RefundInfo,
        status=201,
        is_once=True,
    ),
    Route(
        "POST",
        f"{BILLING}/webhooks/{{provider}}",
        payment_webhooks.receive,
        "anyone",
        gives=payment_webhooks.Received,
        shape="plain",
    ),
    Route("GET", f"{BILLING}/auto-renew", auto_renew.show_auto_renew, "read", gives=auto_renew.AutoRenewInfo),
    Route(
        "PUT",
        f"{BILLING}/auto-renew",
        auto_renew.set_auto_renew,
        "account",
        auto_renew.AutoRenew,
        auto_renew.AutoRenewInfo,
    ),
)
