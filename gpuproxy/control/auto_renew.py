"""Credit that renews itself: ``/api/v1/billing/auto-renew``."""

from datetime import datetime

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType
from sqlalchemy import Connection

from gpuproxy.billing import renewals
from gpuproxy.billing.payments import lock_customer
from gpuproxy.billing.renewals import Renewal
from gpuproxy.control.billing import ProviderName, amount_given, check_amount, provider_named
from gpuproxy.control.money import GivenUsd, Usd, usd
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.paying import PAYMENTS
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError


class AutoRenew(Struct, forbid_unknown_fields=True):
    """When free credit falls below `threshold_usd`, charge `amount_usd`, in a calendar month at most `monthly_cap_usd`.

    The amounts are needed to switch it on.
    """

    is_enabled: bool = True
    threshold_usd: GivenUsd | UnsetType = UNSET
    amount_usd: GivenUsd | UnsetType = UNSET
    monthly_cap_usd: GivenUsd | UnsetType = UNSET
    provider: ProviderName = ""


class AutoRenewInfo(Struct):
    """How credit renews itself; `reason` says why the last renewal did not happen."""

    is_enabled: bool
    provider: str
    threshold_usd: Usd
    amount_usd: Usd
    monthly_cap_usd: Usd
    has_saved_method: bool
    failures: int
    next_attempt_at: datetime | None
    reason: str


async def show_auto_renew(request: web.Request) -> web.Response:
    """Show how the caller's credit renews itself."""
    async with request.app[STORE].reading() as connection:
        return success(await connection.run_sync(_shown, request[CALLER].user_id))


async def set_auto_renew(request: web.Request, body: AutoRenew) -> web.Response:
    """Switch renewal on or off, and say how much."""
    user_id = request[CALLER].user_id
    wished = _wished(request, body)

    def put(connection: Connection) -> AutoRenewInfo:
        lock_customer(connection, user_id)  # whoever begins a charge, or notes one that failed, has it too
        if wished is None:
            renewals.switch_off(connection, user_id, "")
        elif not renewals.saved_method(connection, user_id, wished.provider):
            raise GatewayError("CONFLICT", "no way of paying is saved; pay once with save_method")
        else:
            renewals.put(connection, wished)
        return _shown(connection, user_id)

    async with request.app[STORE].writing() as connection:
        return success(await connection.run_sync(put))


def _wished(request: web.Request, body: AutoRenew) -> Renewal | None:
    """Return what the customer agrees to; None to switch it off."""
    if not body.is_enabled:
        return None
    provider = provider_named(request.app[PAYMENTS], body.provider)
    if provider.is_confirmed_by_hand:
        raise GatewayError("UNPROCESSABLE", f"{provider.name} payments cannot renew themselves", param="provider")
    threshold, amount, cap = (_needed(body, name) for name in ("threshold_usd", "amount_usd", "monthly_cap_usd"))
    check_amount(provider, amount, "amount_usd")
    if amount < threshold:
        message = "amount_usd is below threshold_usd: one charge would not end the shortfall"
        raise GatewayError("UNPROCESSABLE", message, param="amount_usd")
    if cap < amount:
        message = "monthly_cap_usd is below amount_usd: nothing could be charged"
        raise GatewayError("UNPROCESSABLE", message, param="monthly_cap_usd")
    return Renewal(request[CALLER].user_id, provider.name, True, threshold, amount, cap)


def _needed(body: AutoRenew, name: str) -> int:
    amount = amount_given(getattr(body, name), name)
    if amount is None:
        raise GatewayError("UNPROCESSABLE", f"field {name!r} is missing; renewal needs it", param=name)
    return amount


def _shown(connection: Connection, user_id: str) -> AutoRenewInfo:
    found = renewals.get(connection, user_id)
    return AutoRenewInfo(
        found.is_enabled,
        found.provider,
        usd(found.threshold_nanousd),
        usd(found.amount_nanousd),
        usd(found.monthly_cap_nanousd),
        bool(renewals.saved_method(connection, user_id, found.provider)),
        found.failures,
        found.next_attempt_at,
        found.reason,
    )
