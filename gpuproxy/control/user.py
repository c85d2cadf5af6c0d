"""What customers see of themselves: their usage."""

from datetime import UTC, datetime
from typing import get_args

from aiohttp import web

from gpuproxy.control.identify import caller
from gpuproxy.control.parts import STORE
from gpuproxy.control.respond import listing, success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.usage import CALLS_MAX, GroupBy, newest_calls, usage_summary

CALLS_DEFAULT = 100

routes = web.RouteTableDef()


@routes.get("/api/v1/user/usage")
async def usage(request: web.Request) -> web.Response:
    """Sum up the caller's calls, in all and by model; ``since``, ``until``, ``group_by`` narrow and split."""
    grant = await caller(request)
    since, until = _time(request, "since"), _time(request, "until")
    return success(await usage_summary(request.app[STORE], grant.user_id, since, until, _group_by(request)))


@routes.get("/api/v1/user/usage/calls")
async def calls(request: web.Request) -> web.Response:
    """List the caller's newest calls, newest first; ``limit`` up to CALLS_MAX."""
    grant = await caller(request)
    return listing(await newest_calls(request.app[STORE], grant.user_id, _limit(request)))


def _time(request: web.Request, name: str) -> datetime | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        message = f"{name}={text!r} is not an ISO 8601 time; write 2024-01-12T10:30:00Z"
        raise GatewayError("UNPROCESSABLE", message, param=name) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _group_by(request: web.Request) -> GroupBy | None:
    wished = request.query.get("group_by")
    if wished is None:
        return None
    known: tuple[GroupBy, ...] = get_args(GroupBy)
    for group in known:
        if wished == group:
            return group
    message = f"group_by={wished!r} is unknown; known: {', '.join(known)}"
    raise GatewayError("UNPROCESSABLE", message, param="group_by")


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(CALLS_DEFAULT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= CALLS_MAX):
        message = f"limit={text[:20]!r} is out of range; 1 to {CALLS_MAX}"
        raise GatewayError("UNPROCESSABLE", message, param="limit")
    return int(text)
