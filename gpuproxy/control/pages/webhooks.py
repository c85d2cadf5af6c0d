"""``/dashboard/webhooks``: who is told of events by HTTP, and what became of it."""

from typing import Any

from aiohttp import web

from gpuproxy.control import webhooks
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit
from gpuproxy.events.catalogue import EVENTS, EVERYTHING, subscribable

HERE = f"{PREFIX}/webhooks"
DELIVERIES_SHOWN = "50"
OWN = subscribable(is_billing=False)
OFFERED = {name: kind.meaning for name, kind in EVENTS.items() if name in OWN}


async def show(visit: Visit, made: Any = None) -> web.StreamResponse:
    """List the webhooks and offer to make one; the secret of `made` is shown this once."""
    found = (await visit.ask(webhooks.list_webhooks))["data"]
    return page(
        visit, "webhooks.html", 200 if made is None else 201, webhooks=found, made=made, events=OFFERED, form=visit.form
    )


async def make(visit: Visit) -> web.StreamResponse:
    """Make a webhook and show its secret."""
    body: dict[str, Any] = {"url": visit.text("url"), "description": visit.text("description")}
    body["events"] = visit.form.getall("events", []) or [EVERYTHING]
    return await show(visit, await visit.ask(webhooks.make_webhook, body))


async def show_one(visit: Visit) -> web.StreamResponse:
    """Show a webhook and what it was sent."""
    hook = (await visit.ask(webhooks.show_webhook, id=visit.id))["data"]
    query = {**visit.query("state", "cursor"), "limit": DELIVERIES_SHOWN}
    sent = await visit.ask(webhooks.list_deliveries, query=query, id=visit.id)
    return page(visit, "webhook.html", hook=hook, deliveries=sent["data"], next=sent.get("next_cursor"))


async def send_test(visit: Visit) -> web.StreamResponse:
    """Send a test event."""
    await visit.ask(webhooks.send_test, id=visit.id)
    return see_other(f"{HERE}/{visit.id}?done=sent")


async def switch(visit: Visit) -> web.StreamResponse:
    """Switch a webhook on or off."""
    await visit.ask(webhooks.change_webhook, {"enabled": visit.text("enabled") == "yes"}, id=visit.id)
    return see_other(f"{HERE}/{visit.id}?done=changed")


async def delete(visit: Visit) -> web.StreamResponse:
    """Delete a webhook with what it is owed."""
    await visit.ask(webhooks.delete_webhook, id=visit.id)
    return see_other(f"{HERE}?done=deleted")


async def replay(visit: Visit) -> web.StreamResponse:
    """Send a delivery again."""
    sent = (await visit.ask(webhooks.replay_delivery, id=visit.id))["data"]
    return see_other(f"{HERE}/{sent['webhook_id']}?done=sent")
