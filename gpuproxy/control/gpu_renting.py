"""Renting over the API: ``POST /api/v1/gpu/instances/…``. What it does is in `gpuproxy.fleet.rent`."""

import asyncio
import time
from hashlib import sha256
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct, structs

from gpuproxy.access.idempotency import claim_of
from gpuproxy.control.gpu_offers import providers_asked
from gpuproxy.control.gpu_shapes import (
    NANOUSD,
    WAIT_S_MAX,
    NewInstance,
    Reservation,
    Reserved,
    nanousd,
    rental_info,
)
from gpuproxy.control.once import HEADER
from gpuproxy.control.parts import CALLER, FLEET, OFFERS
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import rentals
from gpuproxy.fleet.rent import Wish, cost_with_disk, rent, reserve_all, wait_until_running
from gpuproxy.plugin import SHELL, InstanceSpec, Offer, OfferQuery
from gpuproxy.pricing import with_markup

_encode = msgspec.json.Encoder(order="deterministic").encode
NO_OFFER = Offer(id="", provider="", gpu_model="", gpu_count=0, vram_gb=0, price_nanousd_per_hour=0)


async def rent_offer(request: web.Request, body: NewInstance) -> web.Response:
    """Rent an offer; the first hour's money is set aside, and nothing is rented twice."""
    fleet, offers, began_s = request.app[FLEET], request.app[OFFERS], time.monotonic()
    name = fleet.adapter(request.match_info["provider"]).name
    wish = _wish(request, body, 0)
    if not await _is_repeated(request, wish):
        wish = await _choose(request, body, wish, await offers.get(name, request.match_info["id"]))
    try:
        rental, is_new = await rent(fleet, wish)
    except GatewayError as error:
        if error.code == "CAPACITY_GONE":
            offers.take(name, wish.offer.id)
        raise
    offers.take(name, wish.offer.id, rental.offer_id)
    rental = await wait_until_running(fleet, rental, _wait_s(body, began_s))
    return _replayed(success(rental_info(rental), 201), is_new)


async def reserve(request: web.Request, body: Reservation) -> web.Response:
    """Rent the best offers that fit, all or none."""
    fleet, offers, began_s = request.app[FLEET], request.app[OFFERS], time.monotonic()
    wishes = [_wish(request, body, at) for at in range(body.count)]
    if not await _is_repeated(request, wishes[0]):
        wishes = await _choose_best(request, body, wishes)
    try:
        got, is_new = await reserve_all(fleet, wishes)
    except GatewayError as error:
        if error.code == "CAPACITY_GONE":
            for wish in wishes:
                offers.take(wish.offer.provider, wish.offer.id)
        raise
    for rental in got:
        offers.take(rental.provider, rental.offer_id)
    wait_s = _wait_s(body, began_s)
    got = list(await asyncio.gather(*(wait_until_running(fleet, rental, wait_s) for rental in got)))
    reserved = Reserved(got[0].group_id, [rental_info(rental) for rental in got])
    return _replayed(success(reserved, 201), is_new)


async def _is_repeated(request: web.Request, wish: Wish) -> bool:
    """Tell whether this was asked for before: then no offer is needed, it is taken, by us."""
    key = wish.request_key
    return key is not None and await request.app[FLEET].read(rentals.by_request, key) is not None


async def _choose(request: web.Request, body: NewInstance, wish: Wish, offer: Offer) -> Wish:
    """Wish for an offer and those that may stand in for it, of them only what is not over the most."""
    offers, most = request.app[OFFERS], wish.max_price_nanousd_per_hour
    if offer.is_spot != (body.bid is not None):
        message = "a spot offer needs a bid" if offer.is_spot else "a bid belongs to a spot offer; leave it out"
        raise GatewayError("UNPROCESSABLE", message, param="bid")
    like = await offers.like(offer, most, body.disk_gb) if body.next_best else ()
    fitting = [each for each in like if _misfit(request, body, each) is None]
    if refusal := _misfit(request, body, offer):
        if not fitting:
            raise refusal
    else:
        fitting = [offer, *fitting]
    return structs.replace(wish, offer=fitting[0], others=tuple(fitting[1:]))


