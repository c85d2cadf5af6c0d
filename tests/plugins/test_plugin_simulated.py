"""The simulated marketplace: what moves in it, and what it is told by its options."""

from pathlib import Path

import pytest
from gpuproxy_plugins.simulated import Simulated
from gpuproxy_plugins.simulated_market import TENANCY_NS, WINDOW_NS, Market
from provider_worlds import Clock

from gpuproxy.plugin import (
    CapacityGone,
    InstanceSpec,
    OfferQuery,
    ProviderSettings,
    ProviderUnavailable,
)

SPEC = InstanceSpec(image="a/b", ports=(8000, 9000))


def simulated(clock: Clock, **options: str) -> Simulated:
    """Return a market with these options."""
    return Simulated(ProviderSettings(options=options), clock.now_ns)


def next_window_above(bid: int, offer_id: str, now_s: float) -> float:
    """Return when the market next asks more than `bid` for the machine."""
    market = Market("1")
    machine = market.machines[offer_id.removesuffix("-spot")]
    while market.price_nanousd_per_hour(machine, round(now_s * 1e9), is_spot=True) <= bid:
        now_s += WINDOW_NS / 1e9
    return now_s


async def test_one_seed_is_one_market() -> None:
    first, second, other = (simulated(Clock(), seed=seed) for seed in ("7", "7", "8"))
    assert await first.offers(OfferQuery()) == await second.offers(OfferQuery())
    assert await first.offers(OfferQuery()) != await other.offers(OfferQuery())


def test_prices_move_and_capacity_comes_and_goes() -> None:
    market = Market("1")
    machine = market.machines["m01"]
    moments = [number * WINDOW_NS for number in range(100)]
    prices = {market.price_nanousd_per_hour(machine, now_ns, is_spot=False) for now_ns in moments}
    assert len(prices) > 10
    assert all(0.84 < price / machine.usual_nanousd_per_hour < 1.16 for price in prices)
    taken = [market.is_taken(machine, number * TENANCY_NS) for number in range(400)]
    assert 0.2 < sum(taken) / len(taken) < 0.4


async def test_a_named_server_stands_behind_the_port_of_every_instance() -> None:
    clock = Clock()
    market = Simulated(ProviderSettings(options={"8000": "127.0.0.1:5000"}), clock.now_ns)
    (offer,) = await market.offers(OfferQuery(limit=1))
    made = await market.create(offer.id, SPEC, "gp-1")
    clock.now_s += 5
    seen = await market.get(made.id)
    assert seen is not None
    assert (seen.ip, seen.ports[8000]) == ("127.0.0.1", 5000)
    assert seen.ports[9000] > 39_999


async def test_some_instances_never_come_up() -> None:
    clock = Clock()
    market = simulated(clock, failures="1", boot_s="2")
    (offer,) = await market.offers(OfferQuery(limit=1))
    made = await market.create(offer.id, SPEC, "gp-1")
    clock.now_s += 2
    seen = await market.get(made.id)
    assert seen is not None
    assert (seen.state, seen.ports) == ("failed", {})


async def test_the_lowest_bid_is_outbid_in_time_and_costs_nothing_from_then_on() -> None:
    clock = Clock()
    market = simulated(clock)
    (offer,) = await market.offers(OfferQuery(is_spot=True, limit=1))
    spec = InstanceSpec(image="a/b", bid_nanousd_per_hour=offer.price_nanousd_per_hour)
    with pytest.raises(CapacityGone):
        await market.create(offer.id, InstanceSpec(image="a/b", bid_nanousd_per_hour=1), "gp-0")
    made = await market.create(offer.id, spec, "gp-1")
    since_ns = clock.now_ns()
    clock.now_s += 86_400
    seen = await market.get(made.id)
    assert seen is not None
    assert (seen.state, seen.is_interrupted, seen.message) == ("stopped", True, "outbid")
    gpu = [charge for charge in await market.charges(since_ns, clock.now_ns()) if charge.kind == "gpu"]
    assert sum(charge.amount_nanousd for charge in gpu) < 24 * offer.price_nanousd_per_hour
    clock.now_s = next_window_above(offer.price_nanousd_per_hour, offer.id, clock.now_s)
    with pytest.raises(CapacityGone, match="is outbid"):
        await market.start(made.id)


async def test_time_is_charged_to_the_second() -> None:
    clock = Clock()
    market = simulated(clock, boot_s="10")
    (offer,) = await market.offers(OfferQuery(limit=1))
    made = await market.create(offer.id, SPEC, "gp-1")
    since_ns = clock.now_ns()
    clock.now_s += 10 + 1_800
    await market.stop(made.id)
    clock.now_s += 1_800
    await market.destroy(made.id)
    clock.now_s += 1_800
    gpu, storage = await market.charges(since_ns, clock.now_ns())
    assert (gpu.kind, gpu.amount_nanousd) == ("gpu", offer.price_nanousd_per_hour // 2)
    assert storage.kind == "storage"
    assert storage.amount_nanousd == 10 * offer.storage_nanousd_per_gb_hour * 1_810 // 3_600


async def test_more_disk_is_in_the_price() -> None:
    market = simulated(Clock())
    (offer,) = await market.offers(OfferQuery(limit=1))
    (larger,) = [each for each in await market.offers(OfferQuery(disk_gb=110)) if each.id == offer.id]
    assert larger.price_nanousd_per_hour == offer.price_nanousd_per_hour + 100 * offer.storage_nanousd_per_gb_hour
    made = await market.create(offer.id, InstanceSpec(image="x", disk_gb=110), "gp-1")
    assert made.price_nanousd_per_hour == larger.price_nanousd_per_hour


async def test_rentals_outlive_the_process_in_a_file(tmp_path: Path) -> None:
    clock, file = Clock(), str(tmp_path / "market.json")
    market = simulated(clock, file=file)
    (offer,) = await market.offers(OfferQuery(limit=1))
    made = await market.create(offer.id, SPEC, "gp-1")
    again = simulated(clock, file=file)
    assert [seen.id for seen in await again.find("gp-1")] == [made.id]
    await again.destroy(made.id)
    assert await simulated(clock, file=file).list() == []


async def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "market.json"
    broken.write_text("{")
    with pytest.raises(ProviderUnavailable, match=r"simulated: .*market\.json cannot be used .*; repair or remove it"):
        await simulated(Clock(), file=str(broken)).check()
    market = simulated(Clock(), file=str(tmp_path / "no" / "such"))
    (offer,) = await market.offers(OfferQuery(limit=1))
    with pytest.raises(ProviderUnavailable, match="cannot be written"):
        await market.create(offer.id, SPEC, "gp-1")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sed": "1"}, '"sed" is unknown; known: seed, boot_s, failures, file, and PORT = HOST:PORT'),
        ({"ip": "1.2.3.4"}, '"ip" is unknown'),
        ({"boot_s": "soon"}, "boot_s"),
        ({"failures": "2"}, "failures"),
        ({"8000": "localhost"}, "is no PORT = HOST:PORT"),
        ({"80000": "localhost:1"}, "is no PORT = HOST:PORT"),
        ({"1": "a:1", "2": "b:1"}, "the ports lead to a, b; an instance has one address"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Simulated(ProviderSettings(options=options))
