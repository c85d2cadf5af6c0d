"""Health: what an operator sees, and what a load balancer asks.

A database that is away makes the gateway degraded, not unready: workers go on with what they know, and taking
every node out of service because their one database is down would turn a slow hour into an outage. Without room for
the journal every call is refused: that is what makes it unhealthy.
"""

import asyncio
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

from aiohttp import web
from msgspec import Struct

from gpuproxy import __version__
from gpuproxy.control.metrics import GAUGES_READ
from gpuproxy.control.pages import front
from gpuproxy.control.parts import CONFIG, INGEST, NODES, OFFERS, STOPPING, STORE
from gpuproxy.control.respond import answer
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store

CHECK_TIMEOUT_S = 1.0
ABOUT = {"name": "gpuproxy", "version": __version__}


class About(Struct):
    """What answers here."""

    name: str
    version: str


class Status(Struct):
    """``ok``."""

    status: str


class Health(Struct):
    """``ok``, ``degraded``, or with 503 ``unhealthy``; every part is ``healthy``, ``degraded``, ``unhealthy`` or
    ``not_configured``. The journal is named when it has no room.
    """

    status: str
    timestamp: str
    version: str
    services: dict[str, str]


async def about(request: web.Request) -> web.Response:
    """Say what this is; browsers get a page."""
    response = await front.show(request) if front.is_for_people(request) else answer(ABOUT)
    response.headers["Vary"] = "Accept"
    return response


async def health(request: web.Request) -> web.Response:
    """Tell how every part is."""
    database = await _database(request.app[STORE])
    if database == "healthy" and INGEST in request.app and request.app[INGEST].is_failing:
        database = "degraded"  # it answers and takes nothing: a disk that is full, or only to be read
    services = {
        "database": database,
        "redis": request.app[NODES].redis_health(),
        "vast_ai": "not_configured",
        "io_net": "not_configured",
        **_providers(request.app[OFFERS].faults()),
    }
    status = "degraded" if {"degraded", "unhealthy"} & set(services.values()) else "ok"
    if not has_room(request.app):
        services["journal"] = status = "unhealthy"
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    told = {"status": status, "timestamp": now, "version": __version__, "services": services}
    return answer(told, 503 if status == "unhealthy" else 200)


async def live(request: web.Request) -> web.Response:
    """Answer, which is the proof."""
    return answer({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Tell whether new calls may be sent here."""
    if request.app[STOPPING].is_set():
        raise GatewayError("UNAVAILABLE", "the gateway is stopping", retry_after_s=5)
    if not has_room(request.app):
        raise GatewayError("JOURNAL_FULL", "receipts have no room, so calls are refused", retry_after_s=5)
    return answer({"status": "ok"})


def has_room(app: web.Application) -> bool:
    """Tell whether workers can write receipts, and what they wrote is on disk."""
    settings = app[CONFIG]
    if INGEST in app and not app[INGEST].is_on_disk():
        return False
    with suppress(OSError):  # without the directory there is nobody who writes
        if shutil.disk_usage(settings.server.data_dir).free == 0:
            return False
    return (app[GAUGES_READ].total("gpuproxy_journal_bytes") or 0) <= settings.journal.bytes_max


async def _database(store: Store) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return "healthy" if await store.is_healthy() else "unhealthy"
    except TimeoutError:
        return "unhealthy"


def _providers(faults: Mapping[str, str]) -> dict[str, str]:
    """Return how each marketplace is, by what it said when it was last asked for offers."""
    return {name.replace(".", "_"): "unhealthy" if fault else "healthy" for name, fault in faults.items()}
