"""What an account has and what moved it: ``/api/v1/user/credits``, ``/user/transactions``, ``/admin/credits/…``."""

from datetime import datetime
from typing import Annotated
from uuid import uuid4

from aiohttp import web
from msgspec import Meta, Raw, Struct
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import user_by_id
from gpuproxy.access.audit import note
from gpuproxy.billing import renewals
from gpuproxy.control.money import GivenUsd, Usd, nanousd_given, usd
from gpuproxy.control.once import HEADER, once
from gpuproxy.control.parts import CALLER, CONFIG, STORE
from gpuproxy.control.query import page_asked
from gpuproxy.control.respond import page_of, success
from gpuproxy.errors import GatewayError
from gpuproxy.ledger import low_credit
from gpuproxy.ledger.book import format_usd, parse_usd
from gpuproxy.ledger.statement import Transaction, credits_within, transactions_of
from gpuproxy.ledger.transfers import ADJUSTMENTS, Transfer, credit_account, post

UserId = Annotated[str, Meta(max_length=64, examples=["3f0c8d1e-6c1b-4f5a-9f57-0e6f1c2f8a11"])]
ThresholdUsd = Annotated[Raw, Meta(extra_json_schema={"type": ["number", "string", "null"]}, examples=[5.0])]


class CreditsInfo(Struct):
    """An account: `held` is set aside for running calls; `overage` is how far it is below 0, `cap` how far it may.

    Below `low_threshold` its owner is told, once until credit is added.
    """

    credits_remaining: Usd
    credits_total: Usd
    held: Usd
    overage: Usd
    cap: Usd
    credits_remaining_nanousd: int
    credits_total_nanousd: int
    held_nanousd: int
    overage_nanousd: int
    cap_nanousd: int
    auto_renew: bool
    low_threshold: Usd


class LowThreshold(Struct, forbid_unknown_fields=True):
    """Below how much the caller wants to be told by ``credits.low``: 0 for never, null for what holds for everybody."""

    threshold: ThresholdUsd


class TransactionInfo(Struct):
    """What moved an account; `amount` is over 0 when it came in. Calls appear as one for each batch."""

    id: str
    kind: str
    amount: Usd
    amount_nanousd: int
    created_at: datetime
    charge_id: str


class CreditGift(Struct, forbid_unknown_fields=True):
    """Credit of a user."""

    user_id: UserId
    amount: GivenUsd


class CreditGiven(Struct):
    """What was added or taken, and what the user has now."""

    user_id: str
    transaction_id: str
    amount: Usd
    amount_nanousd: int
    credits_remaining: Usd
    credits_remaining_nanousd: int


async def show(request: web.Request) -> web.Response:
    """Show what the caller's account has."""
    return success(await credits_shown(request.app, request[CALLER].user_id))


async def set_low_threshold(request: web.Request, body: LowThreshold) -> web.Response:
    """Say below how much credit the caller wants to be told."""
    threshold = None if bytes(body.threshold) == b"null" else nanousd_given(body.threshold, "threshold", 0)
    user_id = request[CALLER].user_id
    async with request.app[STORE].writing() as connection:
        await connection.run_sync(low_credit.set_threshold, user_id, threshold)
    return success(await credits_shown(request.app, user_id))


async def transactions(request: web.Request) -> web.Response:
    """List what moved the caller's account, newest first."""
    page = page_asked(request)
    found = await transactions_of(request.app[STORE], request[CALLER].user_id, page.limit, page.cursor)
    return page_of([transaction_info(each) for each in found], page.limit)


async def add_credits(request: web.Request, body: CreditGift) -> web.Response:
    """Add credit to a user's account."""
    return await _adjust(request, body, "credits.add", (ADJUSTMENTS, credit_account(body.user_id)))


async def take_credits(request: web.Request, body: CreditGift) -> web.Response:
    """Take credit back that was added by mistake."""
    return await _adjust(request, body, "credits.take", (credit_account(body.user_id), ADJUSTMENTS))


async def _adjust(request: web.Request, body: CreditGift, action: str, accounts: tuple[str, str]) -> web.Response:
    amount_nanousd = nanousd_given(body.amount, "amount")
    caller, key = request[CALLER], request.headers.get(HEADER)
    # beyond the day that answers are kept a repetition still finds its transfer, and moves nothing
    transfer_key = f"{action.replace('.', '-')}:{f'{caller.user_id}:{key}' if key else uuid4()}"

    async def work(connection: AsyncConnection) -> CreditGiven:
        user_id = (await user_by_id(connection, body.user_id)).id
        given = Transfer(*accounts, amount_nanousd, "adjustment", transfer_key)
        if not await connection.run_sync(post, [given]):
            raise GatewayError("CONFLICT", f"{HEADER} {key!r} has moved this amount before, over a day ago")
        detail = {"amount_usd": format_usd(amount_nanousd), "transaction_id": given.id}
        await note(connection, caller, action, user_id, detail)
        left = (await credits_within(connection, user_id)).remaining_nanousd
        return CreditGiven(user_id, given.id, usd(amount_nanousd), amount_nanousd, usd(left), left)

    return await once(request, body, 200, work)


async def credits_shown(app: web.Application, user_id: str) -> CreditsInfo:
    """Return a customer's account as the API shows it."""
    async with app[STORE].reading() as connection:
        found = await credits_within(connection, user_id)
        renewal = await connection.run_sync(renewals.get, user_id)
        low = await connection.run_sync(low_credit.threshold_of, user_id)
    low = parse_usd(app[CONFIG].credit.low_usd or "0", 0) if low is None else low
    remaining, total, held = found.remaining_nanousd, found.total_nanousd, found.held_nanousd
    overage, cap = max(0, -remaining), found.overdraft_nanousd
    shown = usd(remaining), usd(total), usd(held), usd(overage), usd(cap)
    return CreditsInfo(*shown, remaining, total, held, overage, cap, renewal.is_enabled, usd(low))


def transaction_info(found: Transaction) -> TransactionInfo:
    """Return a transfer as the API shows it."""
    amount = found.amount_nanousd
    return TransactionInfo(found.id, found.kind, usd(amount), amount, found.created_at, found.charge_id)
