"""What a payment provider is, and what passes between it and the ledger.

A provider takes money outside and tells about it; what is owed and credited is none of its business. It knows no
database and keeps no state. Amounts are whole cents of US dollars; card numbers never pass through here: a customer
pays on the provider's own page.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from msgspec import Struct


class PaymentSettings(Struct, frozen=True):
    """What a provider is made with: its block of the configuration, the variables with secrets looked up.

    `webhook_secrets` are believed all, so that one can be replaced. `options` are the provider's own.
    """

    api_key: str = ""
    webhook_secrets: tuple[str, ...] = ()
    base_url: str = ""
    return_url: str = ""
    options: Mapping[str, str] = {}

    def __repr__(self) -> str:
        """Show everything but the secrets."""
        key, secrets = "set" if self.api_key else "none", len(self.webhook_secrets)
        return f"PaymentSettings(api_key={key}, webhook_secrets={secrets}, base_url={self.base_url!r})"


class Order(Struct, frozen=True):
    """Money wanted from a customer.

    `payment_id` is ours: the provider must take it as idempotency key and give it back in its events. `is_to_save`
    asks to keep the way of paying; `saved_method` names one that was kept, in the provider's own words.
    """

    payment_id: str
    user_id: str
    email: str
    amount_cents: int
    is_to_save: bool = False
    saved_method: str = ""


class Checkout(Struct, frozen=True):
    """How the customer pays: at `url`, or as `instructions` say. `reference` is the provider's name for it."""

    reference: str
    url: str = ""
    instructions: str = ""


class RefundOrder(Struct, frozen=True):
    """Money to go back. `refund_id` is ours, as `payment_id` is in an order; `reference` names the payment."""

    refund_id: str
    payment_id: str
    reference: str
    amount_cents: int


class Outcome(Struct, frozen=True):
    """What became of a charge or refund. ``failed`` is final: no money moved, and `reason` says why."""

    state: Literal["completed", "pending", "failed"]
    reference: str = ""
    reason: str = ""


EventKind = Literal["completed", "failed", "refunded", "refund_failed", "disputed", "dispute_won", "noted"]


class PaymentEvent(Struct, frozen=True):
    """Something a provider told. `id` is unique with this provider, however often it is told.

    `payment_id` is ours and `reference` the provider's; one of them may be missing. `reversal` names the refund or
    dispute, `refund_id` is ours if the refund was ordered here. `amount_cents` is what moved. ``noted`` moves no money.
    """

    id: str
    kind: EventKind
    payment_id: str = ""
    reference: str = ""
    amount_cents: int = 0
    currency: str = "usd"
    saved_method: str = ""
    reversal: str = ""
    refund_id: str = ""
    reason: str = ""


class PaymentProvider(Protocol):
    """Takes money. Registered as a class, made once, in the control process, with its settings.

    What has no sure outcome (no connection, a time-out, a fault at the provider's) raises GatewayError with an
    UPSTREAM code; the same order is then given again, for up to 23 hours. A call takes 40 s at most.
    """

    name: str
    amount_cents_min: int
    amount_cents_max: int
    is_confirmed_by_hand: bool

    def __init__(self, settings: PaymentSettings) -> None:
        """Take the settings. Raises ValueError for what is missing or unknown, naming it."""

    async def checkout(self, order: Order) -> Checkout:
        """Offer the customer to pay. Raises GatewayError, UNPROCESSABLE for an order that is refused."""

    async def charge_saved(self, order: Order) -> Outcome:
        """Charge the saved method while the customer is away."""

    async def refund(self, order: RefundOrder) -> Outcome:
        """Give money back."""

    def parse_webhook(self, headers: Mapping[str, str], body: bytes) -> list[PaymentEvent]:
        """Return what the provider tells; [] for what concerns nobody. Header names are lower case.

        Raises GatewayError BAD_REQUEST for a signature that is missing, wrong or old, UNPROCESSABLE for a body that
        cannot be understood, NOT_FOUND if this provider sends none.
        """

    async def close(self) -> None:
        """Give up what is held."""
