"""Providers as admins see them: ``/api/v1/admin/fleet``. What is found there is in `gpuproxy.fleet.findings`."""

from datetime import UTC, datetime

from aiohttp import web
from msgspec import Struct

from gpuproxy.access.audit import note
from gpuproxy.control.gpu_offers import flag
from gpuproxy.control.money import Usd, usd
from gpuproxy.control.parts import CALLER, FLEET, OFFERS, STORE
from gpuproxy.control.query import PAGE, page_asked
from gpuproxy.control.respond import listing, page_of, success
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import findings
from gpuproxy.fleet.findings import KINDS, Look
from gpuproxy.fleet.rentals import in_states
from gpuproxy.fleet.sight import unreachable_counts

FINDINGS_QUERY = {
    "provider": "of this provider; all if left out",
    "kind": f"{', '.join(KINDS)}; all if left out",
    "all": "true: also those that are over or acknowledged",
    **PAGE,
}

SWITCHED_OFF = "it is switched off, and rentals wait for it: put it into [[providers]] until they have ended"


class Compared(Struct):
    """Rentals that ended before `until`: what their provider took, and what we had counted; traffic on top of that."""

    until: datetime | None
    rental_count: int
    told: Usd
    counted: Usd
    unknown: Usd
    traffic: Usd
    differing_count: int


class ProviderInfo(Struct):
    """A provider: when it last told what is rented, and what is amiss; `error` is empty if the last look went well.

    `instance_count` is of its last list, `rental_count` of ours that have not ended, `unreachable_count` of those that
    should run and nobody knows how they are; the other counts are of findings.
    """

    id: str
    basis: str
    looked_at: datetime | None
    listed_at: datetime | None
    error: str
    offers_error: str
    instance_count: int
    rental_count: int
    stray_count: int
    foreign_count: int
    difference_count: int
    unreachable_count: int
    compare_error: str
    compared: Compared | None


async def list_providers(request: web.Request) -> web.Response:
    """List the providers, how they are, and how much of what they list or charge is not as expected.

    One that is switched off is shown while rentals wait for it.
    """
    fleet, faults = request.app[FLEET], request.app[OFFERS].faults()
    looks = await fleet.read(findings.looks)
    counts = await fleet.read(findings.open_counts)
    rows, unreachable = await fleet.read(in_states), await fleet.read(unreachable_counts)
    bases: dict[str, str] = {row.provider: row.basis for row in rows if row.provider not in fleet.providers}
    bases = {name: adapter.basis for name, adapter in fleet.providers.items()} | bases
    shown = []
    for name, basis in bases.items():
        look = looks.get(name, Look(name))
        shown.append(
            ProviderInfo(
                id=name,
                basis=basis,
                looked_at=look.looked_at,
                listed_at=look.listed_at,
                error=look.error if name in fleet.providers else SWITCHED_OFF,
                offers_error=faults.get(name, ""),
                instance_count=look.instance_count,
                rental_count=sum(row.provider == name for row in rows),
                stray_count=counts.get((name, "stray"), 0),
                foreign_count=counts.get((name, "foreign"), 0),
                difference_count=counts.get((name, "difference"), 0),
                unreachable_count=unreachable.get(name, 0),
                compare_error=look.compare_error,
                compared=_compared(look),
            )
        )
    return listing(shown)


async def list_findings(request: web.Request) -> web.Response:
    """List strays, foreign instances, and rentals whose provider took other than we counted; oldest first."""
    kind, provider, page = request.query.get("kind", ""), request.query.get("provider", ""), page_asked(request)
    if kind and kind not in KINDS:
        raise GatewayError("UNPROCESSABLE", f"kind={kind[:40]!r} is unknown; known: {', '.join(KINDS)}", param="kind")
    name = request.app[FLEET].adapter(provider).name if provider else ""
    found = await request.app[FLEET].read(findings.page, page, name, kind, bool(flag(request, "all")))
    return page_of(found, page.limit)


async def acknowledge(request: web.Request) -> web.Response:
    """Close a finding: somebody has seen to it."""
    async with request.app[STORE].writing() as connection:
        found = await connection.run_sync(findings.acknowledge, request.match_info["id"], datetime.now(UTC))
        detail = {"provider": found.provider, "kind": found.kind, "subject_id": found.subject_id}
        await note(connection, request[CALLER], "finding.acknowledge", found.id, detail)
    return success(found)


def _compared(look: Look) -> Compared | None:
    told = look.comparison
    if told is None:
        return None
    return Compared(
        until=look.compared_until,
        rental_count=told["rental_count"],
        told=usd(told["told_nanousd"]),
        counted=usd(told["counted_nanousd"]),
        unknown=usd(told["unknown_nanousd"]),
        traffic=usd(told.get("traffic_nanousd", 0)),
        differing_count=told["differing"],
    )
