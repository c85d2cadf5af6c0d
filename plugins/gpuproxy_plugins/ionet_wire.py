"""The JSON of io.net and what it means in our nouns: hardware, deployments, containers. No I/O.

Real catalogues hold rows without a GPU and rows that cost nothing; both are passed over. Times may lack a zone and are
UTC then.
"""

import re
from datetime import UTC, datetime
from decimal import Decimal
from urllib.parse import urlsplit

from msgspec import Raw, Struct

from gpuproxy.plugin import SHELL, InstanceSpec, InstanceState, Offer, ProviderInstance, short_model
from gpuproxy_plugins.provider_money import nanousd

NAME = "io.net"
PORT = 8000  # the one port of a container, if the caller names none
STATES: dict[str, InstanceState] = {
    "deployment requested": "pending",
    "running": "running",
    "failed": "failed",
    "termination requested": "destroying",
    "completed": "gone",
    "destroyed": "gone",
}
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class Hardware(Struct):
    """One row of the catalogue. ``price`` is for all cards, an hour; ``deploy_id`` is a word for others' machines.

    Numbers may come as text: later schemas have them so. Whatever came is sent back as it is.
    """

    id: str
    deploy_id: int | str
    name: str
    num_cards: int
    price: Decimal
    vram_per_card: float | None = None
    sold_out: bool = False
    supplier: str | None = None
    interconnect: str | None = None
    storage: float | None = None
    location: str | None = None


class Catalogue(Struct):
    """All of it, its rows not looked at yet."""

    hardware: list[Raw]


class Place(Struct):
    """Where so many replicas can be had. Its id is a number, or in later schemas the country."""

    id: int | str
    iso2: str | None = None
    available_replicas: int = 0


class Quote(Struct):
    """What the whole duration costs, in advance."""

    total_cost_usdc: Decimal


class Deployed(Struct):
    """The answer to a deploy."""

    deployment_id: str
    status: str | None = None


class Listed(Struct):
    """One row of the list."""

    id: str
    status: str
    name: str | None = None
    hardware_name: str | None = None


class Listing(Struct):
    """One page of the list."""

    deployments: list[Listed]
    total: int


class ContainerConfig(Struct):
    """What runs."""

    traffic_port: int | None = None


class Deployment(Struct):
    """One deployment in full."""

    id: str
    status: str
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    amount_paid: Decimal | None = None
    hardware_name: str | None = None
    compute_minutes_served: float | None = None
    compute_minutes_remaining: float | None = None
    container_config: ContainerConfig | None = None


class Event(Struct):
    """Something that happened to a container."""

    time: str | None = None
    message: str | None = None


class Worker(Struct):
    """One container. ``public_url`` is null until it is up."""

    container_id: str
    status: str | None = None
    public_url: str | None = None
    container_events: list[Event] | None = None


class Workers(Struct):
    """The containers of a deployment."""

    workers: list[Worker]


def read_offer(row: Hardware) -> Offer | None:
    """Return an offer, None for a row that cannot be deployed as a container. Raises ValueError for odd amounts.

    Machines of other suppliers have ids like ``8H100.80S.176V``, which the container API does not take: they can only
    be had as VMs.
    """
    is_container = not isinstance(row.deploy_id, str) or row.deploy_id.isdecimal()
    if row.sold_out or row.num_cards < 1 or row.price <= 0 or not row.vram_per_card or not is_container:
        return None
    return Offer(
        id=row.id,
        provider=NAME,
        gpu_model=short_model(row.name),
        gpu_count=row.num_cards,
        vram_gb=int(row.vram_per_card),
        price_nanousd_per_hour=nanousd(row.price),
        region=(row.location or "").strip(),
        disk_gb=int(row.storage or 0),
        details={"interconnect": row.interconnect} if row.interconnect else {},
    )


def deploy_body(spec: InstanceSpec, tag: str, row: Hardware, place: Place) -> dict[str, object]:
    """Return the body that deploys one container. ``$`` is doubled, or their Terraform would read it."""
    port = spec.ports[0] if spec.ports else PORT
    container: dict[str, object] = {
        "replica_count": 1,
        "traffic_port": port,
        "env_variables": {name: value for name, value in spec.env.items() if not SECRET.search(name)},
        "secret_env_variables": {name: value for name, value in spec.env.items() if SECRET.search(name)},
    }
    words = [word.replace("$", "$$") for word in spec.command]
    if spec.command[:2] == SHELL:
        container |= {"entrypoint": words[:2], "args": words[2:]}
    elif words:
        container["args"] = words
    return {
        "resource_private_name": tag,
        "duration_hours": spec.duration_hours,
        "gpus_per_container": row.num_cards,
        "hardware_id": row.deploy_id,
        "location_ids": [place.id],
        "container_config": container,
        "registry_config": {"image_url": spec.image, "registry_username": None, "registry_secret": None},
    }


def read_listed(row: Listed) -> ProviderInstance:
    """Return what the list tells of a deployment; address and cost it does not. Raises ValueError."""
    return ProviderInstance(
        id=row.id,
        tag=row.name or "",
        state=read_state(row.status),
        gpu_model=short_model(row.hardware_name or ""),
    )


def read_deployment(row: Deployment, workers: list[Worker], tag: str) -> ProviderInstance:
    """Return a deployment with the address of its first container; it is pending until it has one."""
    state = read_state(row.status)
    url = next((worker.public_url for worker in workers if worker.public_url), None)
    if state == "running" and url is None:
        state = "pending"
    host, outside, is_tls = read_url(url) if url and state == "running" else ("", 0, False)
    inside = (row.container_config.traffic_port if row.container_config else None) or PORT
    paid = nanousd(row.amount_paid or Decimal(0))
    return ProviderInstance(
        id=row.id,
        tag=tag,
        state=state,
        ip=host,
        ports={inside: outside} if host else {},
        is_tls=is_tls,
        gpu_model=short_model(row.hardware_name or ""),
        price_nanousd_per_hour=hourly_nanousd(row, paid),
        started_ns=read_time_ns(row.started_at),
        message="expired" if row.status == "completed" else _last_event(workers),
        paid_nanousd=paid,
    )


def hourly_nanousd(row: Deployment, paid_nanousd: int) -> int:
    """Return what an hour of it costs: what was paid, over all the minutes it was paid for."""
    minutes = (row.compute_minutes_served or 0) + (row.compute_minutes_remaining or 0)
    return round(paid_nanousd * 60 / minutes) if minutes > 0 else 0


def read_state(status: str) -> InstanceState:
    """Return the state. Raises ValueError for a word not known, which may mean anything."""
    if status not in STATES:
        raise ValueError(f"status {status[:40]!r} is unknown; known: {', '.join(STATES)}")
    return STATES[status]


def read_url(url: str) -> tuple[str, int, bool]:
    """Return host, port and whether it is TLS. Raises ValueError for what is no web address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"public_url {url[:80]!r} is no web address")
    is_tls = parts.scheme == "https"
    return parts.hostname, parts.port or (443 if is_tls else 80), is_tls


def read_time_ns(text: str | None) -> int:
    """Return a time, 0 for none. Raises ValueError."""
    if not text:
        return 0
    told = datetime.fromisoformat(text)
    return round((told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp() * 1e9)


def _last_event(workers: list[Worker]) -> str:
    events = [event.message for worker in workers for event in worker.container_events or [] if event.message]
    return events[-1][:500] if events else ""
