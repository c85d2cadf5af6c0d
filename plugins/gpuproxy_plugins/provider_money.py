"""Dollars as providers write them, in whole nanodollars."""

from decimal import Decimal

NANO = 1_000_000_000
USD_MAX = 1_000_000_000  # what a 64-bit integer of nanodollars holds, with room to spare


def nanousd(usd: Decimal, least: int = 0) -> int:
    """Return dollars in nanodollars, halves to even. Raises ValueError for what is no amount of money from `least`."""
    if not usd.is_finite() or not least <= usd <= USD_MAX:
        raise ValueError(f"{usd} is no amount of dollars")
    return int((usd * NANO).to_integral_value())


def usd_text(amount_nanousd: int) -> float:
    """Return nanodollars in the dollars that JSON bodies carry."""
    return float(Decimal(amount_nanousd) / NANO)
