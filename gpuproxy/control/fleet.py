"""GPUs to rent and the caller's rentals: ``/api/v1/gpu/…``. What it does is in `gpuproxy.fleet`."""

import asyncio
import math
import re
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct, structs

from gpuproxy.access.idempotency import claim_of
from gpuproxy.control.once import HEADER
from gpuproxy.control.parts import CALLER, FLEET, OFFERS
from gpuproxy.control.query import count_asked, page_asked
from gpuproxy.control.respond import answer, success
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care, rentals
from gpuproxy.fleet.offers import OFFERS_MAX, SORTS
from gpuproxy.fleet.parts import failure_of, shown_id
from gpuproxy.fleet.rent import Wish, rent, reserve_all, wait_until_running
from gpuproxy.fleet.rentals import Rental
from gpuproxy.fleet.states import ENDED
from gpuproxy.plugin import InstanceSpec, Offer, OfferQuery, ProviderError
from gpuproxy.pricing import with_markup

ALL = "all"
FLAGS = {"true": True, "1": True, "false": False, "0": False}

OFFERS_DEFAULT, OFFERS_SHOWN_MAX = 100, 1_000
WAIT_S_MAX = 100.0  # under what a worker waits for the first byte
LINES_DEFAULT, LINES_MAX = 100, 5_000
RESERVED_MAX = 16
NANOUSD = 1_000_000_000

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
RENTALS_QUERY = {
    "limit": "how many, 1 to 1000; 100 if left out",
    "cursor": "the next_cursor of the page before",
    "living": "true: without those that have ended",
}
LOGS_QUERY = {"tail": f"how many of the last lines, 1 to {LINES_MAX}; {LINES_DEFAULT} if left out"}

_is_number = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?").fullmatch
_encode = msgspec.json.Encoder(order="deterministic").encode
NO_OFFER = Offer(id="", provider="", gpu_model="", gpu_count=0, vram_gb=0, price_nanousd_per_hour=0)

Port = Annotated[int, Meta(ge=1, le=65_535)]
Usd = Annotated[float, Meta(gt=0, le=1_000_000)]
Word = Annotated[str, Meta(max_length=4_096)]
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Hours = Annotated[int, Meta(ge=1, le=8_760)]


class NewInstance(Struct, forbid_unknown_fields=True):
    """What to run. Prices are dollars an hour; `wait` answers when it runs, or after that many seconds (true: 100)."""

    image: Annotated[str, Meta(min_length=1, max_length=1_024)] = "nvidia/cuda:12.0.0-base-ubuntu22.04"
    env: Annotated[dict[Name, Word], Meta(max_length=256)] = {}
    ports: Annotated[tuple[Port, ...], Meta(max_length=64)] = (8_000,)
    command: Annotated[tuple[Word, ...] | Word, Meta(description="words, or one line for a shell")] = ()
    disk_gb: Annotated[int, Meta(ge=1, le=100_000)] = 10
    ssh_key: Annotated[str, Meta(max_length=8_192)] = ""
    duration_hours: Hours | None = None
    max_price: Usd | None = None
    bid: Usd | None = None
    label: Annotated[str, Meta(max_length=200)] = ""
    wait: bool | Annotated[float, Meta(ge=0, le=WAIT_S_MAX)] = False
    next_best: Annotated[bool, Meta(description="take a like offer, no dearer, if this one is gone")] = False


class Reservation(NewInstance, kw_only=True):
    """Several machines, all or none: the `count` best offers that fit."""

    count: Annotated[int, Meta(ge=1, le=RESERVED_MAX)]
    provider: str = "all"
    gpu_model: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    gpu_count: Annotated[int, Meta(ge=1, le=64)] | None = None
    min_vram: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    region: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    min_reliability: Annotated[float, Meta(ge=0, le=1)] | None = None
    cuda: Annotated[float, Meta(ge=0, le=100)] | None = None


