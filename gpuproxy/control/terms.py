"""What holds for one account beside its credit, set by admins: ``/api/v1/admin/users/{id}/terms``."""

from typing import Annotated

from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import user_by_id
from gpuproxy.access.audit import note
from gpuproxy.access.changes import TERMS_CHANGED, announce
from gpuproxy.control.money import GivenUsd, Usd, nanousd_given, usd
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd
from gpuproxy.ledger.statement import credits_within
from gpuproxy.ledger.terms import markup_of, set_markup, set_overdraft
from gpuproxy.pricing import MARKUP_BPS_MAX, MARKUP_BPS_MIN

MarkupBps = Annotated[
    int, Meta(ge=MARKUP_BPS_MIN, le=MARKUP_BPS_MAX, description="hundredths of a percent on all prices; below 0: off")
]


class TermsChange(Struct, forbid_unknown_fields=True):
    """What is to change; the rest stays. `overdraft` is how far below 0 the account may go."""

    markup_bps: MarkupBps | UnsetType = UNSET
    overdraft: GivenUsd | UnsetType = UNSET


class Terms(Struct):
    """What holds for an account."""

    user_id: str
    markup_bps: int
    overdraft: Usd
    overdraft_nanousd: int


async def show(request: web.Request) -> web.Response:
    """Show a user's markup and overdraft."""
    async with request.app[STORE].reading() as connection:
        return success(await _terms(connection, request.match_info["id"]))


async def change_terms(request: web.Request, body: TermsChange) -> web.Response:
    """Set a user's markup on prices, or how far below 0 their account may go."""
    if body.markup_bps is UNSET and body.overdraft is UNSET:
        raise GatewayError("UNPROCESSABLE", f"nothing to change; known: {', '.join(body.__struct_fields__)}")
    overdraft = None if body.overdraft is UNSET else nanousd_given(body.overdraft, "overdraft", 0)
    caller = request[CALLER]
    async with request.app[STORE].writing() as connection:
        user_id = (await user_by_id(connection, request.match_info["id"])).id
        if body.markup_bps is not UNSET:
            await connection.run_sync(set_markup, user_id, body.markup_bps)
            await announce(connection, TERMS_CHANGED, user_id)
        if overdraft is not None:
            await connection.run_sync(set_overdraft, user_id, overdraft)
        terms = await _terms(connection, user_id)
        detail = {"markup_bps": terms.markup_bps, "overdraft_usd": format_usd(terms.overdraft_nanousd)}
        await note(connection, caller, "terms.change", user_id, detail)
    return success(terms)


async def _terms(connection: AsyncConnection, user_id: str) -> Terms:
    await user_by_id(connection, user_id)
    overdraft = (await credits_within(connection, user_id)).overdraft_nanousd
    return Terms(user_id, await connection.run_sync(markup_of, user_id), usd(overdraft), overdraft)
