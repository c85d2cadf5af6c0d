"""What an account or a key may spend in a window of time: ``/api/v1/user/budgets``, ``/api/v1/admin/budgets``."""

import time
from datetime import datetime
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import user_by_id
from gpuproxy.access.audit import note
from gpuproxy.access.callers import Caller
from gpuproxy.access.changes import TERMS_CHANGED, announce
from gpuproxy.access.keys import has_budget
from gpuproxy.control.money import GivenUsd, Usd, nanousd_given, usd
from gpuproxy.control.once import once
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.respond import listing, success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.budgets import (
    WINDOW_S_MAX,
    WINDOW_S_MIN,
    Budget,
    budgets_of,
    remove_budget,
    set_budget,
)

WindowSeconds = Annotated[
    int,
    Meta(ge=WINDOW_S_MIN, le=WINDOW_S_MAX, description="length of the window: 300 (5 minutes) to 2592000 (30 days)"),
]
Id = Annotated[str, Meta(max_length=64)]
USER_QUERY = {"user_id": "whose budgets"}


class KeyBudget(Struct, forbid_unknown_fields=True):
    """The most that may be spent in any window of this length."""

    limit: GivenUsd
    window_s: WindowSeconds


class NewBudget(KeyBudget, forbid_unknown_fields=True):
    """A budget of one key of the account, or without `key_id` of all it spends."""

    key_id: Id = ""


class NewUserBudget(NewBudget, forbid_unknown_fields=True, kw_only=True):
    """A budget that the user cannot change."""

    user_id: Id


class BudgetInfo(Struct):
    """A budget and the window that is now. `key_id` is the first of the keys that share it by rotation."""

    id: str
    user_id: str
    key_id: str
    window_s: int
    limit: Usd
    spent: Usd
    remaining: Usd
    limit_nanousd: int
    spent_nanousd: int
    remaining_nanousd: int
    window_ends_at: datetime
    is_admins: bool
    created_at: datetime


async def list_own(request: web.Request) -> web.Response:
    """List the budgets of the caller's account and keys."""
    return listing(await _shown_of(request, request[CALLER].user_id))


async def set_own(request: web.Request, body: NewBudget) -> web.Response:
    """Set a budget, or another limit of the one of the same key and window."""
    return await _set(request, body, request[CALLER].user_id)


async def remove_own(request: web.Request) -> web.Response:
    """Remove a budget."""
    return await _remove(request, request[CALLER].user_id)


async def list_any(request: web.Request) -> web.Response:
    """List the budgets of a user."""
    user_id = request.query.get("user_id", "")
    if not user_id:
        raise GatewayError("UNPROCESSABLE", "user_id: name whose budgets to list", param="user_id")
    async with request.app[STORE].reading() as connection:
        await user_by_id(connection, user_id)
    return listing(await _shown_of(request, user_id))


async def set_any(request: web.Request, body: NewUserBudget) -> web.Response:
    """Set a budget of a user that they cannot change."""
    return await _set(request, body, body.user_id, is_admins=True)


async def remove_any(request: web.Request) -> web.Response:
    """Remove a budget of any user."""
    return await _remove(request, None)


async def add_key_budget(connection: AsyncConnection, user_id: str, key_id: str, budget: KeyBudget) -> Budget:
    """Give a key a budget, in the caller's writing transaction; workers hear of it within a second."""
    limit_nanousd = nanousd_given(budget.limit, "limit")
    made = await connection.run_sync(set_budget, user_id, key_id, budget.window_s, limit_nanousd, False)
    await announce(connection, TERMS_CHANGED, user_id)
    return made


def budget_info(budget: Budget) -> BudgetInfo:
    """Return a budget as the API shows it."""
    now_s = time.time()
    limit, spent = budget.limit_nanousd, budget.spent(now_s)
    left = max(0, limit - spent)
    return BudgetInfo(
        id=budget.id,
        user_id=budget.user_id,
        key_id=budget.key_id,
        window_s=budget.window_s,
        limit=usd(limit),
        spent=usd(spent),
        remaining=usd(left),
        limit_nanousd=limit,
        spent_nanousd=spent,
        remaining_nanousd=left,
        window_ends_at=budget.ends_at(now_s),
        is_admins=budget.is_admins,
        created_at=budget.created_at,
    )


async def _shown_of(request: web.Request, user_id: str) -> list[BudgetInfo]:
    async with request.app[STORE].reading() as connection:
        return [budget_info(each) for each in await connection.run_sync(budgets_of, user_id)]


async def _set(request: web.Request, body: NewBudget, user_id: str, is_admins: bool = False) -> web.Response:
    limit_nanousd, caller = nanousd_given(body.limit, "limit"), request[CALLER]

    async def work(connection: AsyncConnection) -> BudgetInfo:
        await _check_unbound(connection, caller)
        await user_by_id(connection, user_id)
        budget = await connection.run_sync(set_budget, user_id, body.key_id, body.window_s, limit_nanousd, is_admins)
        await announce(connection, TERMS_CHANGED, user_id)
        if is_admins:
            detail = {"budget_id": budget.id, "limit_usd": format_usd(limit_nanousd), "window_s": body.window_s}
            await note(connection, caller, "budget.set", user_id, detail)
        return budget_info(budget)

    return await once(request, body, 201, work)


async def _remove(request: web.Request, user_id: str | None) -> web.Response:
    caller, budget_id = request[CALLER], request.match_info["id"]
    async with request.app[STORE].writing() as connection:
        await _check_unbound(connection, caller)
        budget = await connection.run_sync(remove_budget, budget_id, user_id, user_id is None)
        await announce(connection, TERMS_CHANGED, budget.user_id)
        if user_id is None:
            await note(connection, caller, "budget.remove", budget.user_id, {"budget_id": budget.id})
    return success(budget_info(budget))


async def _check_unbound(connection: AsyncConnection, caller: Caller) -> None:
    if await has_budget(connection, caller):
        raise GatewayError("FORBIDDEN", "a key with a budget of its own may not change budgets; log in or use another")
