"""Every event there is: its name, the channel of ``/ws`` that carries it, what it means.

What is not here cannot be recorded, and nobody can wait for it. README lists the table; a test compares.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """One row of the table."""

    channel: str
    meaning: str


CHANNELS: dict[str, str] = {
    "gpu_updates": "what the providers offer; the same for everybody",
    "instance_events": "your rented instances",
    "billing_events": "your payments and credit",
    "usage_events": "what your calls used and cost",
    "account_events": "your keys and webhooks",
}
PUBLIC_CHANNEL = "gpu_updates"
BILLING_CHANNEL = "billing_events"

EVENTS: dict[str, Kind] = {
    "gpu.available": Kind("gpu_updates", "a provider offers a GPU that was not offered before"),
    "gpu.unavailable": Kind("gpu_updates", "of a GPU nothing is offered any more"),
    "gpu.price_changed": Kind("gpu_updates", "the lowest price of a GPU has changed"),
    "instance.created": Kind("instance_events", "an instance is rented and will be started"),
    "instance.running": Kind("instance_events", "it is up"),
    "instance.unreachable": Kind(
        "instance_events",
        "its provider has lost sight of it, or does not answer about it: see `reason`; told as running when it is seen",
    ),
    "instance.stopped": Kind("instance_events", "it is stopped; its disk is kept and costs"),
    "instance.failed": Kind("instance_events", "it could not be had, or broke"),
    "instance.warning": Kind("instance_events", "credit or a budget will soon be used up, and then it is destroyed"),
    "instance.destroyed": Kind("instance_events", "it is gone and costs nothing any more"),
    "provider.finding": Kind("instance_events", "for admins: an instance that is not ours, or a charge that differs"),
    "payment.completed": Kind("billing_events", "a payment was received; also payment.success"),
    "payment.failed": Kind("billing_events", "a payment was refused"),
    "payment.refunded": Kind("billing_events", "a payment was given back"),
    "subscription.renewed": Kind("billing_events", "a subscription goes on for another period"),
    "subscription.cancelled": Kind(
        "billing_events", "a subscription ends: renewal was switched off, or failed too often"
    ),
    "credits.added": Kind("billing_events", "credit came in: a payment, a gift of the operator, a refund undone"),
    "budget.warning": Kind("billing_events", "80 % of a budget are spent"),
    "budget.exceeded": Kind("billing_events", "a budget is spent, or a call or rental was refused because it would be"),
    "credits.low": Kind("billing_events", "little credit is left; once, until credit is added"),
    "usage.recorded": Kind("usage_events", "calls of yours were charged: a sum over a moment"),
    "webhook.test": Kind("account_events", "a test delivery you asked for; goes to that webhook only"),
    "webhook.disabled": Kind("account_events", "a webhook gets nothing any more, with the reason"),
}
# Other spellings; who asks for one of them is told the event by it.
ALIASES: dict[str, str] = {"payment.success": "payment.completed"}
EVERYTHING = "*"
UNSENDABLE = ("webhook.test", "webhook.disabled")  # nobody subscribes to these; a webhook cannot tell its own end


def canonical(name: str) -> str:
    """Return the name an event is recorded under."""
    return ALIASES.get(name, name)


def spellings(name: str) -> tuple[str, ...]:
    """Return all that a webhook may have subscribed to for being told of the event `name`."""
    return (name, *(alias for alias, meant in ALIASES.items() if meant == name), EVERYTHING)


def channel_of(name: str) -> str:
    """Return the channel that carries the event `name`; "" for one that another version recorded."""
    return EVENTS[name].channel if name in EVENTS else ""


def socket_type(name: str) -> str:
    """Return what ``/ws`` calls the event: ``payment.completed`` is ``payment_completed`` there."""
    return name.replace(".", "_")


def subscribable(is_billing: bool) -> tuple[str, ...]:
    """Return the names a webhook may ask for: those of an account's own things, or of its payments only.

    What is the same for everybody goes over ``/ws`` alone: every change of a market to every webhook is a flood.
    """
    channels = {BILLING_CHANNEL} if is_billing else set(CHANNELS) - {PUBLIC_CHANNEL}
    own = [name for name, kind in EVENTS.items() if kind.channel in channels and name not in UNSENDABLE]
    return (*own, *(alias for alias, name in ALIASES.items() if name in own))
