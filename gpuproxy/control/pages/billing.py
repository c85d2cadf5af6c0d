"""``/dashboard/billing``: what moved the account, and how to add credit."""

from typing import Any

from aiohttp import web

from gpuproxy.control import auto_renew, billing, credits
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.paying import PAYMENTS

PAYMENTS_SHOWN = "10"


async def show(visit: Visit, begun: Any = None) -> web.StreamResponse:
    """Show credit, payments and transactions; `begun` is a payment to be made now."""
    moved = await visit.ask(credits.transactions, query=visit.query("cursor"))
    return page(
        visit,
        "billing.html",
        200 if begun is None else 201,
        begun=begun,
        credits=(await visit.ask(credits.show))["data"],
        transactions=moved["data"],
        next=moved.get("next_cursor"),
        payments=(await visit.ask(billing.list_payments, query={"limit": PAYMENTS_SHOWN}))["data"],
        renewal=(await visit.ask(auto_renew.show_auto_renew))["data"],
        providers=visit.request.app[PAYMENTS],
        form=visit.form,
    )


async def checkout(visit: Visit) -> web.StreamResponse:
    """Begin to pay and say how to go on."""
    body: dict[str, Any] = {**visit.filled("amount_usd", "provider"), "save_method": "save_method" in visit.form}
    return await show(visit, (await visit.ask(billing.checkout, body))["data"])


async def set_renewal(visit: Visit) -> web.StreamResponse:
    """Switch on or off that credit renews itself."""
    is_enabled = "off" not in visit.form
    amounts = visit.filled("threshold_usd", "amount_usd", "monthly_cap_usd", "provider") if is_enabled else {}
    await visit.ask(auto_renew.set_auto_renew, {"is_enabled": is_enabled, **amounts})
    return see_other(f"{PREFIX}/billing?done=changed")