class OfferInfo(Struct):
    """Something that can be rented. `vram` is of each GPU in gigabytes, the price of all of them in dollars."""

    id: str
    provider: str
    gpu_model: str
    gpu_count: int
    vram: int
    price_per_hour: float
    storage_price_per_gb_hour: float
    region: str
    reliability: float | None
    cuda: float | None
    spot: bool
    disk_gb: int
    details: dict[str, str]


class RentalInfo(Struct):
    """A rental. `ports` lead from a port inside the machine to the one outside on `ip`; `cost` is what it cost so far.

    Below `proxy_url` and a port inside, the gateway forwards to the machine.
    """

    contract_id: str
    instance_id: str
    provider: str
    status: str
    reason: str
    label: str
    gpu_model: str
    gpu_count: int
    region: str
    ip: str
    ports: dict[str, int]
    proxy_url: str
    image: str
    price_per_hour: float
    storage_price_per_hour: float
    cost: float
    reservation_id: str
    created_at: datetime
    running_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime | None


class Reserved(Struct):
    """What a reservation got."""

    reservation_id: str
    instances: list[RentalInfo]


class Logs(Struct):
    """The last lines of what a machine printed."""

    contract_id: str
    logs: str


async def list_offers(request: web.Request) -> web.Response:
    """List what can be rented, from all providers at once."""
    offers = request.app[OFFERS]
    names = _providers_asked(request, request.query.get("provider", ALL))
    sort, limit = _sort_asked(request), count_asked(request, "limit", OFFERS_DEFAULT, OFFERS_SHOWN_MAX)
    begin = int(_number(request, "cursor", 0, OFFERS_MAX) or 0)
    found, providers = await offers.find(names, _query_asked(request), sort)
    shown = [_offer_info(request, offer) for offer in found[begin : begin + limit]]
    fields: dict[str, Any] = {"data": shown, "count": len(shown), "status": "success", "providers": providers}
    return answer(fields | ({"next_cursor": str(begin + limit)} if begin + limit < len(found) else {}))


async def show_offer(request: web.Request) -> web.Response:
    """Show one offer."""
    name = request.app[FLEET].adapter(request.match_info["provider"]).name
    return success(_offer_info(request, await request.app[OFFERS].get(name, request.match_info["id"])))


async def rent_offer(request: web.Request, body: NewInstance) -> web.Response:
    """Rent an offer; the first hour's money is set aside, and nothing is rented twice."""
    fleet, offers = request.app[FLEET], request.app[OFFERS]
    name = fleet.adapter(request.match_info["provider"]).name
    wish = _wish(request, body, 0)
    before = await fleet.read(rentals.by_request, wish.request_key) if wish.request_key else None
    if before is None:  # a repetition needs no offer: it is taken, by us
        offer = await offers.get(name, request.match_info["id"])
        most = wish.max_price_nanousd_per_hour
        others = await offers.like(offer, most) if body.next_best else ()
        wish = structs.replace(wish, offer=offer, others=others)
        _check_terms(request, body, offer)
    try:
        rental, is_new = await rent(fleet, wish)
    finally:
        offers.take(name, wish.offer.id)
    offers.take(name, rental.offer_id)
    return await _made(request, body, rental, is_new)


async def reserve(request: web.Request, body: Reservation) -> web.Response:
    """Rent the best offers that fit, all or none."""
    fleet, offers = request.app[FLEET], request.app[OFFERS]
    names = _providers_asked(request, body.provider)
    found, _ = await offers.find(names, _query_of(body), "price")
    if len(found) < body.count:
        raise GatewayError("CAPACITY_GONE", f"{len(found)} offers fit, {body.count} are wanted; ask for less")
    spare = tuple(found[body.count :])
    chosen = [
        structs.replace(
            _wish(request, body, at),
            offer=offer,
            others=tuple(each for each in spare if each.provider == offer.provider)[at :: body.count],
        )
        for at, offer in enumerate(found[: body.count])
    ]
    try:
        got, is_new = await reserve_all(fleet, chosen)
    finally:
        for wish in chosen:
            offers.take(wish.offer.provider, wish.offer.id)
    wait_s = _wait_s(body)
    got = list(await asyncio.gather(*(wait_until_running(fleet, rental, wait_s) for rental in got)))
    reserved = Reserved(got[0].group_id, [_rental_info(rental) for rental in got])
    return _replayed(success(reserved, 201), is_new)


