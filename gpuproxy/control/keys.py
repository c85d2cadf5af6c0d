"""API keys of the caller's account: ``/api/v1/auth/apikey…``."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import NAME_CHARACTERS_MAX, RPM_MAX, Key, KeyTerms
from gpuproxy.access.callers import Caller
from gpuproxy.access.keys import issue_key, list_own_keys, own_key, revoke_own_key, rotate_key, terms_for
from gpuproxy.codec.tools import RULE_CHARACTERS_MAX, RULES_MAX
from gpuproxy.control.budgets import BudgetInfo, KeyBudget, add_key_budget, budget_info
from gpuproxy.control.once import once
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.query import page_asked
from gpuproxy.control.respond import page_of, success
from gpuproxy.ledger.budgets import Budget, budgets_of
from gpuproxy.types import ALL_SCOPES

MODELS_MAX = 256
OVERLAP_S_MAX = 604_800

Model = Annotated[str, Meta(min_length=1, max_length=256)]
Rule = Annotated[
    str, Meta(max_length=RULE_CHARACTERS_MAX, description="server/tool; * is any text", examples=["web/*"])
]
Scope = Annotated[str, Meta(max_length=32)]


class NewKey(Struct, forbid_unknown_fields=True):
    """A key to be made. What is left out is as the credential's own that makes it; it cannot be more."""

    name: Annotated[str, Meta(max_length=NAME_CHARACTERS_MAX)] = ""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1, max_length=8)] | UnsetType = UNSET
    models: Annotated[tuple[Model, ...], Meta(min_length=1, max_length=MODELS_MAX)] | None = None
    expires_days: Annotated[int, Meta(ge=1, le=36_500)] | None = None
    rpm: Annotated[int, Meta(ge=0, le=RPM_MAX, description="requests per minute; 0: no limit")] | None = None
    rpm_ceiling: (
        Annotated[int, Meta(ge=0, le=RPM_MAX, description="how far X-Rate-Limit-Override may raise rpm; by admins")]
        | None
    ) = None
    tpm: Annotated[int, Meta(ge=0, le=RPM_MAX, description="tokens per minute; 0: no limit; by admins")] | None = None
    streams: (
        Annotated[int, Meta(ge=0, le=RPM_MAX, description="streams open at once; 0: no limit; by admins")] | None
    ) = None
    budget: KeyBudget | None = None
    tools: Annotated[tuple[Rule, ...], Meta(min_length=1, max_length=RULES_MAX)] | None = None


class Rotation(Struct, forbid_unknown_fields=True):
    """How long the old key stays good beside the new one, in seconds."""

    overlap_s: Annotated[int, Meta(ge=0, le=OVERLAP_S_MAX)] = 3_600


class KeyInfo(Struct):
    """What may be shown of a key; `rpm`, `tpm` and `streams` are None where the default holds. `budgets` are its own,
    not its account's.
    """

    id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    rpm: int | None
    rpm_ceiling: int | None
    tpm: int | None
    streams: int | None
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime
    tools: tuple[str, ...] | None
    budgets: list[BudgetInfo] | UnsetType = UNSET


class MadeKey(KeyInfo, kw_only=True):
    """A new key; `api_key` is shown this once."""

    api_key: str


class RotatedKey(MadeKey, kw_only=True):
    """The new key, and until when the old one stays good."""

    old_id: str
    old_expires_at: datetime


async def make(request: web.Request, body: NewKey) -> web.Response:
    """Make an API key."""
    caller = request[CALLER]
    terms = terms_for(caller, _terms(body), body.scopes is not UNSET)

    async def work(connection: AsyncConnection) -> MadeKey:
        secret, key = await issue_key(connection, caller, terms)
        if body.budget is not None:
            await add_key_budget(connection, caller.user_id, key.id, body.budget)
        return MadeKey(**_shown(key, await _budgets(connection, caller)), api_key=secret)

    return await once(request, body, 201, work)


async def list_all(request: web.Request) -> web.Response:
    """List the account's keys without their secrets, oldest first."""
    page = page_asked(request)
    store, caller = request.app[STORE], request[CALLER]
    found = await list_own_keys(store, caller, page)
    async with store.reading() as connection:
        budgets = await _budgets(connection, caller)
    return page_of([key_info(key, budgets) for key in found], page.limit)


async def show(request: web.Request) -> web.Response:
    """Show one key of the account without its secret."""
    caller = request[CALLER]
    async with request.app[STORE].reading() as connection:
        key = await own_key(connection, caller, request.match_info["id"])
        return success(key_info(key, await _budgets(connection, caller)))


async def revoke(request: web.Request) -> web.Response:
    """Revoke a key; dead on every worker within a second."""
    caller = request[CALLER]
    async with request.app[STORE].writing() as connection:
        key = await revoke_own_key(connection, caller, request.match_info["id"])
        return success(key_info(key, await _budgets(connection, caller)))


async def rotate(request: web.Request, body: Rotation) -> web.Response:
    """Make a key like this one, which ends after the overlap."""
    caller, key_id = request[CALLER], request.match_info["id"]

    async def work(connection: AsyncConnection) -> RotatedKey:
        secret, fresh, old = await rotate_key(connection, caller, key_id, body.overlap_s)
        ends_at = old.revoked_at or old.expires_at
        assert ends_at is not None  # rotating has set it
        shown = _shown(fresh, await _budgets(connection, caller))
        return RotatedKey(**shown, api_key=secret, old_id=old.id, old_expires_at=ends_at)

    return await once(request, body, 201, work)


def _terms(body: NewKey) -> KeyTerms:
    days = body.expires_days
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    scopes = ALL_SCOPES if body.scopes is UNSET else body.scopes
    limits = (body.rpm, body.rpm_ceiling, body.tpm, body.streams)
    return KeyTerms(body.name, scopes, body.models, expires_at, *limits, body.tools)


def key_info(key: Key, budgets: Sequence[Budget] | None = None) -> KeyInfo:
    """Return what may be shown of a key; its budgets are among those of its user, if these are given."""
    return KeyInfo(**_shown(key, budgets))


def _shown(key: Key, budgets: Sequence[Budget] | None) -> dict[str, Any]:
    fields = structs.asdict(key)
    shown = {name: fields[name] for name in KeyInfo.__struct_fields__ if name in fields}
    if budgets is not None:
        root_id = key.root_id or key.id
        shown["budgets"] = [budget_info(each) for each in budgets if each.key_id == root_id]
    return shown


async def _budgets(connection: AsyncConnection, caller: Caller) -> list[Budget]:
    return await connection.run_sync(budgets_of, caller.user_id)
