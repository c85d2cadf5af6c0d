"""Dollars as providers write them, in whole nanodollars."""

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal

NANO = 1_000_000_000
USD_MAX = 1_000_000_000  # what a 64-bit integer of nanodollars holds, with room to spare


def nanousd(usd: Decimal, least: int = 0, rounding: str = ROUND_HALF_EVEN) -> int:
    """Return dollars in nanodollars. Raises ValueError for what is no amount of money from `least`."""
    if not usd.is_finite() or not least <= usd <= USD_MAX:
        raise ValueError(f"{usd} is no amount of dollars")
    return int((usd * NANO).to_integral_value(rounding))


def nanousd_enough(usd: Decimal) -> int:
    """Return the nanodollars that are no less than these dollars. Raises ValueError as `nanousd`."""
    return nanousd(usd, rounding=ROUND_CEILING)


def usd_text(amount_nanousd: int) -> float:
    """Return nanodollars in the dollars that JSON bodies carry."""
    return float(Decimal(amount_nanousd) / NANO)
