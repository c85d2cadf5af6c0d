"""What can be rented: ``GET /api/v1/gpu/instances``. Where offers come from is in `gpuproxy.fleet.offers`."""

import math
import re
from base64 import b64decode, urlsafe_b64encode
from typing import Any

import msgspec
from aiohttp import web

from gpuproxy.control.gpu_shapes import nanousd, offer_info
from gpuproxy.control.parts import FLEET, OFFERS
from gpuproxy.control.query import count_asked
from gpuproxy.control.respond import answer, success
from gpuproxy.errors import GatewayError
from gpuproxy.fleet.offers import SORTS, Rank
from gpuproxy.plugin import OfferQuery

ALL = "all"
Place = tuple[str, float, int, str, str]
FLAGS = {"true": True, "1": True, "false": False, "0": False}
OFFERS_DEFAULT, OFFERS_SHOWN_MAX = 100, 1_000

LIST_QUERY = {
    "provider": "a provider's name; all if left out",
    "min_vram": "gigabytes of memory, each GPU",
    "max_price": "dollars an hour, the whole offer",
    "gpu_model": "such as RTX 4090",
    "gpu_count": "how many GPUs",
    "region": "a country such as US, or a part of the region's name",
    "min_reliability": "0 to 1",
    "cuda": "the least CUDA version, such as 12.4",
    "spot": "true: interruptible ones, which go to the highest bidder",
    "sort": f"{', '.join(SORTS)}; price if left out",
    "limit": f"how many, 1 to {OFFERS_SHOWN_MAX}; {OFFERS_DEFAULT} if left out",
    "cursor": "the next_cursor of the page before",
}

_is_number = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?").fullmatch


async def list_offers(request: web.Request) -> web.Response:
    """List what can be rented, from all providers at once."""
    fleet, offers = request.app[FLEET], request.app[OFFERS]
    names = providers_asked(request, request.query.get("provider", ALL))
    sort, limit = _sort_asked(request), count_asked(request, "limit", OFFERS_DEFAULT, OFFERS_SHOWN_MAX)
    after = _after(request, sort)
    found, providers = await offers.find(names, _query_asked(request), sort)
    rest = found if after is None else [offer for offer in found if offers.rank(offer, sort) > after]
    shown = [offer_info(fleet, offers, offer) for offer in rest[:limit]]
    fields: dict[str, Any] = {"data": shown, "count": len(shown), "status": "success", "providers": providers}
    return answer(fields | ({"next_cursor": _cursor(sort, offers.rank(rest[limit - 1], sort))} if rest[limit:] else {}))


async def show_offer(request: web.Request) -> web.Response:
    """Show one offer."""
    fleet, offers = request.app[FLEET], request.app[OFFERS]
    name = fleet.adapter(request.match_info["provider"]).name
    return success(offer_info(fleet, offers, await offers.get(name, request.match_info["id"])))


def providers_asked(request: web.Request, name: str) -> list[str]:
    fleet = request.app[FLEET]
    return list(fleet.providers) if name == ALL else [fleet.adapter(name).name]


def _query_asked(request: web.Request) -> OfferQuery:
    most = _number(request, "max_price", 0, 1_000_000)
    return OfferQuery(
        min_vram_gb=_whole(request, "min_vram", 10_000),
        max_price_nanousd_per_hour=nanousd(most),
        gpu_model=_text(request, "gpu_model"),
        gpu_count=_whole(request, "gpu_count", 64),
        region=_text(request, "region"),
        min_reliability=_number(request, "min_reliability", 0, 1),
        min_cuda=_number(request, "cuda", 0, 100),
        is_spot=flag(request, "spot"),
    )


def _sort_asked(request: web.Request) -> str:
    sort = request.query.get("sort", "price")
    if sort not in SORTS:
        message = f"sort={sort[:40]!r} is unknown; known: {', '.join(SORTS)}"
        raise GatewayError("UNPROCESSABLE", message, param="sort")
    return sort


def _cursor(sort: str, rank: Rank) -> str:
    """Return what stands for the place after an offer: offers come and go between two pages, so a count would not."""
    return urlsafe_b64encode(msgspec.json.encode((sort, *rank))).decode().rstrip("=")


def _after(request: web.Request, sort: str) -> Rank | None:
    text = request.query.get("cursor")
    if text is None:
        return None
    try:
        of, *rank = msgspec.json.decode(b64decode(text + "=" * (-len(text) % 4), b"-_", True), type=Place)
    except ValueError:
        of, rank = "", []
    if of != sort:
        message = f"cursor={text[:40]!r} belongs to no list in this order; begin anew without it"
        raise GatewayError("UNPROCESSABLE", message, param="cursor")
    return tuple(rank)


def _number(request: web.Request, name: str, least: float, most: float) -> float | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not (_is_number(text) and least <= float(text) <= most):
        raise GatewayError("UNPROCESSABLE", f"{name}={text[:40]!r} is no number from {least:g} to {most:g}", param=name)
    return float(text)


def _whole(request: web.Request, name: str, most: int) -> int | None:
    number = _number(request, name, 0, most)
    return None if number is None else math.ceil(number)


def _text(request: web.Request, name: str) -> str | None:
    text = request.query.get(name)
    if text is not None and not 0 < len(text) <= 100:
        raise GatewayError("UNPROCESSABLE", f"{name} has to be 1 to 100 characters", param=name)
    return text


def flag(request: web.Request, name: str) -> bool | None:
    text = request.query.get(name)
    if text is not None and text.lower() not in FLAGS:
        raise GatewayError("UNPROCESSABLE", f"{name}={text[:40]!r} is neither true nor false", param=name)
    return None if text is None else FLAGS[text.lower()]
