"""``/dashboard/keys``: API keys."""

from typing import Any

from aiohttp import web

from gpuproxy.access.accounts import ADMIN_SCOPE
from gpuproxy.control import keys
from gpuproxy.control.here import base_url
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit
from gpuproxy.types import ALL_SCOPES


async def show(visit: Visit, made: Any = None) -> web.StreamResponse:
    """List the keys and offer to make one; `made` is shown this once."""
    told = await visit.ask(keys.list_all, query=visit.query("cursor"))
    assert visit.caller is not None
    scopes = (*ALL_SCOPES, ADMIN_SCOPE) if visit.caller.is_admin else ALL_SCOPES
    shown = {"keys": told["data"], "next": told.get("next_cursor"), "scopes": scopes, "made": made}
    status = 200 if made is None else 201
    return page(visit, "keys.html", status, default_scopes=ALL_SCOPES, base_url=base_url(visit.request), **shown)


async def make(visit: Visit) -> web.StreamResponse:
    """Make a key and show it."""
    body: dict[str, Any] = {"name": visit.text("name"), "scopes": visit.form.getall("scopes", [])}
    body |= {name: words for name in ("models", "tools") if (words := visit.words(name))}
    if (days := visit.whole("expires_days")) is not None:
        body["expires_days"] = days
    return await show(visit, await visit.ask(keys.make, body))


async def revoke(visit: Visit) -> web.StreamResponse:
    """Revoke a key."""
    await visit.ask(keys.revoke, id=visit.id)
    return see_other(f"{PREFIX}/keys?done=revoked")
