"""What has changed at a provider between two looks, for everybody: GPUs that came, that went, that cost another price.

A model counts, not each of the thousands of offers of it: it is there as long as there is one, at the lowest price.
"""

from collections.abc import Iterable, Mapping

from gpuproxy.plugin import Offer

NEWS_MAX = 20  # of each kind, told of in one look

Cheapest = Mapping[str, Offer]
News = list[tuple[str, Offer]]


def cheapest(offers: Iterable[Offer]) -> dict[str, Offer]:
    """Return the cheapest offer of each model."""
    found: dict[str, Offer] = {}
    for offer in sorted(offers, key=lambda each: (each.price_nanousd_per_hour, each.id)):
        found.setdefault(offer.gpu_model, offer)
    return found


def news(before: Cheapest, now: Cheapest) -> News:
    """Return the names of events and the offers they are about; what is gone is shown as it last was."""
    came = [("gpu.available", offer) for model, offer in now.items() if model not in before]
    went = [("gpu.unavailable", offer) for model, offer in before.items() if model not in now]
    moved = [("gpu.price_changed", offer) for model, offer in now.items() if _has_moved(before.get(model), offer)]
    return came[:NEWS_MAX] + went[:NEWS_MAX] + moved[:NEWS_MAX]


def _has_moved(before: Offer | None, now: Offer) -> bool:
    return before is not None and before.price_nanousd_per_hour != now.price_nanousd_per_hour
