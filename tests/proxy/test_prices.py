"""Prices in a worker: as control tells them, at the time of the call."""

from gpuproxy.pricing import Catalogue, Price
from gpuproxy.proxy.prices import FOUND_MAX, Prices

OLD, NEW = Price("m", request_nanousd=1), Price("m", request_nanousd=2, valid_from_ns=100)
HERE = Price("m", "llm", request_nanousd=3)


def test_without_prices_nothing_is_looked_up() -> None:
    prices = Prices()
    assert not prices.is_any
    prices.replace([OLD])
    assert prices.is_any
    prices.replace([])
    assert not prices.is_any


def test_the_price_of_an_upstream_beats_that_of_the_model() -> None:
    prices = Prices()
    prices.replace([OLD, HERE])
    assert prices.find("m", "llm", 1) is HERE
    assert prices.find("m", "other", 1) is OLD
    assert prices.find("free", "other", 1) is None


def test_a_price_of_nothing_is_no_price() -> None:
    prices = Prices()
    prices.replace([Price("*", request_nanousd=1), Price("m")])
    assert prices.find("m", "llm", 1) is None
    assert prices.find("n", "llm", 1) is not None


def test_a_new_version_holds_for_calls_from_its_time_on() -> None:
    prices = Prices()
    prices.replace([OLD, NEW])
    assert [prices.find("m", "", at_ns) for at_ns in (99, 100, 101)] == [OLD, NEW, NEW]


def test_models_made_up_by_clients_do_not_fill_the_memory() -> None:
    prices = Prices()
    prices.replace([OLD])
    for number in range(FOUND_MAX + 10):
        prices.find(f"made-up-{number}", "", 1)
    assert len(prices._found) <= FOUND_MAX


def test_what_is_told_is_what_holds_and_what_will() -> None:
    past, current, future = (Price("m", request_nanousd=n, valid_from_ns=n * 10) for n in (1, 2, 3))
    catalogue = Catalogue([past, current, future, HERE])
    assert set(catalogue.from_now_on(25)) == {current, future, HERE}
    assert set(catalogue.from_now_on(5)) == {past, current, future, HERE}
    assert catalogue.next_change_ns(25) == 30