def _misfit(request: web.Request, body: NewInstance, offer: Offer) -> GatewayError | None:
    """Return why an offer is none for this caller: others may want it, so the provider is not asked in vain."""
    if 0 < offer.disk_gb < body.disk_gb:
        message = f"disk_gb {body.disk_gb} is over the {offer.disk_gb} of this offer; ask for less, or choose another"
        return GatewayError("UNPROCESSABLE", message, param="disk_gb")
    bid, most = nanousd(body.bid), nanousd(body.max_price)
    price = with_markup(cost_with_disk(offer, body.disk_gb), request.app[FLEET].markup(offer.provider))
    if bid is not None and bid < price:
        return GatewayError("CAPACITY_GONE", f"the bid is below the {price / NANOUSD} this offer takes now; bid more")
    if most is not None and price > most:
        return GatewayError("CAPACITY_GONE", f"the offer costs {price / NANOUSD} now, over max_price; list offers anew")
    return None


async def _choose_best(request: web.Request, body: Reservation, wishes: list[Wish]) -> list[Wish]:
    """Wish for the best offers, each with others of its provider that nobody else gets."""
    names = providers_asked(request, body.provider)
    found, _ = await request.app[OFFERS].find(names, _query_of(body), "price")
    found = [offer for offer in found if _misfit(request, body, offer) is None]
    count = len(wishes)
    if len(found) < count:
        raise GatewayError("CAPACITY_GONE", f"{len(found)} offers fit, {count} are wanted; ask for less")
    chosen, spare = found[:count], found[count:]
    others = [tuple(each for each in spare if each.provider == offer.provider) for offer in chosen]
    return [structs.replace(wish, offer=chosen[at], others=others[at][at::count]) for at, wish in enumerate(wishes)]


def _replayed(response: web.Response, is_new: bool) -> web.Response:
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def _wait_s(body: NewInstance, began_s: float) -> float:
    """Return how long to wait yet; renting takes its part of what a call may take in all."""
    return max(0.0, (WAIT_S_MAX if body.wait is True else float(body.wait)) - (time.monotonic() - began_s))


def _wish(request: web.Request, body: NewInstance, at: int) -> Wish:
    """Return what the body asks for, of an offer that is not chosen yet."""
    caller = request[CALLER]
    return Wish(
        user_id=caller.user_id,
        key_id=caller.root_id,
        offer=NO_OFFER,
        spec=InstanceSpec(
            image=body.image,
            env=body.env,
            ports=tuple(dict.fromkeys(body.ports)),
            command=(*SHELL, body.command) if isinstance(body.command, str) else body.command,
            disk_gb=body.disk_gb,
            ssh_key=body.ssh_key,
            label=body.label,
        ),
        duration_hours=body.duration_hours,
        max_price_nanousd_per_hour=nanousd(body.max_price),
        bid_nanousd_per_hour=nanousd(body.bid),
        **_request_key(request, body, at),
    )


def _request_key(request: web.Request, body: Struct, at: int) -> dict[str, Any]:
    """Return by what a repetition is known: the caller's Idempotency-Key on this route, and what was asked."""
    key = request.headers.get(HEADER)
    if key is None:
        return {}
    caller = request[CALLER]
    claim = claim_of(caller.user_id, f"{request.method} {request.path}", key, _encode([caller.key_id, body]))
    name = "\n".join((claim.user_id, claim.route, claim.key, str(at)))
    return {"request_key": sha256(name.encode()).hexdigest(), "request_hash": claim.request_hash.hex()}


def _query_of(body: Reservation) -> OfferQuery:
    return OfferQuery(
        min_vram_gb=body.min_vram,
        max_price_nanousd_per_hour=nanousd(body.max_price),
        gpu_model=body.gpu_model,
        gpu_count=body.gpu_count,
        region=body.region,
        min_reliability=body.min_reliability,
        min_cuda=body.cuda,
        is_spot=body.bid is not None,
        disk_gb=body.disk_gb,
    )
