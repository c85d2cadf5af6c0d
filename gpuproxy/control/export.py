"""All about an account, or about all of them, in one file of any size: ``/user/export``, ``/admin/export/users``."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from aiohttp import web
from msgspec import Struct

from gpuproxy.access.accounts import User, user_by_id
from gpuproxy.access.audit import note
from gpuproxy.access.callers import Caller
from gpuproxy.access.keys import KEYS_MAX, list_own_keys
from gpuproxy.access.paging import ROWS_MAX, Page
from gpuproxy.access.roster import keys_of, user_pages
from gpuproxy.control.budgets import budget_info
from gpuproxy.control.credits import credits_shown, transaction_info
from gpuproxy.control.keys import KeyInfo, key_info
from gpuproxy.control.money import Usd, usd
from gpuproxy.control.parts import CALLER, EXPORTING, STORE
from gpuproxy.control.streams import csv_lines, json_array, json_lines, json_object, json_success, stream
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.budgets import Budget, budgets_of
from gpuproxy.ledger.history import Use, transaction_pages, use_pages
from gpuproxy.ledger.statement import Credits, credits_of_all
from gpuproxy.store.engine import Store

EXPORTS_MAX = 4  # at once; each keeps the store busy
HOUR_US = 3_600_000_000
FORMATS = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
FORMAT_QUERY = {"format": f"{', '.join(FORMATS)}; json if left out"}
CSV_NAMES = ("id", "email", "is_admin", "is_active", "created_at", "credits_remaining", "credits_total", "held", "cap")


class GpuUse(Struct):
    """One call or rental: `duration` in hours, `cost` in dollars."""

    id: str
    kind: str
    provider: str
    instance_id: str
    model: str
    key_id: str
    start_time: datetime
    end_time: datetime | None
    duration: float
    cost: Usd
    cost_nanousd: int
    tool: str


class UserRecord(Struct):
    """A user, what they have, and their keys without secrets."""

    id: str
    email: str
    is_admin: bool
    is_active: bool
    created_at: datetime
    credits_remaining: Usd
    credits_total: Usd
    held: Usd
    cap: Usd
    api_keys: list[KeyInfo]


async def own(request: web.Request) -> web.StreamResponse:
    """Export the caller's account: profile, keys without secrets, quotas, usage, transactions."""
    store, caller = request.app[STORE], request[CALLER]
    with _exporting(request):
        async with store.reading() as connection:
            profile = await user_by_id(connection, caller.user_id)
            budgets = await connection.run_sync(budgets_of, caller.user_id)
        fields: list[tuple[str, Any]] = [
            ("exported_at", datetime.now(UTC)),
            ("profile", profile),
            ("credits", await credits_shown(request.app, caller.user_id)),
            ("api_keys", _own_keys(store, caller, budgets)),
            ("quotas", {"keys_max": KEYS_MAX, "budgets": [budget_info(each) for each in budgets]}),
            ("gpu_usage", _uses(store, caller.user_id)),
            ("transactions", _transactions(store, caller.user_id, is_income=False)),
            ("credit_history", _transactions(store, caller.user_id, is_income=True)),
        ]
        return await stream(request, json_success(json_object(fields)), FORMATS["json"], "account-data.json")


async def everybody(request: web.Request) -> web.StreamResponse:
    """Export all users with what they have and their keys without secrets."""
    store, caller, wished = request.app[STORE], request[CALLER], request.query.get("format", "json")
    if wished not in FORMATS:
        message = f"format={wished[:20]!r} is unknown; known: {', '.join(FORMATS)}"
        raise GatewayError("UNPROCESSABLE", message, param="format")
    with _exporting(request):
        async with store.writing() as connection:
            await note(connection, caller, "users.export", "", {"format": wished})
        if wished == "csv":
            body = csv_lines(CSV_NAMES, _users(store), _cells)
        elif wished == "ndjson":
            body = json_lines(_records(store))
        else:
            body = json_success(json_array(_records(store)))
        return await stream(request, body, FORMATS[wished], f"users-export.{wished}")


@contextmanager
def _exporting(request: web.Request) -> Iterator[None]:
    """Let one export of a user run at a time, and EXPORTS_MAX of all."""
    running, user_id = request.app[EXPORTING], request[CALLER].user_id
    if user_id in running:
        raise GatewayError("CONFLICT", "an export of this account is running; wait for it", retry_after_s=10)
    if len(running) >= EXPORTS_MAX:
        raise GatewayError("UNAVAILABLE", f"{EXPORTS_MAX} exports are running; try again", retry_after_s=10)
    running.add(user_id)
    try:
        yield
    finally:
        running.discard(user_id)


async def _own_keys(store: Store, caller: Caller, budgets: list[Budget]) -> AsyncIterator[list[KeyInfo]]:
    cursor = ""
    while page := await list_own_keys(store, caller, Page(ROWS_MAX, cursor)):
        yield [key_info(key, budgets) for key in page]
        cursor = page[-1].id


async def _uses(store: Store, user_id: str) -> AsyncIterator[list[GpuUse]]:
    async for page in use_pages(store, user_id):
        yield [_shown(use) for use in page]


async def _transactions(store: Store, user_id: str, is_income: bool) -> AsyncIterator[list[Any]]:
    async for page in transaction_pages(store, user_id, is_income):
        yield [transaction_info(each) for each in page]


async def _users(store: Store) -> AsyncIterator[list[tuple[User, Credits]]]:
    async for page in user_pages(store):
        credits = await credits_of_all(store, [user.id for user in page])
        yield [(user, credits[user.id]) for user in page]


async def _records(store: Store) -> AsyncIterator[list[UserRecord]]:
    async for page in _users(store):
        keys = await keys_of(store, [user.id for user, _ in page])
        yield [_record(user, credits, [key_info(key) for key in keys[user.id]]) for user, credits in page]


def _record(user: User, credits: Credits, keys: list[KeyInfo]) -> UserRecord:
    remaining, total, held, cap = map(usd, _amounts(credits))
    told = (user.id, user.email, user.is_admin, user.is_active, user.created_at)
    return UserRecord(*told, remaining, total, held, cap, keys)


def _cells(row: tuple[User, Credits]) -> list[Any]:
    user, credits = row
    told = [Decimal(format_usd(amount)) for amount in _amounts(credits)]
    return [user.id, user.email, user.is_admin, user.is_active, user.created_at.isoformat(), *told]


def _amounts(credits: Credits) -> tuple[int, int, int, int]:
    return credits.remaining_nanousd, credits.total_nanousd, credits.held_nanousd, credits.overdraft_nanousd


def _shown(use: Use) -> GpuUse:
    told = (use.id, use.kind, use.provider, use.instance_id, use.model, use.key_id, use.start_time, use.end_time)
    return GpuUse(*told, use.duration_us / HOUR_US, usd(use.cost_nanousd), use.cost_nanousd, use.tool)
