"""The JSON of vast.ai and what it means in our nouns: offers, instances, charges. No I/O.

Everything but ids may be missing or null. An offer that makes no sense is passed over, for there are many and others
wrote them; an instance that makes no sense is an error, for we may be paying for it.
"""

from decimal import Decimal
from typing import Any

from msgspec import Struct

from gpuproxy.plugin import ChargeKind, InstanceState, Offer, OfferQuery, ProviderCharge, ProviderInstance, short_model
from gpuproxy_plugins.provider_money import USD_MAX, nanousd, nanousd_enough

NAME = "vast.ai"
SPOT = "-spot"  # an offer searched for as a bid; without a bid vast.ai would silently rent it on demand
MONTH_HOURS = 720  # vast.ai's month: 10 GB at $0.149333 a month are $0.00207407 an hour
MIB_PER_GIB = 1024
MIB_MAX = 1 << 30
SIZES_GB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 128, 141, 180, 192, 256, 288)
SNAP = 0.07  # a card of 24 GB reports 24564 MiB, one of 48 GB 46068
STARTING = frozenset((None, "created", "loading", "rebooting"))
KNOWN = STARTING | {"running", "frozen", "stopped", "exited"}  # not "unknown": no heartbeat; "offline": no host
KINDS: dict[str, ChargeKind] = {"gpu": "gpu", "disk": "storage", "bwd": "traffic", "bwu": "traffic"}


class OfferRow(Struct):
    """One row of a search."""

    id: int
    gpu_name: str
    num_gpus: int
    gpu_ram: float
    dph_total: Decimal | None = None
    min_bid: Decimal | None = None
    storage_cost: Decimal | None = None
    geolocation: str | None = None
    reliability: float | None = None
    reliability2: float | None = None
    cuda_max_good: float | None = None
    disk_space: float | None = None
    verification: str | None = None
    rentable: bool | None = None
    rented: bool | None = None
    direct_port_count: int | None = None
    inet_down: float | None = None
    inet_up: float | None = None
    inet_down_cost: float | None = None
    duration: float | None = None


class InstanceRow(Struct):
    """One instance of ours."""

    id: int
    label: str | None = None
    actual_status: str | None = None
    cur_state: str | None = None
    next_state: str | None = None
    intended_status: str | None = None
    status_msg: str | None = None
    public_ipaddr: str | None = None
    ports: Any = None
    gpu_name: str | None = None
    dph_base: Decimal | None = None
    dph_total: Decimal | None = None
    min_bid: Decimal | None = None
    storage_cost: Decimal | None = None
    disk_space: Decimal | None = None
    is_bid: bool | None = None


class ChargeItem(Struct):
    """A part of a charge."""

    type: str
    amount: Decimal
    description: str | None = None


class ChargeRow(Struct):
    """What one thing cost in a span of time."""

    type: str
    source: str
    amount: Decimal
    start: float | None = None
    end: float | None = None
    items: list[ChargeItem] | None = None


def search_body(query: OfferQuery, models: list[str] | None) -> dict[str, object]:
    """Return the search for offers that may fit; what comes back is looked at again."""
    asked: dict[str, object] = {
        "verified": {"eq": True},
        "external": {"eq": False},
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "disk_space": {"gte": query.disk_gb},
    }
    price = "min_bid" if query.is_spot else "dph_total"
    if models is not None:
        asked["gpu_name"] = {"in": models}
    if query.gpu_count is not None:
        asked["num_gpus"] = {"eq": query.gpu_count}
    if query.min_vram_gb is not None:
        asked["gpu_ram"] = {"gte": int(query.min_vram_gb * MIB_PER_GIB * (1 - SNAP))}
    if query.max_price_nanousd_per_hour is not None:
        asked[price] = {"lte": query.max_price_nanousd_per_hour / 1e9}
    if query.min_reliability is not None:
        asked["reliability"] = {"gte": query.min_reliability}
    if query.min_cuda is not None:
        asked["cuda_max_good"] = {"gte": query.min_cuda}
    if query.region is not None and len(query.region) == 2:
        asked["geolocation"] = {"eq": query.region.upper()}
    kind = "bid" if query.is_spot else "on-demand"
    limit = query.limit if query.region is None or len(query.region) == 2 else 1_000  # the rest is filtered here
    return {**asked, "order": [[price, "asc"]], "type": kind, "limit": limit, "allocated_storage": float(query.disk_gb)}


