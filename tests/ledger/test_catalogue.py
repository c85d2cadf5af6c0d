"""Prices set while running, over those of the configuration."""

import pytest

from gpuproxy import config
from gpuproxy.errors import GatewayError
from gpuproxy.ledger.catalogue import add_price, list_prices, load_catalogue
from gpuproxy.pricing import PRICE_NANOUSD_MAX, Price
from gpuproxy.store.engine import Store


async def test_a_price_set_while_running_beats_the_configured_from_its_time_on(store: Store) -> None:
    new = Price("m", "", 1, 2, 3, 4, 5, valid_from_ns=20)
    await add_price(store, new)
    catalogue = await load_catalogue(store, [config.Price("m", per_request_usd="1")])
    assert catalogue.find("m", "u", 19).request_nanousd == 10**9
    assert catalogue.find("m", "u", 20) == new


async def test_a_version_cannot_be_replaced(store: Store) -> None:
    await add_price(store, Price("m", request_nanousd=1, valid_from_ns=20))
    with pytest.raises(GatewayError, match="has a price from that time on already"):
        await add_price(store, Price("m", request_nanousd=2, valid_from_ns=20))
    await add_price(store, Price("m", request_nanousd=2, valid_from_ns=21))
    assert [price.request_nanousd for price in await list_prices(store)] == [1, 2]


@pytest.mark.parametrize("amount", [-1, PRICE_NANOUSD_MAX])
async def test_an_amount_out_of_range_is_refused(store: Store, amount: int) -> None:
    with pytest.raises(GatewayError, match=r"second_nanousd .* out of range"):
        await add_price(store, Price("m", second_nanousd=amount))
