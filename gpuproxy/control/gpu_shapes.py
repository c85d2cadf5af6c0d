"""What the GPU routes take and give."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated

from msgspec import Meta, Struct

from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet, shown_id
from gpuproxy.fleet.rentals import Rental
from gpuproxy.fleet.sight import unseen_since
from gpuproxy.plugin import Offer
from gpuproxy.pricing import with_markup

WAIT_S_MAX = 100.0  # under what a worker waits for the first byte
RESERVED_MAX = 16
NANOUSD = 1_000_000_000

Port = Annotated[int, Meta(ge=1, le=65_535)]
Usd = Annotated[float, Meta(gt=0, le=1_000_000)]
Word = Annotated[str, Meta(max_length=4_096)]
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Image = Annotated[str, Meta(min_length=1, max_length=1_024, pattern="^[!-~]+$")]
SshKey = Annotated[str, Meta(max_length=8_192, pattern=r"^\s*((ssh|ecdsa|sk)-|$)")]  # public ones, a line each
Hours = Annotated[int, Meta(ge=1, le=8_760)]


class NewInstance(Struct, forbid_unknown_fields=True):
    """What to run. Prices are dollars an hour; `wait` answers when it runs, or after that many seconds (true: 100)."""

    image: Image = "nvidia/cuda:12.0.0-base-ubuntu22.04"
    env: Annotated[dict[Name, Word], Meta(max_length=256)] = {}
    ports: Annotated[tuple[Port, ...], Meta(max_length=64)] = (8_000,)
    command: Annotated[
        tuple[Word, ...] | Word,
        Meta(description="words for the entrypoint, or a line for a shell in its place"),
    ] = ()
    disk_gb: Annotated[int, Meta(ge=1, le=100_000)] = 10
    ssh_key: SshKey = ""
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

    Below `proxy_url` and a port inside, the gateway forwards to the machine. `seen_at` is when the provider last told
    of it, `unreachable_since` is set while the provider has lost sight of one that runs: that time is not charged.
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
    seen_at: datetime | None
    unreachable_since: datetime | None
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


def nanousd(usd: float | None) -> int | None:
    """Return dollars in nanodollars, by what the caller wrote and not by its nearest binary fraction."""
    return None if usd is None else int(Decimal(repr(float(usd))).scaleb(9))


def offer_info(fleet: Fleet, offers: Offers, offer: Offer) -> OfferInfo:
    """Return an offer as the API shows it."""
    storage = with_markup(offer.storage_nanousd_per_gb_hour, fleet.markup(offer.provider))
    return OfferInfo(
        id=shown_id(fleet.providers[offer.provider], offer.id),
        provider=offer.provider,
        gpu_model=offer.gpu_model,
        gpu_count=offer.gpu_count,
        vram=offer.vram_gb,
        price_per_hour=offers.price(offer) / NANOUSD,
        storage_price_per_gb_hour=storage / NANOUSD,
        region=offer.region,
        reliability=offer.reliability,
        cuda=offer.cuda,
        spot=offer.is_spot,
        disk_gb=offer.disk_gb,
        details=offer.details,
    )


def rental_info(rental: Rental) -> RentalInfo:
    """Return a rental as the API shows it."""
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
        seen_at=rental.seen_at,
        unreachable_since=unseen_since(rental),
        ended_at=rental.ended_at,
        expires_at=rental.expires_at,
    )
