"""Dollars in the bodies of the API: JSON numbers, exact to the nanodollar, since no float is ever made of them."""

from typing import Annotated

from msgspec import Meta, Raw

from gpuproxy.errors import GatewayError
from gpuproxy.ledger.book import format_usd, parse_usd

Usd = Annotated[Raw, Meta(extra_json_schema={"type": "number"}, description="US dollars", examples=[12.5])]
GivenUsd = Annotated[
    Raw,
    Meta(
        extra_json_schema={"type": ["number", "string"]},
        description="US dollars with up to 9 decimals, as a number or as text",
        examples=[100.0, "100.00"],
    ),
]


def usd(nanousd: int) -> Raw:
    """Return an amount as the JSON number that equals it."""
    return Raw(format_usd(nanousd).encode())


def nanousd_given(given: Raw, name: str, lowest_nanousd: int = 1) -> int:
    """Return an amount that a body gives in the field `name`, in nanodollars.

    Raises GatewayError INVALID_JSON for what is neither number nor text, UNPROCESSABLE for what is no amount.
    """
    text = bytes(given).strip().decode()
    if text[:1] not in "-0123456789" and not (text.startswith('"') and text.endswith('"')):
        raise GatewayError("INVALID_JSON", f"{name}: expected a number or text such as 12.50", param=name)
    try:
        return parse_usd(text.strip('"'), lowest_nanousd)
    except ValueError as error:
        raise GatewayError("UNPROCESSABLE", f"{name}: {error}", param=name) from None
