"""``/dashboard/rentals``: machines that run, and offers to rent more."""

import re
from typing import Any

from aiohttp import web

from gpuproxy.control import gpu_offers, gpu_rentals, gpu_renting
from gpuproxy.control.gpu_shapes import NewInstance
from gpuproxy.control.here import base_url
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import FLEET
from gpuproxy.errors import GatewayError
from gpuproxy.fleet.offers import SORTS

FILTERS = ("provider", "gpu_model", "gpu_count", "min_vram", "max_price", "region", "spot", "sort", "cursor")
OFFERS_SHOWN = "25"
LOG_LINES = "200"
_is_amount = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?").fullmatch


async def show(visit: Visit) -> web.StreamResponse:
    """Show the machines, and what is offered."""
    is_all = visit.request.query.get("all") == "1"
    rented = await visit.ask(gpu_rentals.list_rentals, query={} if is_all else {"living": "true"})
    offered, fault = await _offered(visit)
    return page(
        visit,
        "rentals.html",
        rentals=rented["data"],
        is_all=is_all,
        offers=offered["data"],
        next=offered.get("next_cursor"),
        told_by=offered.get("providers", {}),
        fault=fault,
        asked=visit.query(*FILTERS),
        providers=list(visit.request.app[FLEET].providers),
        sorts=SORTS,
    )


async def _offered(visit: Visit) -> tuple[Any, str]:
    """Return what is offered; a filter that makes no sense shows why, and the machines all the same."""
    try:
        return await visit.ask(gpu_offers.list_offers, query={**visit.query(*FILTERS), "limit": OFFERS_SHOWN}), ""
    except GatewayError as error:
        return {"data": []}, error.message


async def show_one(visit: Visit) -> web.StreamResponse:
    """Show a machine: where it is reached, what it costs, what it printed if that is asked for."""
    rental = (await visit.ask(gpu_rentals.show_rental, id=visit.id))["data"]
    logs = None
    if visit.request.query.get("logs") == "1":
        logs = (await visit.ask(gpu_rentals.show_logs, query={"tail": LOG_LINES}, id=visit.id))["data"]["logs"]
    return page(visit, "rental.html", rental=rental, logs=logs, base_url=base_url(visit.request))


async def show_offer(visit: Visit) -> web.StreamResponse:
    """Show an offer and ask what shall run on it."""
    names = visit.request.match_info
    offer = (await visit.ask(gpu_offers.show_offer, provider=names["provider"], id=names["id"]))["data"]
    return page(visit, "rent.html", offer=offer, form=visit.form, default=NewInstance())


async def rent(visit: Visit) -> web.StreamResponse:
    """Rent the offer, at no other price than was shown."""
    names = visit.request.match_info
    await visit.ask(gpu_renting.rent_offer, _wish(visit), provider=names["provider"], id=names["id"])
    return see_other(f"{PREFIX}/rentals?done=rented")


def _wish(visit: Visit) -> dict[str, Any]:
    body: dict[str, Any] = visit.filled("image", "command", "ssh_key", "label")
    body["ports"] = [_port(word) for word in visit.words("ports")]
    body |= {name: number for name in ("disk_gb", "duration_hours") if (number := visit.whole(name)) is not None}
    body |= {name: _amount(name, text) for name, text in visit.filled("max_price", "bid").items()}
    return body


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 5):
        raise GatewayError(
            "UNPROCESSABLE", f"ports: {word[:20]!r} is no port; write numbers such as 8000", param="ports"
        )
    return int(word)


def _amount(name: str, text: str) -> float:
    if not _is_amount(text):
        raise GatewayError(
            "UNPROCESSABLE", f"{name}: {text[:20]!r} is no amount; write dollars such as 0.25", param=name
        )
    return float(text)


async def start(visit: Visit) -> web.StreamResponse:
    """Start a stopped machine."""
    await visit.ask(gpu_rentals.start, id=visit.id)
    return see_other(f"{PREFIX}/rentals?done=started")


async def stop(visit: Visit) -> web.StreamResponse:
    """Stop a running machine."""
    await visit.ask(gpu_rentals.stop, id=visit.id)
    return see_other(f"{PREFIX}/rentals?done=stopped")


async def destroy(visit: Visit) -> web.StreamResponse:
    """Destroy a machine for good."""
    rental = (await visit.ask(gpu_rentals.show_rental, id=visit.id))["data"]
    await visit.ask(gpu_rentals.destroy, provider=rental["provider"], id=visit.id)
    return see_other(f"{PREFIX}/rentals?done=destroyed")
