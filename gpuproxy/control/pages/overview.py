"""``/dashboard`` and ``/dashboard/usage``: what there is and what was used."""

from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args

from aiohttp import web

from gpuproxy.control import credits, gpu_rentals, keys, user
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import FLEET
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.usage import GroupBy

CALLS_SHOWN = 10
DAYS_SHOWN = 14
PERIODS = {"1": "today", "7": "7 days", "30": "30 days", "90": "90 days"}
GROUPS = get_args(GroupBy)


async def show_overview(visit: Visit) -> web.StreamResponse:
    """Show credit, today's calls, and the newest ones."""
    today = await visit.ask(user.usage, query={"since": _begin(1)})
    days = await visit.ask(user.usage, query={"since": _begin(DAYS_SHOWN), "group_by": "day"})
    rentals = (
        await visit.ask(gpu_rentals.list_rentals, query={"living": "true"})
        if visit.request.app[FLEET].providers
        else {}
    )
    return page(
        visit,
        "overview.html",
        credits=(await visit.ask(credits.show))["data"],
        today=today["data"],
        days=_every_day(days["groups"], DAYS_SHOWN),
        calls=(await visit.ask(user.calls, query={"limit": str(CALLS_SHOWN)}))["data"],
        rentals=rentals.get("data", []),
    )


async def show_usage(visit: Visit) -> web.StreamResponse:
    """Show what calls used, by day, model, key, upstream or tool."""
    period, group = visit.request.query.get("days", "7"), visit.request.query.get("by", "model")
    if period not in PERIODS:
        raise GatewayError("UNPROCESSABLE", f"days={period[:20]!r} is unknown; known: {', '.join(PERIODS)}")
    told = await visit.ask(user.usage, query={"since": _begin(int(period)), "group_by": group})
    groups = _every_day(told["groups"], int(period)) if group == "day" else told["groups"]
    chosen: dict[str, Any] = {"period": period, "group": group, "periods": PERIODS, "known": GROUPS}
    return page(visit, "usage.html", total=told["data"], groups=groups, names=await _names(visit, group), **chosen)


async def _names(visit: Visit, group: str) -> dict[str, str]:
    """Return how keys are called; of other groups the value is the name."""
    if group != "key":
        return {}
    told = await visit.ask(keys.list_all, query={"limit": "1000"})
    return {each["id"]: each["name"] or each["prefix"] for each in told["data"]}


def _begin(days: int) -> str:
    """Return when the first of so many days began, today the last."""
    return (_today() - timedelta(days=days - 1)).isoformat()


def _today() -> date:
    return datetime.now(UTC).date()


def _every_day(groups: list[dict[str, Any]], days: int) -> list[dict[str, Any]]:
    """Return one entry for each day, also for those without a call."""
    found = {each["day"]: each for each in groups}
    nothing = {"requests": 0, "input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}
    wanted = [(_today() - timedelta(days=back)).isoformat() for back in reversed(range(days))]
    return [found.get(day, {"day": day, **nothing}) for day in wanted]
