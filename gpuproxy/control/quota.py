"""What the caller may do and what is left of it: ``/api/v1/user/quota``."""

import math

from aiohttp import web
from msgspec import Struct

from gpuproxy.access.callers import Caller
from gpuproxy.access.keys import KEYS_MAX, live_keys
from gpuproxy.control.budgets import BudgetInfo, budget_info
from gpuproxy.control.money import Usd, usd
from gpuproxy.control.parts import CALLER, LEASES, STORE
from gpuproxy.control.respond import success
from gpuproxy.ledger.budgets import budgets_of
from gpuproxy.ledger.leases import Leases
from gpuproxy.ledger.statement import credits_within
from gpuproxy.link.messages import TOKENS

NS_PER_S = 10**9


class Rate(Struct):
    """A limit per minute; `remaining` is what no worker was given yet, `reset_s` when something comes back."""

    limit: int
    remaining: int
    reset_s: int


class Streams(Struct):
    """How many streams may be open at once on this machine; `remaining` is what no worker holds."""

    limit: int
    remaining: int


class Quota(Struct):
    """What the caller's key, or without one their account, may do; a limit is None where nothing limits it.

    Without limits of its own a key shares those of the account, as `is_shared` tells. `budgets` are all that bound it.
    """

    requests_per_minute: Rate | None
    tokens_per_minute: Rate | None
    streams: Streams | None
    is_shared: bool
    budgets: list[BudgetInfo]
    credits_remaining: Usd
    credits_remaining_nanousd: int
    keys: int
    keys_max: int


async def show(request: web.Request) -> web.Response:
    """Show the caller's limits and what is left of them."""
    caller, leases = request[CALLER], request.app[LEASES]
    requests_key = "" if caller.rpm is None else caller.key_id
    tokens_key = "" if caller.tpm is None else caller.key_id
    streams_key = "" if caller.streams is None else caller.key_id
    requests_rate = await _rate(leases, caller, requests_key)
    tokens_rate = await _rate(leases, caller, TOKENS + tokens_key)
    streams = await leases.streams_left(caller.user_id, streams_key)
    async with request.app[STORE].reading() as connection:
        left = (await credits_within(connection, caller.user_id)).remaining_nanousd
        budgets = await connection.run_sync(budgets_of, caller.user_id)
        keys = await live_keys(connection, caller.user_id)
    bounding = [budget_info(each) for each in budgets if not caller.key_id or each.key_id in ("", caller.root_id)]
    is_shared = not (requests_key or tokens_key or streams_key)
    limits = (requests_rate, tokens_rate, None if streams is None else Streams(*streams))
    return success(Quota(*limits, is_shared, bounding, usd(left), left, keys, KEYS_MAX))


async def _rate(leases: Leases, caller: Caller, key: str) -> Rate | None:
    found = await leases.left((caller.user_id, key))
    if found is None:
        return None
    limit, part = found
    return Rate(limit, part.left, math.ceil(max(0, part.reset_ns - leases.now_ns()) / NS_PER_S))
