"""What a call costs: exact, never too little, never more than was reserved."""

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy import config
from gpuproxy.ledger.book import format_usd
from gpuproxy.pricing import (
    CHARGE_NANOUSD_MAX,
    FREE,
    METER_MAX,
    Catalogue,
    Price,
    charge,
    from_config,
    marked_up,
    nanousd_of,
    upper_bound,
)
from gpuproxy.types import Usage

AMOUNTS = st.integers(0, 10**10)
PRICES = st.builds(Price, st.just("m"), st.just(""), *[AMOUNTS] * 5)
COUNTS = st.integers(-1, 10**6)
USAGES = st.builds(Usage, COUNTS, COUNTS, COUNTS)
DURATIONS = st.integers(-1, 10**8)
MINI = Price("m", "", 150_000_000, 30_000_000, 600_000_000, 100_000_000, 2_000)


def test_each_meter_has_its_price() -> None:
    assert charge(Usage(1_000, 400, 50), MINI) == 600 * 150 + 400 * 30 + 50 * 600 + 100_000_000
    assert charge(Usage(0, 0, 0), MINI, 1_500_000) == 100_000_000 + 3_000


def test_a_call_that_was_not_served_pays_for_its_tokens_only() -> None:
    assert charge(Usage(10, 0, 1), MINI, 9_000_000, is_served=False) == 10 * 150 + 600


def test_unknown_usage_costs_no_tokens() -> None:
    assert charge(Usage(-1, -1, -1, "none"), MINI) == 100_000_000


def test_more_cached_tokens_than_input_are_not_believed() -> None:
    assert charge(Usage(10, 1_000, 0), MINI, is_served=False) == 10 * 30


def test_a_claim_beyond_reason_is_bounded() -> None:
    assert charge(Usage(2**80, 0, 2**80), msgspec.structs.replace(MINI, input_nanousd_per_million=10**15)) == (
        CHARGE_NANOUSD_MAX
    )
    cheap = Price("m", input_nanousd_per_million=1)
    assert charge(Usage(2**80, 0, 0), cheap) == METER_MAX // 10**6


@given(USAGES, PRICES, DURATIONS)
def test_a_charge_is_the_exact_cost_rounded_up_once_for_each_meter(usage: Usage, price: Price, us: int) -> None:
    whole, cached, output = (max(0, n) for n in (usage.input_tokens, usage.cached_tokens, usage.output_tokens))
    cached = min(cached, whole)
    exact = price.request_nanousd + Fraction(
        (whole - cached) * price.input_nanousd_per_million
        + cached * price.cached_input_nanousd_per_million
        + output * price.output_nanousd_per_million
        + max(0, us) * price.second_nanousd,
        10**6,
    )
    assert exact <= charge(usage, price, us) < exact + 4


@given(USAGES, PRICES, DURATIONS, st.integers(0, 10**6))
def test_more_use_never_costs_less(usage: Usage, price: Price, us: int, more: int) -> None:
    for field in ("input_tokens", "output_tokens"):
        bigger = msgspec.structs.replace(usage, **{field: getattr(usage, field) + more})
        assert charge(bigger, price, us) >= charge(usage, price, us)
    assert charge(usage, price, us + more) >= charge(usage, price, us)


@given(USAGES, PRICES, DURATIONS, COUNTS, COUNTS)
def test_a_call_never_costs_more_than_its_upper_bound(usage: Usage, price: Price, us: int, a: int, b: int) -> None:
    bound = upper_bound(price, max(usage.input_tokens, a), max(usage.output_tokens, b), us)
    assert charge(usage, price, us) <= bound


@given(USAGES, PRICES, DURATIONS, st.integers(-10_000, 1_000_000))
def test_a_markup_is_exact_to_what_rounding_up_adds(usage: Usage, price: Price, us: int, markup_bps: int) -> None:
    marked = marked_up(price, markup_bps)
    for name in ("input_nanousd_per_million", "output_nanousd_per_million", "request_nanousd", "second_nanousd"):
        exact = Fraction(getattr(price, name) * (10_000 + markup_bps), 10_000)
        assert 0 <= getattr(marked, name) - exact < 1
    assert charge(usage, marked, us) <= upper_bound(
        marked, max(0, usage.input_tokens), max(0, usage.output_tokens), max(0, us)
    )


def test_the_upper_bound_of_a_price_in_whole_nanodollars_is_what_the_call_costs() -> None:
    assert upper_bound(MINI, 1_000, 50) == charge(Usage(1_000, 0, 50), MINI)


@given(st.integers(0, 10**15 - 1))
def test_a_price_survives_writing_and_reading(nanousd: int) -> None:
    assert nanousd_of(format_usd(nanousd)) == nanousd


def test_a_configured_price_is_read_exactly() -> None:
    written = config.Price("m", "llm", "0.15", "0.03", "0.60", "0.10", "0.000000001")
    assert from_config(written) == Price("m", "llm", 150_000_000, 30_000_000, 600_000_000, 100_000_000, 1)


def test_cached_input_without_a_price_costs_what_input_costs() -> None:
    assert from_config(config.Price("m", input_usd_per_million="2")).cached_input_nanousd_per_million == 2 * 10**9
    free = config.Price("m", input_usd_per_million="2", cached_input_usd_per_million="0")
    assert from_config(free).cached_input_nanousd_per_million == 0


@pytest.mark.parametrize("text", ["x", "-1", "1e9", "0.0000000001"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no price"):
        nanousd_of(text)


def test_the_closest_price_is_taken() -> None:
    both, model, upstream, any_call = Price("m", "u"), Price("m"), Price("*", "u"), Price("*")
    prices = Catalogue([any_call, upstream, model, both])
    assert [prices.find(*names, 0) for names in [("m", "u"), ("m", "v"), ("n", "u"), ("n", "v")]] == [
        both,
        model,
        upstream,
        any_call,
    ]


def test_a_price_holds_from_its_time_to_the_next() -> None:
    old, new = Price("m", valid_from_ns=10), Price("m", request_nanousd=5, valid_from_ns=20)
    prices = Catalogue([new, old])
    assert [prices.find("m", "u", at) for at in (9, 10, 19, 20, 21)] == [FREE, old, old, new, new]


def test_a_model_without_a_price_is_free() -> None:
    assert Catalogue([MINI]).find("other", "u", 0) is FREE
    assert not Catalogue()
    assert charge(Usage(10**6, 0, 10**6), FREE, 10**9) == 0
