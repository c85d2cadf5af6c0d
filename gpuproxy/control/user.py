"""What customers see of themselves: their profile, their usage."""

from typing import Any, get_args

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from gpuproxy.access.accounts import user_by_id
from gpuproxy.control.money import Usd, usd
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.query import count_asked, time_asked
from gpuproxy.control.respond import listing, success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.usage import CALLS_MAX, GroupBy, newest_calls, usage_summary
from gpuproxy.store.schema import receipts

CALLS_DEFAULT = 100
USAGE_QUERY = {
    "since": "count calls from this time on, ISO 8601",
    "until": "and before this one",
    "group_by": "day, model, key, upstream or tool: adds groups",
}
CALLS_QUERY = {"limit": f"how many, 1 to {CALLS_MAX}; {CALLS_DEFAULT} if left out"}


CallInfo: type[Struct] = msgspec.defstruct(
    "Call",
    [(str(column.name), column.type.python_type) for column in receipts.c],
    namespace={"__doc__": "One receipt."},
)


class UsageSums(Struct):
    """What calls used and cost; tokens of answers that told none count as 0. `groups` is there if it was asked for."""

    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    request_bytes: int
    response_bytes: int
    cost: Usd
    cost_nanousd: int
    by_model: list[dict[str, Any]]
    groups: list[dict[str, Any]] | UnsetType = UNSET


async def profile(request: web.Request) -> web.Response:
    """Show the caller's account."""
    async with request.app[STORE].reading() as connection:
        return success(await user_by_id(connection, request[CALLER].user_id))


async def usage(request: web.Request) -> web.Response:
    """Sum up the caller's calls and what they cost, in all and by model."""
    since, until = time_asked(request, "since"), time_asked(request, "until")
    used = await usage_summary(request.app[STORE], request[CALLER].user_id, since, until, _group_by(request))
    for each in (used, *used["by_model"], *used.get("groups", ())):
        each["cost"] = usd(each["cost_nanousd"])
    return success(used)


async def calls(request: web.Request) -> web.Response:
    """List the caller's newest calls, newest first."""
    limit = count_asked(request, "limit", CALLS_DEFAULT, CALLS_MAX)
    return listing(await newest_calls(request.app[STORE], request[CALLER].user_id, limit))


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
