"""The prices in force: those set while running, and behind them those of the configuration.

A price set while running is a version: it holds from its time on, until the next. A price of the configuration
has no time; it holds for every call that is settled while it stands there and no version does.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.pricing import PRICE_NANOUSD_MAX, Catalogue, Price, from_config
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import prices


async def load_catalogue(store: Store, configured: Iterable[config.Price]) -> Catalogue:
    """Return all prices."""
    return Catalogue([*map(from_config, configured), *await list_prices(store)])


async def list_prices(store: Store) -> list[Price]:
    """Return the versions set while running, by model, upstream and time."""
    columns = [prices.c[name] for name in Price.__struct_fields__]
    query = prices.select().with_only_columns(*columns)
    async with store.reading() as connection:
        rows = await connection.execute(query.order_by(prices.c.model, prices.c.upstream, prices.c.valid_from_ns))
        return [Price(**row._mapping) for row in rows]


async def add_price(store: Store, price: Price) -> None:
    """Add a version. Raises GatewayError UNPROCESSABLE for an amount out of range, CONFLICT for a second one of
    the same model, upstream and time.
    """
    row = {name: getattr(price, name) for name in price.__struct_fields__}
    for name, value in row.items():
        if "nanousd" in name and not 0 <= value < PRICE_NANOUSD_MAX:
            raise GatewayError("UNPROCESSABLE", f"{name} {value} is out of range", param=name)
    async with store.writing() as connection:
        done = await connection.execute(store.insert_new(prices).values(**row, created_at=datetime.now(UTC)))
    if done.rowcount == 0:
        raise GatewayError("CONFLICT", f"{price.model!r} has a price from that time on already")
