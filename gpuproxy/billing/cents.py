"""Between the ledger's nanodollars and the whole cents that payment providers take."""

from gpuproxy.errors import GatewayError

CENT_NANOUSD = 10_000_000


def to_cents(amount_nanousd: int) -> int:
    """Return the same in cents. Raises GatewayError UNPROCESSABLE for what is no whole number of them."""
    cents, rest = divmod(amount_nanousd, CENT_NANOUSD)
    if rest:
        raise GatewayError("UNPROCESSABLE", "a payment is in whole cents; write it like 12.50", param="amount_usd")
    return cents


def to_nanousd(amount_cents: int) -> int:
    """Return the same in nanodollars, exactly."""
    return amount_cents * CENT_NANOUSD
