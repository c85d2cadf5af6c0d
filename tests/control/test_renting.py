"""What renting does when it is repeated, refused, or cannot have what was wished: nothing twice, nothing hidden."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gpuproxy_plugins.simulated import Simulated
from msgspec import structs

from gpuproxy import config
from gpuproxy.control.parts import OFFERS
from gpuproxy.fleet import offers as fleet_offers
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.ledger.book import credit
from gpuproxy.plugin import (
    InstanceSpec,
    Offer,
    OfferQuery,
    ProviderError,
    ProviderInstance,
    ProviderSettings,
    ProviderUnavailable,
    RateLimited,
)

from .conftest import MARKET_NS, Api, Person

GPU = "/api/v1/gpu"
KEY = {"Idempotency-Key": "once"}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def person(api: Api) -> Person:
    made = await api.person()
    await credit(api.store, made.id, 100_000_000_000, "gift")
    return made


class Market(Simulated):
    """A market whose time stands still, that fails as it is told and remembers which offers were asked for."""

    def __init__(self) -> None:
        super().__init__(ProviderSettings(options={"boot_s": "0"}), lambda: MARKET_NS)
        self.fails = 0
        self.asked: list[str] = []

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        self.asked.append(offer_id)
        if self.fails:
            self.fails -= 1
            raise ProviderUnavailable("simulated", "create", "no connection; try later")
        return await super().create(offer_id, spec, tag)

    async def logs(self, id: str, tail: int) -> str:
        return "x" * 3_000_000 + "end"


@pytest.fixture
async def market(api: Api) -> Market:
    made = Market()
    api.fleet.providers["simulated"] = made  # type: ignore[index]
    return made


async def listed(api: Api, person: Person, query: str = "?limit=1000") -> Any:
    _, told = await api.call("GET", f"{GPU}/instances{query}", headers=person.by_key)
    return told


async def rent(api: Api, person: Person, id: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    headers = {**person.by_key, **(headers or {})}
    return await api.call("POST", f"{GPU}/instances/simulated/{id}", {"image": "x", **body}, headers)


async def reserve(api: Api, person: Person, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await api.call("POST", f"{GPU}/instances/reserve", body, {**person.by_key, **(headers or {})})


async def test_a_repeated_reservation_gives_the_same_though_nothing_is_offered_any_more(
    api: Api, person: Person, market: Market
) -> None:
    model = (await listed(api, person))["data"][0]["gpu_model"]
    count = sum(each["gpu_model"] == model for each in (await listed(api, person))["data"])
    answers = [await reserve(api, person, KEY, count=count, gpu_model=model) for _ in range(2)]
    assert [status for status, _ in answers] == [201, 201]
    first, again = ({each["contract_id"] for each in told["instances"]} for _, told in answers)
    assert first == again
    assert len(await market.list()) == count


@pytest.mark.parametrize("count", [1, 3])
async def test_a_reservation_of_another_number_with_the_same_key_is_refused_and_holds_nothing(
    api: Api, person: Person, market: Market, count: int
) -> None:
    await reserve(api, person, KEY, count=2)
    status, told = await reserve(api, person, KEY, count=count)
    assert (status, told["code"], "Idempotency-Key" in told["error"]) == (422, "UNPROCESSABLE", True)
    _, told = await api.call("GET", f"{GPU}/rentals", headers=person.by_key)
    assert told["count"] == 2


async def test_what_was_refused_may_be_tried_again_with_the_same_key(api: Api, person: Person, market: Market) -> None:
    id = (await listed(api, person))["data"][0]["id"]
    for call in (lambda: rent(api, person, id, KEY), lambda: reserve(api, person, KEY, count=2)):
        market.fails = 1
        status, told = await call()
        assert (status, told["code"]) == (502, "PROVIDER_FAILED")
        status, _ = await call()
        assert status == 201
    assert len(await market.list()) == 3


async def test_two_calls_with_one_key_at_once_rent_once(api: Api, person: Person, market: Market) -> None:
    id = (await listed(api, person))["data"][0]["id"]
    answers = await asyncio.gather(*(rent(api, person, id, KEY) for _ in range(4)))
    assert {status for status, _ in answers} == {201}
    assert len({told["data"]["contract_id"] for _, told in answers}) == 1
    assert len(await market.list()) == 1


async def test_who_cannot_pay_hides_no_offer_from_others(api: Api, person: Person, market: Market) -> None:
    before = (await listed(api, person))["data"]
    poor = await api.person()
    for each in before[:3]:
        status, _ = await rent(api, poor, each["id"])
        assert status == 402
    status, _ = await reserve(api, poor, count=3)
    assert status == 402
    assert (await listed(api, person))["data"] == before


async def test_a_reservation_takes_offers_that_have_the_disk(api: Api, person: Person, market: Market) -> None:
    offers = (await listed(api, person))["data"]
    disks = sorted({each["disk_gb"] for each in offers})
    assert offers[0]["disk_gb"] < disks[-1]
    status, told = await reserve(api, person, count=1, disk_gb=disks[-1])
    assert status == 201, told
    status, told = await reserve(api, person, count=1, disk_gb=disks[-1] + 1)
    assert (status, told["code"]) == (409, "CAPACITY_GONE")


async def test_a_reservation_asks_for_nothing_that_its_bid_or_most_does_not_pay_with_the_disk(
    api: Api, person: Person, market: Market
) -> None:
    spot, *_ = (await listed(api, person, "?spot=true"))["data"]
    offer, *_ = (await listed(api, person))["data"]
    for bounds in ({"bid": spot["price_per_hour"]}, {"max_price": offer["price_per_hour"]}):
        status, told = await reserve(api, person, count=1, disk_gb=100, **bounds)
        assert (status, told["code"]) == (409, "CAPACITY_GONE")
        assert "0 offers fit" in told["error"]
    assert market.asked == []
    status, told = await reserve(api, person, count=1, bid=spot["price_per_hour"])
    assert (status, market.asked) == (201, [spot["id"].removeprefix("sim-")])


async def test_an_offer_over_the_most_is_passed_over_for_the_next_best(
    api: Api, person: Person, market: Market
) -> None:
    offers = (await listed(api, person))["data"]
    dear, cheap = next(
        (one, other)
        for one in reversed(offers)
        for other in offers
        if (one["gpu_model"], one["gpu_count"]) == (other["gpu_model"], other["gpu_count"])
        and other["price_per_hour"] < one["price_per_hour"]
    )
    most = (dear["price_per_hour"] + cheap["price_per_hour"]) / 2
    status, told = await rent(api, person, dear["id"], next_best=True, max_price=most)
    assert (status, market.asked) == (201, [cheap["id"].removeprefix("sim-")])
    assert told["data"]["price_per_hour"] == cheap["price_per_hour"]
    status, told = await rent(api, person, dear["id"], next_best=True, max_price=0.001)
    assert (status, told["code"]) == (409, "CAPACITY_GONE")
    assert dear["id"] in [each["id"] for each in (await listed(api, person))["data"]]


async def test_an_offer_that_does_not_fit_one_caller_stays_there_for_others(
    api: Api, person: Person, market: Market
) -> None:
    offer = (await listed(api, person))["data"][0]
    status, told = await rent(api, person, offer["id"], disk_gb=offer["disk_gb"] + 1)
    assert (status, told["code"]) == (422, "UNPROCESSABLE")
    assert "disk_gb" in told["error"]
    status, told = await rent(api, person, offer["id"], disk_gb=offer["disk_gb"], max_price=offer["price_per_hour"])
    assert (status, told["code"]) == (409, "CAPACITY_GONE")
    spot = (await listed(api, person, "?spot=true"))["data"][0]
    status, told = await rent(api, person, spot["id"], bid=spot["price_per_hour"] / 2)
    assert (status, told["code"], "bid more" in told["error"]) == (409, "CAPACITY_GONE", True)
    assert market.asked == []
    assert spot["id"] in [each["id"] for each in (await listed(api, person, "?spot=true"))["data"]]
    assert offer["id"] in [each["id"] for each in (await listed(api, person))["data"]]


@pytest.mark.parametrize(
    "body", [{"image": "a b"}, {"image": "x\ny"}, {"ssh_key": "my key"}, {"ssh_key": "MIIEpAIBAAKCAQEA"}], ids=str
)
async def test_what_no_machine_could_use_is_refused_before_it_costs(
    api: Api, person: Person, market: Market, body: dict[str, str]
) -> None:
    id = (await listed(api, person))["data"][0]["id"]
    status, told = await rent(api, person, id, **body)
    assert (status, told["error"].partition(":")[0]) == (422, next(iter(body)))
    status, _ = await rent(api, person, id, ssh_key=" ssh-ed25519 AAAA me\nssh-rsa AAAA you\n")
    assert status == 201


async def test_a_log_is_no_longer_than_its_bound(api: Api, person: Person, market: Market) -> None:
    _, told = await rent(api, person, (await listed(api, person))["data"][0]["id"])
    status, told = await api.call("GET", f"{GPU}/rentals/{told['data']['contract_id']}/logs", headers=person.by_key)
    assert status == 200
    assert len(told["data"]["logs"]) <= 1 << 20
    assert told["data"]["logs"].endswith("end")


@pytest.mark.parametrize("sort", ["price", "-price", "vram", "reliability", "gpu_count"])
async def test_pages_show_every_offer_once_though_some_are_taken_meanwhile(
    api: Api, person: Person, market: Market, sort: str
) -> None:
    whole = [each["id"] for each in (await listed(api, person, f"?limit=1000&sort={sort}"))["data"]]
    seen, cursor = [], ""
    while True:
        page = await listed(api, person, f"?limit=4&sort={sort}{cursor}")
        seen += [each["id"] for each in page["data"]]
        api.client.app[OFFERS].take("simulated", seen[-2].removeprefix("sim-"))  # type: ignore[index]
        if not (next := page.get("next_cursor")):
            break
        cursor = f"&cursor={next}"
    assert seen == whole


class Other(Simulated):
    """A market of another name."""

    async def offers(self, query: OfferQuery) -> list[Offer]:  # type: ignore[override]
        return [structs.replace(each, provider="other") for each in await super().offers(query)]


async def test_an_order_by_price_is_by_what_the_customer_pays(api: Api, market: Market) -> None:
    other = Other(ProviderSettings(options={"seed": "2"}), lambda: MARKET_NS)
    blocks = (config.Provider("simulated", markup_percent="40"), config.Provider("other"))
    fleet = Fleet(api.store, {"simulated": market, "other": other}, api.fleet.settings, blocks)
    offers = Offers(fleet)
    found, _ = await offers.find(["simulated", "other"], OfferQuery(), "price")
    prices = [offers.price(each) for each in found]
    assert len({each.provider for each in found}) == 2
    assert prices == sorted(prices)


async def test_a_cursor_of_another_order_is_refused(api: Api, person: Person, market: Market) -> None:
    cursor = (await listed(api, person, "?limit=4&sort=vram"))["next_cursor"]
    for wrong in (f"?sort=price&cursor={cursor}", "?cursor=AAAA", "?cursor=%C3%A9", "?cursor=", f"?cursor={cursor}x"):
        status, told = await api.call("GET", f"{GPU}/instances{wrong}", headers=person.by_key)
        assert (status, told["code"], "cursor" in told["error"]) == (422, "UNPROCESSABLE", True), wrong


DOWN = ProviderUnavailable("simulated", "search", "no connection; try later")


class Slow(Market):
    """A market that answers when it is let, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.error: ProviderError | None = None
        self.search_count = 0

    async def offers(self, query: OfferQuery) -> list[Offer]:  # type: ignore[override]
        self.search_count += 1
        if self.error is not None:
            raise self.error
        await self.answers.wait()
        return list(await super().offers(query))


