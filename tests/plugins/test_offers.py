"""Which offers fit a query."""

import pytest

from gpuproxy.plugin import Offer, OfferQuery, best_offers, is_fitting, is_same_model, short_model


def offer(**fields: object) -> Offer:
    """Return an offer of one RTX 4090 for $0.40 with some fields changed."""
    base: dict[str, object] = {
        "id": "1",
        "provider": "moon.gpu",
        "gpu_model": "RTX 4090",
        "gpu_count": 1,
        "vram_gb": 24,
        "price_nanousd_per_hour": 400_000_000,
        "region": "California, US",
        "reliability": 0.99,
        "cuda": 12.8,
    }
    return Offer(**{**base, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        (OfferQuery(), True),
        (OfferQuery(min_vram_gb=24), True),
        (OfferQuery(min_vram_gb=25), False),
        (OfferQuery(max_price_nanousd_per_hour=400_000_000), True),
        (OfferQuery(max_price_nanousd_per_hour=399_999_999), False),
        (OfferQuery(max_price_nanousd_per_hour=0), False),
        (OfferQuery(gpu_count=1), True),
        (OfferQuery(gpu_count=2), False),
        (OfferQuery(gpu_model="rtx_4090"), True),
        (OfferQuery(gpu_model="H100"), False),
        (OfferQuery(region="us"), True),
        (OfferQuery(region="california"), True),
        (OfferQuery(region="CA"), False),
        (OfferQuery(min_reliability=0.99), True),
        (OfferQuery(min_reliability=0.995), False),
        (OfferQuery(min_cuda=12.8), True),
        (OfferQuery(min_cuda=13.0), False),
        (OfferQuery(is_spot=False), True),
        (OfferQuery(is_spot=True), False),
    ],
)
def test_every_bound_of_a_query_counts(query: OfferQuery, fits: bool) -> None:
    assert is_fitting(offer(), query) is fits


def test_a_bound_on_what_is_not_told_excludes() -> None:
    unknown = offer(reliability=None, cuda=None)
    assert is_fitting(unknown, OfferQuery())
    assert not is_fitting(unknown, OfferQuery(min_reliability=0.1))
    assert not is_fitting(unknown, OfferQuery(min_cuda=11.0))


def test_the_cheapest_come_first_and_no_more_than_asked_for() -> None:
    many = [offer(id=str(price), price_nanousd_per_hour=price) for price in (3, 1, 2)]
    assert [each.id for each in best_offers(many, OfferQuery(limit=2))] == ["1", "2"]


@pytest.mark.parametrize(
    ("wanted", "offered", "same"),
    [
        ("4090", "RTX 4090", True),
        ("rtx4090", "RTX 4090", True),
        ("RTX4090D", "RTX 4090", False),
        ("GeForce RTX 4090", "RTX 4090", True),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("RTX 4090", "RTX 4090 D", False),
        ("RTX 3060", "RTX 3060 Ti", False),
        ("H100", "H100 SXM5", True),
        ("a100", "A100-SXM4-80GB", True),
        ("A100 PCIE", "A100 SXM4", False),
        ("A100", "A1000", False),
        ("nvidia", "RTX 4090", False),
        ("", "RTX 4090", False),
    ],
)
def test_a_model_is_found_whatever_its_form(wanted: str, offered: str, same: bool) -> None:
    assert is_same_model(wanted, offered) is same


def test_a_model_is_shown_without_its_maker() -> None:
    assert short_model("NVIDIA GeForce RTX_4090") == "RTX 4090"
