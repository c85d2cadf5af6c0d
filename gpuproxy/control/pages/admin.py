"""``/dashboard/admin``: users, upstreams, workers and the books, for admins."""

from typing import Any

from aiohttp import web

from gpuproxy.control import admin_fleet, admin_routing, admin_users, books, credits
from gpuproxy.control.metrics import GAUGES_READ
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit

HERE = f"{PREFIX}/admin"
FINDINGS_SHOWN = "50"
FLAGS = {"block": {"is_active": False}, "unblock": {"is_active": True}, "promote": {"is_admin": True}}


async def show(visit: Visit, verdict: Any = None) -> web.StreamResponse:
    """Show how everything is; `verdict` is whether the books add up, if that was asked."""
    users = await visit.ask(admin_users.list_all, query=visit.query("cursor"))
    return page(
        visit,
        "admin.html",
        verdict=verdict,
        users=users["data"],
        next=users.get("next_cursor"),
        upstreams=(await visit.ask(admin_routing.list_upstreams))["data"],
        providers=(await visit.ask(admin_fleet.list_providers))["data"],
        findings=(await visit.ask(admin_fleet.list_findings, query={"limit": FINDINGS_SHOWN}))["data"],
        workers=visit.request.app[GAUGES_READ].total("gpuproxy_workers"),
    )


async def verify(visit: Visit) -> web.StreamResponse:
    """Check the books."""
    return await show(visit, (await visit.ask(books.verify))["data"])


async def change_user(visit: Visit) -> web.StreamResponse:
    """Block a user, let them in again."""
    await visit.ask(admin_users.change, FLAGS.get(visit.text("do"), {}), id=visit.id)
    return see_other(f"{HERE}?done=changed")


async def add_credit(visit: Visit) -> web.StreamResponse:
    """Add credit to a user's account."""
    await visit.ask(credits.add_credits, {"user_id": visit.id, "amount": visit.text("amount")})
    return see_other(f"{HERE}?done=credited")


async def acknowledge(visit: Visit) -> web.StreamResponse:
    """Close a finding."""
    await visit.ask(admin_fleet.acknowledge, id=visit.id)
    return see_other(f"{HERE}?done=acknowledged")