def read_offer(row: OfferRow, is_spot: bool, disk_gb: int) -> Offer | None:
    """Return an offer, None for a row that cannot be one. Raises ValueError for amounts that make no sense.

    A bid at vast.ai is for the machine without its disk; the price here, as that of any other offer, is for both.
    """
    price = row.min_bid if is_spot else row.dph_total
    is_free = row.rentable is not False and not row.rented and row.verification in (None, "verified")
    if not is_free or not price or row.num_gpus < 1 or not 1 <= row.gpu_ram <= MIB_MAX:
        return None
    storage = nanousd((row.storage_cost or Decimal(0)) / MONTH_HOURS)
    reliability = row.reliability if row.reliability is not None else row.reliability2
    return Offer(
        id=f"{row.id}{SPOT if is_spot else ''}",
        provider=NAME,
        gpu_model=short_model(row.gpu_name),
        gpu_count=row.num_gpus,
        vram_gb=vram_gb(row.gpu_ram),
        price_nanousd_per_hour=nanousd_enough(price) + storage * disk_gb if is_spot else nanousd(price),
        storage_nanousd_per_gb_hour=storage,
        region=(row.geolocation or "").strip(),
        reliability=reliability,
        cuda=row.cuda_max_good,
        is_spot=is_spot,
        disk_gb=int(row.disk_space or 0),
        details=_details(row),
    )


def _details(row: OfferRow) -> dict[str, str]:
    told = {
        "ports": row.direct_port_count,
        "down_mbps": row.inet_down,
        "up_mbps": row.inet_up,
        "down_usd_per_gb": row.inet_down_cost,
        "hours_max": None if row.duration is None else round(row.duration / 3_600),
    }
    return {name: str(value) for name, value in told.items() if value is not None}


def vram_gb(mib: float) -> int:
    """Return the size the card is sold as, or what it reports if that is near no known size."""
    gib = mib / MIB_PER_GIB
    nearest = min(SIZES_GB, key=lambda size: abs(size - gib))
    return nearest if abs(nearest - gib) <= nearest * SNAP else int(gib)


def read_instance(row: InstanceRow) -> ProviderInstance:
    """Return an instance. Raises ValueError for amounts or ports that make no sense."""
    state = instance_state(row)
    is_up = state == "running"
    storage = (row.storage_cost or Decimal(0)) * (row.disk_space or Decimal(0)) / MONTH_HOURS
    return ProviderInstance(
        id=str(row.id),
        tag=row.label or "",
        state=state,
        ip=(row.public_ipaddr or "").strip(),
        ports=read_ports(row.ports) if is_up else {},
        gpu_model=short_model(row.gpu_name or ""),
        price_nanousd_per_hour=nanousd(row.dph_total or Decimal(0)),
        storage_nanousd_per_hour=nanousd(storage),
        message=(row.status_msg or "").strip()[:500],
        is_interrupted=state == "stopped" and is_outbid(row),
        is_reachable=row.actual_status in KNOWN,
    )


def instance_state(row: InstanceRow) -> InstanceState:
    """Return the state that four of vast.ai's columns amount to.

    A start that has to wait for its own GPU is pending. A container that ended by itself has failed. What has
    lost its heartbeat, and any word not known here, is what it was meant to be.
    """
    if row.actual_status == "created" and "OCI runtime create failed" in (row.status_msg or ""):
        return "failed"
    if row.cur_state == row.next_state == row.intended_status == "stopped":
        return "stopped"
    if row.actual_status in ("running", "frozen"):
        return "running"
    if row.actual_status == "exited":
        return "stopped" if row.intended_status == "stopped" else "failed"
    if row.actual_status in STARTING or row.actual_status == "stopped":
        return "stopped" if row.intended_status == "stopped" else "pending"
    return "stopped" if row.intended_status == "stopped" else "running"


def is_outbid(row: InstanceRow) -> bool:
    """Tell whether the market asks more than our bid; vast.ai stops such an instance as if we had asked for it."""
    return bool(row.is_bid) and row.min_bid is not None and row.dph_base is not None and row.min_bid > row.dph_base


def read_ports(ports: object) -> dict[int, int]:
    """Return inside to outside from Docker's map ``{"8000/tcp": [{"HostPort": "40800"}]}``; UDP is passed over."""
    found: dict[int, int] = {}
    for name, bindings in ports.items() if isinstance(ports, dict) else ():
        inside, _, kind = str(name).partition("/")
        first = bindings[0] if isinstance(bindings, list) and bindings else None
        if kind == "tcp" and isinstance(first, dict):
            found[_port(inside)] = _port(first.get("HostPort"))
    return found


def _port(value: object) -> int:
    text = str(value)
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise ValueError(f"{text[:20]!r} is no port")
    return int(text)


def _ns(seconds: float | None) -> int:
    if seconds is None:
        return 0
    if not 0 <= seconds < 1e11:
        raise ValueError(f"{seconds} is no time")
    return round(seconds * 1e9)


def read_charges(row: ChargeRow, since_ns: int, until_ns: int) -> list[ProviderCharge]:
    """Return the parts of a charge for an instance; volumes and serverless are not ours."""
    id = row.source.removeprefix("instance-")
    if row.type != "instance" or not id.isdecimal():
        return []
    items = row.items or [ChargeItem("other", row.amount)]
    return [
        ProviderCharge(
            instance_id=id,
            kind=KINDS.get(item.type, "other"),
            amount_nanousd=nanousd(item.amount, -USD_MAX),  # below zero it is given back
            since_ns=_ns(row.start) or since_ns,
            until_ns=_ns(row.end) or until_ns,
            description=item.description or "",
        )
        for item in items
    ]
