"""What all of the fleet shares: store, providers, settings, clock; and what providers' failures mean to callers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.fleet.purse import BudgetError
from gpuproxy.fleet.rentals import Rental, prefix_of
from gpuproxy.ledger.budgets import refused
from gpuproxy.plugin import (
    CapacityGone,
    InsufficientFunds,
    InvalidAnswer,
    NotSupported,
    ProviderAdapter,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    SpecRefused,
    Unauthorized,
)
from gpuproxy.pricing import markup_of
from gpuproxy.store.engine import Store

T = TypeVar("T")
DISK_GB = 10  # what listed prices include
RETRY_S = 5  # told to callers when a provider does not say when to come back


class Fleet:
    """The providers that are switched on, by their proper names, and what is needed to rent there."""

    def __init__(
        self,
        store: Store,
        providers: Mapping[str, ProviderAdapter],
        settings: config.Fleet,
        blocks: tuple[config.Provider, ...] = (),
    ) -> None:
        self.store = store
        self.providers = providers
        self.settings = settings
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self.written: Callable[[], None] = lambda: None  # called after every write, for whoever tells workers of it
        self.prefix = ""
        self._names = {alias: name for name, each in providers.items() for alias in (name, *each.aliases)}
        self._markups = {self._names.get(block.name, block.name): markup_of(block.markup_percent) for block in blocks}

    async def open(self) -> None:
        """Learn what this installation's tags begin with. Raises what the store raises."""
        self.prefix = await self.write(prefix_of)

    async def close(self) -> None:
        """Give the providers' connections back."""
        for adapter in self.providers.values():
            await adapter.close()

    async def write(self, work: Callable[..., T], *words: Any, **more: Any) -> T:
        """Do `work`, whose first argument is the connection, in a writing transaction."""
        async with self.store.writing() as connection:
            result = await connection.run_sync(work, *words, **more)
        self.written()
        return result

    async def paying(self, work: Callable[..., T], *words: Any, **more: Any) -> T:
        """Do `work` as `write`; a budget that refuses it is told of, although the rest is taken back."""
        try:
            return await self.write(work, *words, **more)
        except BudgetError as error:
            await self.write(refused, error.budget)
            raise

    async def read(self, work: Callable[..., T], *words: Any, **more: Any) -> T:
        """Do `work` in a transaction that only reads."""
        async with self.store.reading() as connection:
            return await connection.run_sync(work, *words, **more)

    def adapter(self, name: str) -> ProviderAdapter:
        """Return the provider of that name or alias. Raises GatewayError NOT_FOUND naming the known ones."""
        proper = self._names.get(name.lower())
        if proper is None:
            known = ", ".join(sorted(self.providers)) or "none; the operator adds [[providers]]"
            raise GatewayError("NOT_FOUND", f"no provider {name[:60]!r}; known: {known}", param="provider")
        return self.providers[proper]

    def knows(self, name: str) -> bool:
        """Tell whether a provider of that name or alias is switched on."""
        return name.lower() in self._names

    def adapter_of(self, rental: Rental) -> ProviderAdapter:
        """Return the provider of a rental. Raises GatewayError CONFLICT if it is not switched on any more."""
        adapter = self.providers.get(rental.provider)
        if adapter is None:
            message = f"{rental.provider} is switched off at this gateway; ask its operator, or destroy the rental"
            raise GatewayError("CONFLICT", message)
        return adapter

    def markup(self, provider: str) -> int:
        """Return what is put on a provider's prices, in thousandths of a percent."""
        return self._markups.get(provider, 0)


def native_id(adapter: ProviderAdapter, id: str) -> str:
    """Return a provider's id without our prefix, whether it has one or not."""
    return id.removeprefix(f"{adapter.id_prefix}-")


def shown_id(adapter: ProviderAdapter, native: str) -> str:
    """Return a provider's id with our prefix, which tells it from other providers' ids."""
    return f"{adapter.id_prefix}-{native}"


def fault_told(error: ProviderError) -> str:
    """Say which provider fails and how. Its own words may name inner things: they are for admins and the log."""
    match error:
        case ProviderUnavailable():
            how = "is not available at the moment"
        case RateLimited():
            how = "takes no more calls at the moment"
        case InvalidAnswer():
            how = "gives an answer that cannot be understood"
        case Unauthorized() | InsufficientFunds():
            how = "does not serve this gateway; its operator has to see to that"
        case _:
            how = "has failed"
    return f"{error.provider} {how}"


def failure_of(error: ProviderError) -> GatewayError:
    """Return what a caller is told when a provider fails: in its words only if they are about what was asked for."""
    if isinstance(error, CapacityGone):
        return GatewayError("CAPACITY_GONE", str(error)[:500])
    if isinstance(error, SpecRefused | NotSupported):
        return GatewayError("UNPROCESSABLE", str(error)[:500])
    message = fault_told(error)
    if isinstance(error, RateLimited):
        return GatewayError("PROVIDER_FAILED", message, retry_after_s=max(1, round(error.retry_after_s or RETRY_S)))
    return GatewayError("PROVIDER_FAILED", message, retry_after_s=RETRY_S if error.is_retryable else None)
