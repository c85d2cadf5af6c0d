"""Templates to pages, with the headers that let a browser run nothing but what the gateway serves itself."""

from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from typing import Any
from uuid import uuid4

import aiohttp_jinja2
import jinja2
from aiohttp import web

from gpuproxy import __version__
from gpuproxy.control.pages.static import VERSION
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import FLEET

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # not no-referrer: then a form's Origin would be null
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NANOUSD = 9  # decimals


def add_templates(app: web.Application) -> None:
    """Let the application render pages; markup in data is always escaped."""
    environment = aiohttp_jinja2.setup(
        app,
        loader=jinja2.PackageLoader("gpuproxy.control.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(usd=usd, count=count, when=when, ms=milliseconds, bar=bar)
    environment.globals.update(version=__version__, static_version=VERSION, new_once=lambda: uuid4().hex)


def page(visit: Visit, template: str, status: int = 200, **context: Any) -> web.Response:
    """Return the page. `status` is that of the error if the form sent was refused."""
    shown = {"caller": visit.caller, "error": visit.error, "path": visit.request.path, **context}
    shown["done"] = DONE.get(visit.request.query.get("done", ""), "")
    shown["has_fleet"] = bool(visit.request.app[FLEET].providers)
    response = aiohttp_jinja2.render_template(template, visit.request, shown)
    response.set_status(status if visit.error is None else visit.error.status)
    response.headers.update(HEADERS)
    return response


def usd(nanousd: int) -> str:
    """Return an amount as dollars: cents, and as much more as small amounts need. Never more than there is."""
    amount = Decimal(nanousd).scaleb(-NANOUSD)
    decimals = 2 if abs(amount) >= 100 else 4 if abs(amount) >= 1 else 6 if abs(nanousd) >= 1_000 else NANOUSD
    text = f"{amount.quantize(Decimal(1).scaleb(-decimals), ROUND_FLOOR):,f}"
    whole, _, rest = text.partition(".")
    return f"{'-' * whole.startswith('-')}${whole.lstrip('-')}.{rest.rstrip('0'):0<2}"


def count(number: int) -> str:
    """Return a number for people: 12,345; from a million on 1.23 M."""
    return f"{number:,}" if abs(number) < 1_000_000 else f"{number / 1_000_000:,.2f} M"


def when(given: str | int | None) -> str:
    """Return a time of the API, or unix nanoseconds, as 2024-01-12 10:30 UTC without the zone; "" for None."""
    if given is None:
        return ""
    time = datetime.fromtimestamp(given // 10**9, UTC) if isinstance(given, int) else datetime.fromisoformat(given)
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def milliseconds(microseconds: int) -> str:
    """Return a duration for people; "" for one that is not known."""
    if microseconds < 0:
        return ""
    if microseconds < 10_000:
        return f"{microseconds / 1_000:.1f} ms"
    return f"{microseconds / 1_000:,.0f} ms" if microseconds < 10_000_000 else f"{microseconds / 1_000_000:,.1f} s"


def bar(part: int, most: int) -> int:
    """Return how long a bar is, 0 to 100; what is more than nothing is seen."""
    return max(1, round(100 * part / most)) if part > 0 and most > 0 else 0


# What a page may say after a form did its work; closed, so that a link cannot make it say something else.
DONE = {
    "revoked": "The key is revoked.",
    "rented": "The machine is on its way.",
    "started": "The machine starts.",
    "stopped": "The machine stops; its storage goes on costing.",
    "destroyed": "The machine is being destroyed and costs nothing more.",
    "deleted": "The webhook is deleted.",
    "changed": "Changed.",
    "acknowledged": "Acknowledged.",
    "sent": "On its way; look at the deliveries in a moment.",
    "password": "The password is changed; all other sessions have ended.",
    "credited": "The credit is added.",
    "out": "You are signed out.",
}
