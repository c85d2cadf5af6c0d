"""Payments by hand: the customer transfers money as the operator says, an admin confirms that it came.

Option ``instructions``: what customers are told; ``{payment_id}`` in it becomes the payment's id, ``{amount}`` the
dollars.
"""

from collections.abc import Mapping

from gpuproxy.plugin import (
    Checkout,
    GatewayError,
    Order,
    Outcome,
    PaymentEvent,
    PaymentProvider,
    PaymentSettings,
    RefundOrder,
    Registry,
)

INSTRUCTIONS = "Transfer ${amount} and name {payment_id} as the reference."


class Manual:
    """Takes money by bank transfer."""

    name: str = "manual"
    amount_cents_min: int = 1
    amount_cents_max: int = 100_000_000
    is_confirmed_by_hand: bool = True

    def __init__(self, settings: PaymentSettings) -> None:
        if unknown := sorted(set(settings.options) - {"instructions"}):
            raise ValueError(f"manual has no option {', '.join(unknown)}; known: instructions")
        self._instructions = settings.options.get("instructions") or INSTRUCTIONS

    async def checkout(self, order: Order) -> Checkout:
        """Tell how to pay."""
        if order.is_to_save:
            raise GatewayError("UNPROCESSABLE", "manual saves no way of paying; leave out save_method")
        amount = f"{order.amount_cents // 100}.{order.amount_cents % 100:02}"
        said = self._instructions.replace("{payment_id}", order.payment_id).replace("{amount}", amount)
        return Checkout(order.payment_id, instructions=said)

    async def charge_saved(self, order: Order) -> Outcome:
        """Refuse: nobody's account is at hand here."""
        return Outcome("failed", reason="manual payments cannot renew themselves")

    async def refund(self, order: RefundOrder) -> Outcome:
        """Agree: the admin who asks for it gives the money back."""
        return Outcome("completed", order.refund_id)

    def parse_webhook(self, headers: Mapping[str, str], body: bytes) -> list[PaymentEvent]:
        """Refuse: a bank transfer tells nobody."""
        raise GatewayError("NOT_FOUND", "manual payments have no webhook; an admin confirms them")

    async def close(self) -> None:
        """Hold nothing."""


def register(registry: Registry) -> None:
    """Enter by the one door."""
    registry.payment(Manual)


_: type[PaymentProvider] = Manual
