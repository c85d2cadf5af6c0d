"""Every page below ``/dashboard``, in one table."""

from gpuproxy.control.pages import admin, billing, keys, overview, rentals, sign_in, static, webhooks
from gpuproxy.control.pages.serve import PREFIX, SIGN_IN, Page

KEYS = f"{PREFIX}/keys"
RENTALS = f"{PREFIX}/rentals"
BILLING = f"{PREFIX}/billing"
HOOKS = f"{PREFIX}/webhooks"
ADMIN = f"{PREFIX}/admin"

PAGES: tuple[Page, ...] = (
    Page("GET", f"{PREFIX}/static/{{name}}", static.show, is_open=True),
    Page("GET", SIGN_IN, sign_in.show_sign_in, is_open=True),
    Page("POST", SIGN_IN, sign_in.sign_in, back=sign_in.show_sign_in, is_open=True),
    Page("GET", f"{PREFIX}/register", sign_in.show_register, is_open=True),
    Page("POST", f"{PREFIX}/register", sign_in.register, back=sign_in.show_register, is_open=True),
    Page("POST", f"{PREFIX}/sign-out", sign_in.sign_out),
    Page("GET", f"{PREFIX}/account", sign_in.show_account),
    Page("POST", f"{PREFIX}/account/password", sign_in.change_password, back=sign_in.show_account),
    Page("POST", f"{PREFIX}/account/low-credit", sign_in.set_low_credit, back=sign_in.show_account),
    Page("GET", PREFIX, overview.show_overview),
    Page("GET", f"{PREFIX}/usage", overview.show_usage),
    Page("GET", KEYS, keys.show),
    Page("POST", KEYS, keys.make, back=keys.show),
    Page("POST", f"{KEYS}/{{id}}/revoke", keys.revoke, back=keys.show),
    Page("GET", RENTALS, rentals.show),
    Page("GET", f"{RENTALS}/{{id}}", rentals.show_one),
    Page("POST", f"{RENTALS}/{{id}}/start", rentals.start, back=rentals.show),
    Page("POST", f"{RENTALS}/{{id}}/stop", rentals.stop, back=rentals.show),
    Page("POST", f"{RENTALS}/{{id}}/destroy", rentals.destroy, back=rentals.show),
    Page("GET", f"{PREFIX}/offers/{{provider}}/{{id}}", rentals.show_offer),
    Page("POST", f"{PREFIX}/offers/{{provider}}/{{id}}", rentals.rent, back=rentals.show_offer),
    Page("GET", BILLING, billing.show),
    Page("POST", f"{BILLING}/checkout", billing.checkout, back=billing.show),
    Page("POST", f"{BILLING}/auto-renew", billing.set_renewal, back=billing.show),
    Page("GET", HOOKS, webhooks.show),
    Page("POST", HOOKS, webhooks.make, back=webhooks.show),
    Page("GET", f"{HOOKS}/{{id}}", webhooks.show_one),
    Page("POST", f"{HOOKS}/{{id}}/test", webhooks.send_test, back=webhooks.show_one),
    Page("POST", f"{HOOKS}/{{id}}/switch", webhooks.switch, back=webhooks.show_one),
    Page("POST", f"{HOOKS}/{{id}}/delete", webhooks.delete, back=webhooks.show_one),
    Page("POST", f"{HOOKS}/deliveries/{{id}}/replay", webhooks.replay),
    Page("GET", ADMIN, admin.show),
    Page("POST", f"{ADMIN}/verify", admin.verify, back=admin.show),
    Page("POST", f"{ADMIN}/findings/{{id}}/acknowledge", admin.acknowledge, back=admin.show),
    Page("POST", f"{ADMIN}/users/{{id}}", admin.change_user, back=admin.show),
    Page("POST", f"{ADMIN}/users/{{id}}/credit", admin.add_credit, back=admin.show),
)
