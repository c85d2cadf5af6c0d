"""What has to be done for money every moment while control runs: free what came back, end leases of the dead, read
prices anew.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy import select

from gpuproxy import config
from gpuproxy.ledger.catalogue import load_catalogue
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.leases import Leases, journaled_epochs
from gpuproxy.link.messages import STREAMS, TOKENS
from gpuproxy.observe.logs import get_logger
from gpuproxy.pricing import Price
from gpuproxy.store.engine import Store
from gpuproxy.store.rounds import rounds
from gpuproxy.store.schema import api_keys

FLUSH_S = 0.2
FLUSHES_PER_SWEEP = 5  # so a new price holds, and a dead worker's lease ends, within a few seconds

logger = get_logger(__name__)


class Keeper:
    """Runs beside the journal's reader. ``linked()`` returns the epochs of the workers that are linked now;
    ``publish`` tells them the prices.
    """

    def __init__(
        self,
        store: Store,
        ingest: Ingest,
        leases: Leases,
        linked: Callable[[], Iterable[str]],
        journal: Path,
        prices: Sequence[config.Price],
        publish: Callable[[Iterable[Price]], None] = lambda prices: None,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._leases = leases
        self._linked = linked
        self._journal = journal
        self._prices = prices
        self._publish = publish
        self._round_count = 0
        self._is_failing = False

    async def read_prices(self) -> None:
        """Let calls cost what the prices say now. Raises what the store raises."""
        self._ingest.catalogue = catalogue = await load_catalogue(self._store, self._prices)
        self._publish(catalogue.from_now_on(time.time_ns()))

    async def sweep(self) -> None:
        """Do what is due about once a second. Raises what the store raises."""
        await self.read_prices()
        await self._leases.sweep(self._linked(), await asyncio.to_thread(journaled_epochs, self._journal))

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, through outages of the store."""
        complain = partial(logger.error, "leases cannot be kept, will go on")
        await rounds(
            self._round, lambda: FLUSH_S * FLUSHES_PER_SWEEP if self._is_failing else FLUSH_S, stopping, complain
        )

    async def _round(self) -> None:
        self._round_count += 1
        if self._round_count % FLUSHES_PER_SWEEP and not self._is_failing:
            await self._leases.flush()
        else:  # a flush may have nothing to do: only a sweep shows that the store is back
            self._is_failing = True
            await self.sweep()
            self._is_failing = False


async def limit_per_minute(store: Store, key_id: str, rates: config.Rates) -> int:
    """Return the limit of requests of a key, or where TOKENS or STREAMS stands before it of those; 0 for none.

    Of a key without one of its own, or no key, that is the limit of users.
    """
    if key_id.startswith(TOKENS):
        mark, column, default = TOKENS, api_keys.c.tpm, rates.tokens_per_minute
    elif key_id.startswith(STREAMS):
        mark, column, default = STREAMS, api_keys.c.streams, rates.streams
    else:
        mark, column, default = "", api_keys.c.rpm, rates.requests_per_minute
    async with store.reading() as connection:
        limit: int | None = await connection.scalar(select(column).where(api_keys.c.id == key_id.removeprefix(mark)))
    return default if limit is None else limit
