"""Puts payments into the control process: who takes them, and who looks after them."""

import asyncio
import os
from collections.abc import Mapping

from aiohttp import web

from gpuproxy.billing.cashier import Cashier
from gpuproxy.config import Config
from gpuproxy.plugin import PaymentProvider, build_payments, load_plugins
from gpuproxy.store.engine import Store

PAYMENTS: web.AppKey[Mapping[str, PaymentProvider]] = web.AppKey("payments")
CASHIER = web.AppKey("cashier", Cashier)


def payment_providers(config: Config) -> dict[str, PaymentProvider]:
    """Return the configured payment providers. Raises ConfigError, PluginError."""
    if not config.payments:
        return {}
    return build_payments(config.payments, load_plugins(config.plugins.enabled), os.environ)


def add_payments(app: web.Application, store: Store, providers: Mapping[str, PaymentProvider]) -> None:
    """Let the application take payments by `providers`, and close them when it ends."""
    app[PAYMENTS] = providers
    app[CASHIER] = Cashier(store, providers)
    app.on_cleanup.append(_close)


async def look_after_payments(app: web.Application, stopping: asyncio.Event) -> None:
    """Renew credit and ask again for what is unknown, until `stopping` is set."""
    if app[PAYMENTS]:
        await app[CASHIER].run(stopping)
    else:
        await stopping.wait()


async def _close(app: web.Application) -> None:
    for provider in app[PAYMENTS].values():
        await provider.close()
