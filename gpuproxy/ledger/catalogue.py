"""The prices in force: those set while running, and behind them those of the configuration.

A price set while running is a version: it holds from its time on, until the next. A price of the configuration
has no time; it holds for every call that is settled while it stands there and no version does.
"""

import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.pricing import PRICE_NANOUSD_MAX, Catalogue, Price, from_config
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import prices

NOTICE_S = 3  # workers hear of a price within two seconds: none may reserve by one and be charged by the next
PRICES_MAX = 1_000  # in one page

_ORDER = (prices.c.model, prices.c.upstream, prices.c.tool, prices.c.valid_from_ns)
_VERSIONS = select(*(prices.c[name] for name in Price.__struct_fields__)).order_by(*_ORDER)


def valid_from_now() -> int:
    """Return the unix nanoseconds from which a price that is set now should hold."""
    return time.time_ns() + NOTICE_S * 10**9


async def load_catalogue(store: Store, configured: Iterable[config.Price]) -> Catalogue:
    """Return all prices."""
    return Catalogue([*map(from_config, configured), *await list_prices(store)])


async def list_prices(store: Store) -> list[Price]:
    """Return the versions set while running, by model, upstream and time."""
    return [Price(*row) for row in await store.look(_VERSIONS)]


async def page_of_prices(store: Store, limit: int, cursor: str = "", model: str | None = None) -> list[Price]:
    """Return some of what `list_prices` returns, from behind the version that `cursor_of` made the cursor of.

    Raises GatewayError UNPROCESSABLE for a cursor that is none.
    """
    query = _VERSIONS.limit(limit)
    if cursor:
        query = query.where(tuple_(*_ORDER) > tuple_(*_read_cursor(cursor)))
    if model is not None:
        query = query.where(prices.c.model == model)
    async with store.reading() as connection:
        return [Price(*row) for row in await connection.execute(query)]


def cursor_of(price: Price) -> str:
    """Return what continues a list behind this version."""
    return urlsafe_b64encode(
        msgspec.json.encode((price.model, price.upstream, price.tool, price.valid_from_ns))
    ).decode()


def _read_cursor(cursor: str) -> tuple[str, str, str, int]:
    try:
        return msgspec.json.decode(urlsafe_b64decode(cursor), type=tuple[str, str, str, int])
    except (ValueError, msgspec.MsgspecError):
        raise GatewayError("UNPROCESSABLE", "cursor: this is no next_cursor", param="cursor") from None


async def add_price(store: Store, price: Price) -> None:
    """Add a version. Raises GatewayError UNPROCESSABLE for an amount out of range, CONFLICT for a second one of
    the same model, upstream and time.
    """
    async with store.writing() as connection:
        await insert_price(store, connection, price)


async def insert_price(store: Store, connection: AsyncConnection, price: Price) -> None:
    """Do what `add_price` does, inside the caller's writing transaction."""
    row = {name: getattr(price, name) for name in price.__struct_fields__}
    for name, value in row.items():
        if "nanousd" in name and not 0 <= value < PRICE_NANOUSD_MAX:
            raise GatewayError("UNPROCESSABLE", f"{name} {value} is out of range", param=name)
    done = await connection.execute(store.insert_new(prices).values(**row, created_at=datetime.now(UTC)))
    if done.rowcount == 0:
        raise GatewayError("CONFLICT", f"{price.model or price.tool!r} has a price from that time on already")
