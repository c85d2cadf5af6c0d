"""What can be rented now: asked of every provider in the background, answered from memory.

A shelf holds the offers of one provider and kind (to stay, or to the highest bidder). It is refreshed while somebody
asks; a listing waits only where there is nothing yet or it is too old, for all such providers at once and not for long.
A provider that fails keeps its last offers until they are too old, one that takes no more searches (a quota may last
for a day) until it does, and the listing says what is wrong with it: that an offer is gone is seen when it is rented.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta

from msgspec import Struct, structs
from sqlalchemy import Connection

from gpuproxy.errors import GatewayError
from gpuproxy.events.outbox import record
from gpuproxy.fleet.news import Cheapest, cheapest, news
from gpuproxy.fleet.parts import DISK_GB, Fleet, failure_of, fault_told, native_id, shown_id
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import (
    InvalidAnswer,
    Offer,
    OfferQuery,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    best_offers,
    is_same_model,
)
from gpuproxy.pricing import with_markup, without_markup

OFFERS_MAX = 2_000  # kept of one provider and kind, the cheapest
WAIT_S = 8.0  # what a listing waits for at most
REST_S = 5.0  # between two searches at a provider that fails, however many ask for a list
SORTS: dict[str, Callable[[Offer, int], float]] = {  # of an offer and its price
    "price": lambda offer, price: price,
    "-price": lambda offer, price: -price,
    "vram": lambda offer, price: -offer.vram_gb,
    "reliability": lambda offer, price: -(offer.reliability or 0),
    "gpu_count": lambda offer, price: -offer.gpu_count,
}
Rank = tuple[float, int, str, str]

logger = get_logger(__name__)


class Shelf:
    """The offers of one provider and kind as they were at a time, and what went wrong since."""

    def __init__(self) -> None:
        self.offers: tuple[Offer, ...] = ()
        self.observed_at: datetime | None = None
        self.tried_at: datetime | None = None
        self.error: ProviderError | None = None
        self.refreshing: asyncio.Task[None] | None = None


class ShelfStatus(Struct):
    """How a provider's part of a listing is: ``ok``, ``stale`` (its last answer failed) or ``failed`` (none there).

    `error` tells customers what is wrong; what the provider says itself is for admins, see `Offers.faults`.
    """

    status: str
    count: int = 0
    observed_at: datetime | None = None
    error: str = ""


class Offers:
    """The shelves of all providers."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._shelves: dict[tuple[str, bool], Shelf] = {}
        self._told: dict[str, Cheapest] = {}  # of each provider, as at the last look

    async def find(
        self, names: Sequence[str], query: OfferQuery, sort: str
    ) -> tuple[list[Offer], dict[str, ShelfStatus]]:
        """Return the offers that fit, best first, and how each provider is.

        Their prices are the provider's; the query's, and the order, are by the customer's, markup included.
        """
        is_spot = bool(query.is_spot)
        await self._stock(names, is_spot)
        found: list[Offer] = []
        for name in names:
            found += best_offers(self._fresh(name, is_spot), self._for_provider(query, name))
        found.sort(key=lambda offer: self.rank(offer, sort))
        return found, {name: self._status(name, is_spot) for name in names}

    async def get(self, name: str, id: str) -> Offer:
        """Return one offer. Raises GatewayError NOT_FOUND for one that is not there (any more)."""
        wanted = native_id(self._fleet.providers[name], id)
        for is_spot in (False, True):
            await self._stock([name], is_spot)
            for offer in self._fresh(name, is_spot):
                if offer.id == wanted:
                    return offer
        for is_spot in (False, True):
            if (error := self._shelf(name, is_spot).error) is not None:
                raise failure_of(error)
        raise GatewayError("NOT_FOUND", f"no offer {id[:100]!r} at {name} any more; list them anew")

    async def like(self, offer: Offer, most_nanousd_per_hour: int | None, disk_gb: int = DISK_GB) -> tuple[Offer, ...]:
        """Return the offers that may stand in for one, best first: no worse, and no dearer than it or than the most."""
        most = offer.price_nanousd_per_hour
        if most_nanousd_per_hour is not None:
            most = without_markup(most_nanousd_per_hour, self._fleet.markup(offer.provider))
        query = OfferQuery(
            gpu_model=offer.gpu_model,
            gpu_count=offer.gpu_count,
            min_vram_gb=offer.vram_gb,
            max_price_nanousd_per_hour=most,
            is_spot=offer.is_spot,
            disk_gb=disk_gb,
        )
        await self._stock([offer.provider], offer.is_spot)
        fitting = best_offers(self._fresh(offer.provider, offer.is_spot), query)
        return tuple(each for each in fitting if each.id != offer.id and is_same_model(offer.gpu_model, each.gpu_model))

    def take(self, provider: str, *offer_ids: str) -> None:
        """Show offers no more that were rented, or are gone, until the provider is asked again."""
        for is_spot in (False, True):
            shelf = self._shelf(provider, is_spot)
            shelf.offers = tuple(offer for offer in shelf.offers if offer.id not in offer_ids)

    def rank(self, offer: Offer, sort: str) -> Rank:
        """Return the place of an offer in an order; no two have the same."""
        price = self.price(offer)
        return SORTS[sort](offer, price), price, offer.provider, offer.id

    def price(self, offer: Offer) -> int:
        """Return what the customer pays for an offer per hour."""
        return max(1, with_markup(offer.price_nanousd_per_hour, self._fleet.markup(offer.provider)))

    async def refresh_all(self) -> None:
        """Ask every provider anew, at once, and tell which models have come."""
        await asyncio.gather(*(self._refreshed(name, False) for name in self._fleet.providers))
        for name in self._fleet.providers:
            await self._tell_news(name)

    def faults(self) -> dict[str, str]:
        """Return what is wrong with each provider by its own words, "" for one that is well or was not asked yet."""
        return {name: str(self._shelf(name, False).error or "")[:500] for name in self._fleet.providers}

    def forget_news(self) -> None:
        """Let the next look be the first: what has changed since the last one, another node tells."""
        self._told.clear()

    async def close(self) -> None:
        """End what is being refreshed."""
        running = [shelf.refreshing for shelf in self._shelves.values() if shelf.refreshing is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _stock(self, names: Iterable[str], is_spot: bool) -> None:
        """Have offers on the shelves: refresh old ones in the background, wait only for those that are of no use.

        A provider that has failed, or let the last one wait in vain, is asked again but not waited for.
        """
        waiting = {}
        for name in names:
            age_s, shelf = self._age_s(name, is_spot), self._shelf(name, is_spot)
            if age_s is None or age_s >= self._fleet.settings.offers_s:
                task = self._refreshed(name, is_spot)
                if (age_s is None or age_s >= self._fleet.settings.offers_stale_s) and not shelf.error:
                    waiting[task] = name
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=WAIT_S)
            for task in late:
                message = f"no answer within {WAIT_S:g} s yet"
                self._shelf(waiting[task], is_spot).error = ProviderUnavailable(waiting[task], "search", message)

    def _refreshed(self, name: str, is_spot: bool) -> "asyncio.Task[None]":
        """Return the running refresh of a shelf, begun if there is none; the last one if it has just failed."""
        shelf, now = self._shelf(name, is_spot), self._fleet.now()
        is_resting = shelf.error and shelf.tried_at is not None and now - shelf.tried_at < timedelta(seconds=REST_S)
        if shelf.refreshing is None or (shelf.refreshing.done() and not is_resting):
            shelf.tried_at = now
            shelf.refreshing = asyncio.create_task(self._refresh(name, is_spot))
        return shelf.refreshing

    async def _refresh(self, name: str, is_spot: bool) -> None:
        shelf, at = self._shelf(name, is_spot), self._fleet.now()
        query = OfferQuery(is_spot=is_spot, limit=OFFERS_MAX, disk_gb=DISK_GB)
        try:
            found = await self._fleet.providers[name].offers(query)
        except ProviderError as error:
            if not shelf.error:
                logger.warning("provider tells no offers", provider=name, error=str(error))
            shelf.error = error
        except Exception as error:  # an adapter's own fault must not leave the shelf without a word
            logger.exception("provider's adapter failed", provider=name)
            shelf.error = InvalidAnswer(name, "search", f"its adapter failed: {type(error).__name__}")
        else:
            shelf.offers, shelf.observed_at, shelf.error = tuple(found), at, None

    def _shelf(self, name: str, is_spot: bool) -> Shelf:
        return self._shelves.setdefault((name, is_spot), Shelf())

    def _age_s(self, name: str, is_spot: bool) -> float | None:
        observed_at = self._shelf(name, is_spot).observed_at
        return None if observed_at is None else (self._fleet.now() - observed_at) / timedelta(seconds=1)

    def _fresh(self, name: str, is_spot: bool) -> tuple[Offer, ...]:
        age_s, shelf = self._age_s(name, is_spot), self._shelf(name, is_spot)
        is_stale = age_s is None or age_s >= self._fleet.settings.offers_stale_s
        return () if is_stale and not isinstance(shelf.error, RateLimited) else shelf.offers

    def _for_provider(self, query: OfferQuery, name: str) -> OfferQuery:
        most = query.max_price_nanousd_per_hour
        if most is not None:
            most = without_markup(most, self._fleet.markup(name))
        return structs.replace(query, max_price_nanousd_per_hour=most, limit=OFFERS_MAX)

    def _status(self, name: str, is_spot: bool) -> ShelfStatus:
        shelf, offers = self._shelf(name, is_spot), self._fresh(name, is_spot)
        status = ("stale" if offers else "failed") if shelf.error else "ok"
        error = "" if shelf.error is None else fault_told(shelf.error)
        return ShelfStatus(status, len(offers), shelf.observed_at, error)

    async def _tell_news(self, name: str) -> None:
        """Record for everybody what has changed since the last look; the first one tells nothing."""
        shelf = self._shelf(name, False)
        if shelf.error or shelf.observed_at is None:
            return
        now = cheapest(shelf.offers)
        before = self._told.get(name, now)
        found = [(event, self._facts(event, offer, before)) for event, offer in news(before, now)]
        if found:
            await self._fleet.write(_record_news, found)
        self._told[name] = now  # what could not be stored is told at the next look

    def _facts(self, event: str, offer: Offer, before: Cheapest) -> dict[str, object]:
        if event != "gpu.price_changed":
            return self.shown(offer)
        return {**self.shown(offer), "price_per_hour_before": self.price(before[offer.gpu_model]) / 1e9}

    def shown(self, offer: Offer) -> dict[str, object]:
        """Return what an event says of an offer."""
        return {
            "id": shown_id(self._fleet.providers[offer.provider], offer.id),
            "provider": offer.provider,
            "gpu_model": offer.gpu_model,
            "gpu_count": offer.gpu_count,
            "vram_gb": offer.vram_gb,
            "region": offer.region,
            "price_per_hour": self.price(offer) / 1e9,
        }


def _record_news(connection: Connection, found: list[tuple[str, dict[str, object]]]) -> None:
    for name, data in found:
        record(connection, name, None, data)
