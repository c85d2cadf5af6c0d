"""Which offers fit a query: the rules every adapter applies to what its provider lists."""

import re
from collections.abc import Iterable

from gpuproxy.plugin.provider import Offer, OfferQuery

# Words of a GPU's name that tell the maker or the form, not the model: "H100" means "NVIDIA H100 SXM" too.
_MAKERS = frozenset(("nvidia", "geforce", "amd", "intel", "tesla", "quadro", "radeon", "instinct"))
_FORMS = frozenset(
    ("rtx", "gtx", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "pcie", "nvl", "hbm2", "hbm2e", "hbm3")
)


def short_model(name: str) -> str:
    """Return a GPU's name as people write it: "NVIDIA GeForce RTX_4090" is "RTX 4090"."""
    return " ".join(word for word in name.replace("_", " ").split() if word.lower() not in _MAKERS)


def is_same_model(wanted: str, offered: str) -> bool:
    """Tell whether a GPU is of the model asked for, whatever its form: "rtx4090" is "RTX 4090", not "RTX 4090 D"."""
    asked, given = _words(wanted), _words(offered)
    return bool(asked) and asked <= given and all(word in _FORMS or word.endswith("gb") for word in given - asked)


def _words(name: str) -> set[str]:
    return set(re.sub(r"\b([rg]tx)(?=\d)", r"\1 ", short_model(name.replace("-", " ")).lower()).split())


def is_fitting(offer: Offer, query: OfferQuery) -> bool:
    """Tell whether an offer is what the query asks for; providers' own filters are not to be trusted."""
    return (
        (query.min_vram_gb is None or offer.vram_gb >= query.min_vram_gb)
        and (
            query.max_price_nanousd_per_hour is None or offer.price_nanousd_per_hour <= query.max_price_nanousd_per_hour
        )
        and (query.gpu_model is None or is_same_model(query.gpu_model, offer.gpu_model))
        and (query.gpu_count is None or offer.gpu_count == query.gpu_count)
        and (query.region is None or _is_in_region(query.region, offer.region))
        and _reaches(offer.reliability, query.min_reliability)
        and _reaches(offer.cuda, query.min_cuda)
        and offer.is_spot == bool(query.is_spot)
        and (not offer.disk_gb or offer.disk_gb >= query.disk_gb)
    )


def _reaches(told: float | None, least: float | None) -> bool:
    return least is None or (told is not None and told >= least)


def _is_in_region(wanted: str, region: str) -> bool:
    if len(wanted) == 2:  # a country; "us" must not find "Belarus"
        return wanted.upper() == region.rpartition(",")[2].strip().upper()
    return wanted.lower() in region.lower()


def best_offers(offers: Iterable[Offer], query: OfferQuery) -> list[Offer]:
    """Return the offers that fit, cheapest first, no more than the query's limit."""
    fitting = [offer for offer in offers if is_fitting(offer, query)]
    return sorted(fitting, key=lambda offer: (offer.price_nanousd_per_hour, offer.id))[: query.limit]