async def list_rentals(request: web.Request) -> web.Response:
    """List the caller's rentals, oldest first, also those that have ended."""
    page = page_asked(request)
    is_living = _flag(request, "living")
    found = await request.app[FLEET].read(rentals.page_of_user, request[CALLER].user_id, page, bool(is_living))
    shown = [_rental_info(rental) for rental in found]
    fields: dict[str, Any] = {"data": shown, "count": len(shown), "status": "success"}
    return answer(fields | ({"next_cursor": found[-1].id} if len(found) == page.limit else {}))


async def show_rental(request: web.Request) -> web.Response:
    """Show a rental."""
    return success(_rental_info(await _own(request)))


async def show_logs(request: web.Request) -> web.Response:
    """Show the last lines of what a machine printed."""
    rental = await _own(request)
    tail = count_asked(request, "tail", LINES_DEFAULT, LINES_MAX)
    if not rental.native_id or rental.state in ENDED:
        raise GatewayError("CONFLICT", f"rental {rental.id} is {rental.state}; it has no log")
    try:
        text = await request.app[FLEET].adapter(rental.provider).logs(rental.native_id, tail)
    except ProviderError as error:
        raise failure_of(error) from error
    return success(Logs(rental.id, text))


async def start(request: web.Request) -> web.Response:
    """Start a stopped machine."""
    return success(_rental_info(await care.start(request.app[FLEET], await _own(request))))


async def stop(request: web.Request) -> web.Response:
    """Stop a running machine; its storage goes on costing."""
    return success(_rental_info(await care.stop(request.app[FLEET], await _own(request))))


async def destroy(request: web.Request) -> web.Response:
    """Destroy a rental for good; it costs nothing from now on. Again changes nothing."""
    name = request.app[FLEET].adapter(request.match_info["provider"]).name
    return success(_rental_info(await care.destroy(request.app[FLEET], await _own(request, name))))


async def _own(request: web.Request, provider: str | None = None) -> Rental:
    name, user_id = request.match_info["id"], request[CALLER].user_id
    rental: Rental = await request.app[FLEET].read(rentals.named, name, user_id, provider)
    return rental


async def _made(request: web.Request, body: NewInstance, rental: Rental, is_new: bool) -> web.Response:
    rental = await wait_until_running(request.app[FLEET], rental, _wait_s(body))
    return _replayed(success(_rental_info(rental), 201), is_new)


def _replayed(response: web.Response, is_new: bool) -> web.Response:
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def _wait_s(body: NewInstance) -> float:
    return WAIT_S_MAX if body.wait is True else float(body.wait)


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
            command=("sh", "-c", body.command) if isinstance(body.command, str) else body.command,
            disk_gb=body.disk_gb,
            ssh_key=body.ssh_key,
            label=body.label,
        ),
        duration_hours=body.duration_hours,
        max_price_nanousd_per_hour=_nanousd(body.max_price),
        bid_nanousd_per_hour=_nanousd(body.bid),
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


def _check_terms(request: web.Request, body: NewInstance, offer: Offer) -> None:
    if offer.is_spot != (body.bid is not None):
        message = "a spot offer needs a bid" if offer.is_spot else "a bid belongs to a spot offer; leave it out"
        raise GatewayError("UNPROCESSABLE", message, param="bid")
    price = request.app[OFFERS].price(offer)
    most = _nanousd(body.max_price)
    if most is not None and price > most and not body.next_best:
        raise GatewayError("CAPACITY_GONE", f"the offer costs {price / NANOUSD} now, over max_price; list offers anew")