async def test_a_provider_that_does_not_answer_holds_up_one_listing_and_no_more(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_offers, "WAIT_S", 0.05)
    slow = Slow()
    offers = Offers(Fleet(api.store, {"simulated": slow}, api.fleet.settings))
    _, told = await offers.find(["simulated"], OfferQuery(), "price")
    assert told["simulated"].error == "simulated is not available at the moment"
    assert offers.faults() == {"simulated": "simulated: no answer within 0.05 s yet"}
    monkeypatch.setattr(fleet_offers, "WAIT_S", 3_600)
    async with asyncio.timeout(10):
        _, told = await offers.find(["simulated"], OfferQuery(), "price")
        assert (told["simulated"].status, slow.search_count) == ("failed", 1)
        slow.answers.set()
        while told["simulated"].error:
            await asyncio.sleep(0)
            found, told = await offers.find(["simulated"], OfferQuery(), "price")
    assert found
    await offers.close()


async def test_offers_of_a_provider_that_takes_no_more_searches_are_shown_as_they_were(api: Api) -> None:
    market, clock = Slow(), [datetime(2026, 1, 12, tzinfo=UTC)]
    market.answers.set()
    fleet = Fleet(api.store, {"simulated": market}, api.fleet.settings)
    fleet.now = lambda: clock[0]
    offers = Offers(fleet)
    await offers.refresh_all()
    first, _ = await offers.find(["simulated"], OfferQuery(), "price")
    for error, count in ((RateLimited("simulated", "search", "no more today"), len(first)), (DOWN, 0)):
        market.error = error
        clock[0] += timedelta(hours=5)
        await offers.refresh_all()
        found, told = await offers.find(["simulated"], OfferQuery(), "price")
        assert (len(found), told["simulated"].status) == (count, "stale" if count else "failed")
    assert first
    await offers.close()


async def test_a_provider_that_fails_is_not_asked_again_by_every_listing(api: Api) -> None:
    down = Slow()
    down.error = DOWN
    offers = Offers(Fleet(api.store, {"simulated": down}, api.fleet.settings))
    for _ in range(20):
        _, told = await offers.find(["simulated"], OfferQuery(), "price")
    assert (told["simulated"].status, down.search_count) == ("failed", 1)
