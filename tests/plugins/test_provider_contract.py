"""The suite every provider adapter passes, each against a market that keeps its own state over time."""

from collections.abc import AsyncIterator

import pytest
from provider_worlds import HOUR_S, WORLDS, World

from gpuproxy.plugin import (
    CapacityGone,
    InstanceGone,
    InstanceSpec,
    NotSupported,
    OfferQuery,
    SpecRefused,
    is_fitting,
    is_same_model,
)

UNKNOWN = {"ionet": "3fa85f64-5717-4562-b3fc-2c963f66afa6"}


@pytest.fixture(params=sorted(WORLDS))
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Bring up each world in turn."""
    made = WORLDS[request.param]()
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def unknown(request: pytest.FixtureRequest) -> str:
    """Name an instance that never was."""
    return UNKNOWN.get(request.node.callspec.params["world"], "999999999")


async def test_offers_come_cheapest_first_and_are_complete(world: World) -> None:
    offers = await world.adapter.offers(OfferQuery())
    assert len(offers) > 3
    prices = [offer.price_nanousd_per_hour for offer in offers]
    assert prices == sorted(prices)
    for offer in offers:
        assert offer.provider == world.adapter.name
        assert offer.id
        assert offer.gpu_model
        assert min(offer.gpu_count, offer.vram_gb, offer.price_nanousd_per_hour) > 0
        assert not offer.is_spot


@pytest.mark.parametrize(
    "query",
    [
        OfferQuery(min_vram_gb=80),
        OfferQuery(max_price_nanousd_per_hour=500_000_000),
        OfferQuery(gpu_model="RTX 4090"),
        OfferQuery(gpu_model="h100"),
        OfferQuery(gpu_count=8),
        OfferQuery(region="US"),
        OfferQuery(limit=2),
    ],
    ids=repr,
)
async def test_a_query_finds_what_fits_and_nothing_else(world: World, query: OfferQuery) -> None:
    offers = await world.adapter.offers(query)
    everything = await world.adapter.offers(OfferQuery(limit=1_000))
    fitting = [offer.id for offer in everything if is_fitting(offer, query)]
    assert [offer.id for offer in offers] == fitting[: query.limit]
    assert offers
    assert query.gpu_model is None or all(is_same_model(query.gpu_model, offer.gpu_model) for offer in offers)


async def test_a_model_nobody_has_is_found_nowhere(world: World) -> None:
    assert await world.adapter.offers(OfferQuery(gpu_model="TPU v9")) == []


async def test_spot_offers_are_told_apart(world: World) -> None:
    offers = await world.adapter.offers(OfferQuery(is_spot=True))
    assert bool(offers) is world.has_spot
    assert all(offer.is_spot for offer in offers)


async def test_an_instance_boots_and_then_has_an_address(world: World) -> None:
    made = await world.rented("gp-1")
    made_ns = world.clock.now_ns()
    assert (made.tag, made.state, made.ports) == ("gp-1", "pending", {})
    world.clock.now_s += world.boot_s
    seen = await world.adapter.get(made.id)
    assert seen is not None
    assert (seen.id, seen.tag, seen.state) == (made.id, "gp-1", "running")
    assert seen.ip
    assert set(seen.ports) == {8000}
    assert seen.gpu_model
    assert seen.price_nanousd_per_hour > 0
    assert seen.started_ns == 0 or made_ns < seen.started_ns <= world.clock.now_ns()


async def test_an_instance_is_found_by_its_tag_alone(world: World) -> None:
    first, second = await world.rented("gp-1"), await world.rented("gp-2")
    assert [seen.id for seen in await world.adapter.find("gp-2")] == [second.id]
    assert await world.adapter.find("gp-3") == []
    assert await world.adapter.find("gp") == []
    assert {seen.id: seen.tag for seen in await world.adapter.list()} == {first.id: "gp-1", second.id: "gp-2"}


async def test_everything_that_was_rented_is_listed(world: World) -> None:
    offers = await world.adapter.offers(OfferQuery())
    spec = InstanceSpec(image="a/b")
    made = {(await world.adapter.create(offer.id, spec, f"gp-{offer.id}")).id for offer in offers[:8]}
    assert len(made) == 8
    assert {seen.id for seen in await world.adapter.list()} == made


async def test_an_offer_that_is_taken_says_so(world: World) -> None:
    offers = await world.adapter.offers(OfferQuery())
    await world.adapter.create(offers[0].id, InstanceSpec(image="a/b"), "gp-1")
    assert offers[0].id not in [offer.id for offer in await world.adapter.offers(OfferQuery())]
    with pytest.raises(CapacityGone) as raised:
        await world.adapter.create(offers[0].id, InstanceSpec(image="a/b"), "gp-2")
    assert (raised.value.phase, raised.value.may_have_worked, raised.value.is_retryable) == ("create", False, False)
    assert len(await world.adapter.list()) == 1


async def test_what_is_too_dear_is_not_rented(world: World) -> None:
    (offer,) = await world.adapter.offers(OfferQuery(limit=1))
    spec = InstanceSpec(image="a/b", max_price_nanousd_per_hour=offer.price_nanousd_per_hour // 2)
    with pytest.raises(CapacityGone):
        await world.adapter.create(offer.id, spec, "gp-1")
    assert await world.adapter.list() == []


async def test_a_spot_offer_needs_a_bid(world: World) -> None:
    if not world.has_spot:
        with pytest.raises(SpecRefused):
            await world.rented(bid_nanousd_per_hour=1)
        return
    (offer,) = await world.adapter.offers(OfferQuery(is_spot=True, limit=1))
    with pytest.raises(SpecRefused):
        await world.adapter.create(offer.id, InstanceSpec(image="a/b"), "gp-1")
    assert await world.adapter.list() == []


async def test_an_instance_that_never_was_is_none(world: World, unknown: str) -> None:
    assert await world.adapter.get(unknown) is None


async def test_a_destroyed_instance_is_gone_and_may_be_destroyed_again(world: World) -> None:
    made = await world.running()
    await world.adapter.destroy(made.id)
    world.clock.now_s += world.boot_s
    seen = await world.adapter.get(made.id)
    assert seen is None or seen.state == "gone"
    assert await world.adapter.list() == []
    assert await world.adapter.find("gp-1") == []
    await world.adapter.destroy(made.id)


async def test_destroying_what_never_was_is_no_error(world: World, unknown: str) -> None:
    await world.adapter.destroy(unknown)


async def test_an_instance_stops_and_starts_where_the_provider_can(world: World) -> None:
    made = await world.running()
    if not world.has_stop:
        for call in (world.adapter.stop, world.adapter.start):
            with pytest.raises(NotSupported):
                await call(made.id)
        return
    await world.adapter.stop(made.id)
    world.clock.now_s += world.boot_s
    seen = await world.adapter.get(made.id)
    assert seen is not None
    assert (seen.state, seen.ports, seen.is_interrupted) == ("stopped", {}, False)
    assert seen.storage_nanousd_per_hour > 0
    await world.adapter.start(made.id)
    world.clock.now_s += world.boot_s
    seen = await world.adapter.get(made.id)
    assert seen is not None
    assert seen.state == "running"


async def test_what_is_gone_cannot_be_started_stopped_or_read(world: World, unknown: str) -> None:
    for call in (world.adapter.start(unknown), world.adapter.stop(unknown), world.adapter.logs(unknown, 10)):
        with pytest.raises((InstanceGone, NotSupported)) as raised:
            await call
        assert not raised.value.is_retryable


async def test_the_log_has_no_more_lines_than_asked_for(world: World) -> None:
    made = await world.running()
    whole = await world.adapter.logs(made.id, 100)
    assert whole.count("\n") > 1
    last = await world.adapter.logs(made.id, 1)
    assert last.strip() == whole.strip().splitlines()[-1]


async def test_what_the_provider_took_is_told_by_instance(world: World) -> None:
    since_ns = world.clock.now_ns()
    made = await world.running()
    world.clock.now_s += HOUR_S
    until_ns = world.clock.now_ns()
    charges = await world.adapter.charges(since_ns, until_ns)
    assert {charge.instance_id for charge in charges} == {made.id}
    taken = sum(charge.amount_nanousd for charge in charges if charge.kind in ("gpu", "prepaid"))
    assert taken == pytest.approx(made.price_nanousd_per_hour, rel=0.05)


async def test_a_provider_that_can_be_used_passes_the_check(world: World) -> None:
    await world.adapter.check()
