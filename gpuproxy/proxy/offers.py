"""What models cost, for callers to see and for the strategy "cheapest" to compare."""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from msgspec import structs

from gpuproxy.plugin import ModelOffer
from gpuproxy.pricing import Price, charge
from gpuproxy.types import Usage

FindPrice = Callable[[str, str], Price | None]  # by model and upstream, as of now
TYPICAL = Usage(1_000, 0, 1_000)  # what prices are compared by
_SHOWN = {
    "input_usd_per_million": "input_nanousd_per_million",
    "cached_input_usd_per_million": "cached_input_nanousd_per_million",
    "output_usd_per_million": "output_nanousd_per_million",
    "per_request_usd": "request_nanousd",
    "per_second_usd": "second_nanousd",
}


def typical_cost(price: Price | None) -> int:
    """Return what a call of 1,000 tokens each way and one second costs, in nanodollars."""
    return 0 if price is None else charge(TYPICAL, price, 1_000_000)


def highest(prices: Sequence[Price | None]) -> Price | None:
    """Return a price that is nowhere below any of these, None if all are free."""
    priced = [price for price in prices if price is not None]
    if not priced:
        return None
    most = {name: max(getattr(price, name) for price in priced) for name in _SHOWN.values()}
    return structs.replace(priced[0], **most)


def offer(
    name: str, model: str, upstreams: Iterable[str], find_price: FindPrice, aliases: tuple[str, ...] = ()
) -> ModelOffer:
    """Return the offer of a model, by this name of it, at the dearest of the upstreams' prices: nobody is charged more
    than was shown.
    """
    prices = [find_price(model, upstream) for upstream in upstreams]
    price = max(prices, key=typical_cost)
    if price is None:
        return ModelOffer(name, aliases=aliases)
    return ModelOffer(name, {shown: _usd(getattr(price, field)) for shown, field in _SHOWN.items()}, aliases)


def _usd(nanousd: int) -> str:
    return f"{Decimal(nanousd).scaleb(-9).normalize():f}"