def _providers_asked(request: web.Request, name: str) -> list[str]:
    fleet = request.app[FLEET]
    return list(fleet.providers) if name == ALL else [fleet.adapter(name).name]


def _query_asked(request: web.Request) -> OfferQuery:
    most = _number(request, "max_price", 0, 1_000_000)
    return OfferQuery(
        min_vram_gb=_whole(request, "min_vram", 10_000),
        max_price_nanousd_per_hour=_nanousd(most),
        gpu_model=_text(request, "gpu_model"),
        gpu_count=_whole(request, "gpu_count", 64),
        region=_text(request, "region"),
        min_reliability=_number(request, "min_reliability", 0, 1),
        min_cuda=_number(request, "cuda", 0, 100),
        is_spot=_flag(request, "spot"),
    )


def _query_of(body: Reservation) -> OfferQuery:
    return OfferQuery(
        min_vram_gb=body.min_vram,
        max_price_nanousd_per_hour=_nanousd(body.max_price),
        gpu_model=body.gpu_model,
        gpu_count=body.gpu_count,
        region=body.region,
        min_reliability=body.min_reliability,
        min_cuda=body.cuda,
        is_spot=body.bid is not None,
    )


def _sort_asked(request: web.Request) -> str:
    sort = request.query.get("sort", "price")
    if sort not in SORTS:
        message = f"sort={sort[:40]!r} is unknown; known: {', '.join(SORTS)}"
        raise GatewayError("UNPROCESSABLE", message, param="sort")
    return sort


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


def _flag(request: web.Request, name: str) -> bool | None:
    text = request.query.get(name)
    if text is not None and text.lower() not in FLAGS:
        raise GatewayError("UNPROCESSABLE", f"{name}={text[:40]!r} is neither true nor false", param=name)
    return None if text is None else FLAGS[text.lower()]


def _nanousd(usd: float | None) -> int | None:
    """Return dollars in nanodollars, by what the caller wrote and not by its nearest binary fraction."""
    return None if usd is None else int(Decimal(repr(float(usd))).scaleb(9))


def _offer_info(request: web.Request, offer: Offer) -> OfferInfo:
    fleet = request.app[FLEET]
    storage = with_markup(offer.storage_nanousd_per_gb_hour, fleet.markup(offer.provider))
    return OfferInfo(
        id=shown_id(fleet.providers[offer.provider], offer.id),
        provider=offer.provider,
        gpu_model=offer.gpu_model,
        gpu_count=offer.gpu_count,
        vram=offer.vram_gb,
        price_per_hour=request.app[OFFERS].price(offer) / NANOUSD,
        storage_price_per_gb_hour=storage / NANOUSD,
        region=offer.region,
        reliability=offer.reliability,
        cuda=offer.cuda,
        spot=offer.is_spot,
        disk_gb=offer.disk_gb,
        details=offer.details,
    )


def _rental_info(rental: Rental) -> RentalInfo:
    is_up = rental.state == "running"
    return RentalInfo(
        contract_id=rental.id,
        instance_id=rental.instance_id,
        provider=rental.provider,
        status=rental.state,
        reason=rental.reason,
        label=rental.label,
        gpu_model=rental.gpu_model,
        gpu_count=rental.gpu_count,
        region=rental.region,
        ip=rental.ip if is_up else "",
        ports=rental.ports if is_up else {},
        proxy_url=f"/api/v1/gpu/proxy/instances/{rental.id}",
        image=rental.spec.get("image", ""),
        price_per_hour=rental.price_nanousd_per_hour / NANOUSD,
        storage_price_per_hour=rental.storage_price_nanousd_per_hour / NANOUSD,
        cost=rental.charged_nanousd / NANOUSD,
        reservation_id=rental.group_id,
        created_at=rental.created_at,
        running_at=rental.running_at,
        ended_at=rental.ended_at,
        expires_at=rental.expires_at,
    )
