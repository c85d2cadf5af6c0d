"""GPUs over the API: list, rent, wait, stop, start, destroy; each account sees its own."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpuproxy_plugins.simulated import Simulated

from gpuproxy.control.parts import OFFERS
from gpuproxy.errors import GatewayError
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.fleet.reconcile import Reconciler
from gpuproxy.ledger.book import credit
from gpuproxy.plugin import (
    CapacityGone,
    InstanceSpec,
    Offer,
    OfferQuery,
    ProviderInstance,
    ProviderSettings,
    ProviderUnavailable,
    RateLimited,
)
from gpuproxy.store.schema import events

from .conftest import Api, Person

GPU = "/api/v1/gpu"
NOW_NS = 1_790_000_000 * 10**9  # a moment at which the market has something for every filter


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


@pytest.fixture
async def person(api: Api) -> Person:
    made = await api.person()
    await credit(api.store, made.id, 100_000_000_000, "gift")
    return made


async def offers(api: Api, person: Person, query: str = "") -> Any:
    status, told = await api.call("GET", f"{GPU}/instances{query}", headers=person.by_key)
    assert status == 200, told
    return told


async def rent(api: Api, person: Person, id: str = "", headers: dict[str, str] | None = None, **body: Any) -> Any:
    id = id or (await offers(api, person))["data"][0]["id"]
    path = f"{GPU}/instances/simulated/{id}"
    return await api.call("POST", path, {"image": "x", **body}, {**person.by_key, **(headers or {})})


async def test_a_list_has_what_fits_cheapest_first_and_says_how_each_provider_is(api: Api, person: Person) -> None:
    told = await offers(api, person, "?provider=all&min_vram=16&max_price=3&sort=price&limit=5")
    assert told["count"] == len(told["data"]) <= 5
    prices = [each["price_per_hour"] for each in told["data"]]
    assert prices == sorted(prices)
    assert max(prices) <= 3
    assert min(each["vram"] for each in told["data"]) >= 16
    assert all(each["id"].startswith("sim-m") for each in told["data"])
    assert told["providers"]["simulated"]["status"] == "ok"


FILTERS: list[tuple[str, Callable[[Any], bool]]] = [
    ("min_vram=80", lambda each: each["vram"] >= 80),
    ("max_price=0.9", lambda each: each["price_per_hour"] <= 0.9),
    ("gpu_model=4090", lambda each: each["gpu_model"] == "RTX 4090"),
    ("gpu_count=2", lambda each: each["gpu_count"] == 2),
    ("region=DE", lambda each: each["region"].endswith("DE")),
    ("region=tokyo", lambda each: each["region"] == "Tokyo, JP"),
    ("min_reliability=0.95", lambda each: each["reliability"] >= 0.95),
    ("cuda=12.9", lambda each: each["cuda"] >= 12.9),
]


@pytest.mark.parametrize(("query", "fits"), FILTERS, ids=[query for query, _ in FILTERS])
async def test_every_filter_leaves_what_fits_and_all_of_it(
    api: Api, person: Person, taken: "Taken", query: str, fits: Callable[[Any], bool]
) -> None:
    everything = (await offers(api, person))["data"]
    wanted = [each["id"] for each in everything if fits(each)]
    assert 0 < len(wanted) < len(everything)
    assert [each["id"] for each in (await offers(api, person, f"?{query}"))["data"]] == wanted


async def test_spot_offers_are_a_list_of_their_own(api: Api, person: Person) -> None:
    everything = (await offers(api, person))["data"]
    spot = (await offers(api, person, "?spot=true"))["data"]
    assert {each["spot"] for each in spot} == {True}
    assert {each["spot"] for each in everything} == {False}
    assert (await offers(api, person, "?spot=false"))["data"] == everything


ORDERS: dict[str, Callable[[Any], Any]] = {
    "price": lambda each: each["price_per_hour"],
    "-price": lambda each: -each["price_per_hour"],
    "vram": lambda each: -each["vram"],
    "reliability": lambda each: -each["reliability"],
    "gpu_count": lambda each: -each["gpu_count"],
}


@pytest.mark.parametrize("sort", ORDERS)
async def test_a_list_is_sorted_as_asked(api: Api, person: Person, sort: str) -> None:
    told = [ORDERS[sort](each) for each in (await offers(api, person, f"?sort={sort}"))["data"]]
    assert told == sorted(told)


async def test_pages_follow_one_another(api: Api, person: Person) -> None:
    whole = [each["id"] for each in (await offers(api, person))["data"]]
    page = await offers(api, person, "?limit=4")
    seen = [each["id"] for each in page["data"]]
    while cursor := page.get("next_cursor"):
        page = await offers(api, person, f"?limit=4&cursor={cursor}")
        seen += [each["id"] for each in page["data"]]
    assert seen == whole


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?sort=best", 422),
        ("?min_vram=x", 422),
        ("?max_price=-1", 422),
        ("?spot=maybe", 422),
        ("?limit=0", 422),
        ("?cursor=next", 422),
        ("?provider=aws", 404),
        ("?min_reliability=2", 422),
    ],
)
async def test_a_wrong_parameter_is_named(api: Api, person: Person, query: str, status: int) -> None:
    got, told = await api.call("GET", f"{GPU}/instances{query}", headers=person.by_key)
    assert (got, told["error"].count(query[1:].partition("=")[0])) == (status, 1)


@pytest.mark.parametrize("name", ["simulated", "sim", "all"])
async def test_a_provider_has_other_names(api: Api, person: Person, name: str) -> None:
    assert (await offers(api, person, f"?provider={name}"))["count"] > 0


async def test_an_instance_is_rented_by_prefixed_or_raw_id_and_found_by_both(api: Api, person: Person) -> None:
    first, second, *_ = (await offers(api, person))["data"]
    for id in (first["id"], second["id"].removeprefix("sim-")):
        status, told = await rent(api, person, id, wait=5)
        rented = told["data"]
        assert (status, rented["status"]) == (201, "running")
        assert rented["instance_id"].startswith("sim-")
        assert (rented["gpu_model"], list(rented["ports"])) == (rented["gpu_model"], ["8000"])
        assert rented["ip"]
        name = rented["instance_id"] if id == first["id"] else rented["contract_id"]
        for _ in range(2):  # idempotent
            status, told = await api.call("DELETE", f"{GPU}/instances/simulated/{name}", headers=person.by_key)
            assert (status, told["data"]["status"]) == (200, "destroyed")
    status, told = await api.call("GET", f"{GPU}/rentals", headers=person.by_key)
    assert [each["status"] for each in told["data"]] == ["destroyed"] * 2
    status, told = await api.call("GET", f"{GPU}/rentals?living=true", headers=person.by_key)
    assert told["data"] == []


async def test_a_body_may_be_empty(api: Api, person: Person) -> None:
    id = (await offers(api, person))["data"][0]["id"]
    status, told = await api.call("POST", f"{GPU}/instances/simulated/{id}", {}, person.by_key)
    assert (status, told["data"]["image"]) == (201, "nvidia/cuda:12.0.0-base-ubuntu22.04")


async def test_no_money_is_a_402(api: Api) -> None:
    status, told = await rent(api, await api.person())
    assert (status, told["code"]) == (402, "INSUFFICIENT_CREDITS")


async def test_a_keys_budget_is_a_402_for_that_key_alone(api: Api, person: Person) -> None:
    body = {"limit": 0.01, "window_s": 86_400, "key_id": person.key_id}
    status, _ = await api.call("POST", "/api/v1/user/budgets", body, person.by_token)
    assert status == 201
    id = (await offers(api, person))["data"][0]["id"]
    status, told = await rent(api, person, id)
    assert (status, told["code"]) == (402, "BUDGET_EXCEEDED")
    status, told = await api.call("POST", f"{GPU}/instances/reserve", {"count": 1}, person.by_key)
    assert (status, told["code"]) == (402, "BUDGET_EXCEEDED")
    status, _ = await api.call("POST", f"{GPU}/instances/reserve", {"count": 1}, person.by_token)
    assert status == 201


async def test_a_repeated_key_rents_once(api: Api, person: Person) -> None:
    id = (await offers(api, person))["data"][0]["id"]
    key = {"Idempotency-Key": "once"}
    answers = [await rent(api, person, id, key) for _ in range(3)]
    assert {told["data"]["contract_id"] for _, told in answers} == {answers[0][1]["data"]["contract_id"]}
    status, told = await rent(api, person, id, key, label="other")
    assert (status, told["code"]) == (422, "UNPROCESSABLE")
    assert len(await api.fleet.providers["simulated"].list()) == 1


async def test_another_accounts_rental_is_not_found(api: Api, person: Person) -> None:
    _, told = await rent(api, person, wait=5)
    other = await api.person()
    id = told["data"]["contract_id"]
    calls = [("GET", f"rentals/{id}"), ("GET", f"rentals/{id}/logs"), ("POST", f"rentals/{id}/stop")]
    for method, path in [*calls, ("DELETE", f"instances/simulated/{id}"), ("DELETE", "instances/simulated/none")]:
        status, told = await api.call(method, f"{GPU}/{path}", headers=other.by_key)
        assert (status, told["code"]) == (404, "NOT_FOUND")


async def test_a_rental_is_given_up_though_its_provider_is_switched_off(api: Api, person: Person) -> None:
    _, told = await rent(api, person, wait=5)
    id, market = told["data"]["contract_id"], api.fleet.providers["simulated"]
    off = Fleet(api.store, {}, api.fleet.settings)
    api.fleet.providers, api.fleet._names = off.providers, off._names
    status, told = await api.call("GET", f"{GPU}/rentals/{id}", headers=person.by_key)
    assert (status, told["data"]["status"]) == (200, "running")
    for method, path in (("POST", "stop"), ("GET", "logs")):
        status, told = await api.call(method, f"{GPU}/rentals/{id}/{path}", headers=person.by_key)
        assert (status, told["code"]) == (409, "CONFLICT")
        assert "simulated is switched off" in told["error"]
    admin = await api.person(is_admin=True)
    _, told = await api.call("GET", "/api/v1/admin/fleet", headers=admin.by_token)
    assert [(each["id"], each["rental_count"]) for each in told["data"]] == [("simulated", 1)]
    assert "[[providers]]" in told["data"][0]["error"]
    for name in ("simulated", "sim"):
        status, told = await api.call("DELETE", f"{GPU}/instances/{name}/{id}", headers=person.by_key)
        assert (status, told["data"]["status"]) == (200, "destroying")
        assert "switched on again" in told["data"]["reason"]
    on = Fleet(api.store, {"simulated": market}, api.fleet.settings)
    api.fleet.providers, api.fleet._names = on.providers, on._names
    await Reconciler(api.fleet).tend()
    status, told = await api.call("GET", f"{GPU}/rentals/{id}", headers=person.by_key)
    assert (status, told["data"]["status"]) == (200, "destroyed")
    status, told = await api.call("DELETE", f"{GPU}/instances/moon/{id}", headers=person.by_key)
    assert (status, told["code"]) == (404, "NOT_FOUND")
    assert "moon" in told["error"]


async def test_a_machine_is_stopped_and_started(api: Api, person: Person) -> None:
    _, told = await rent(api, person, wait=5)
    path = f"{GPU}/rentals/{told['data']['contract_id']}"
    status, told = await api.call("POST", f"{path}/stop", headers=person.by_key)
    assert (status, told["data"]["status"], told["data"]["ip"]) == (200, "stopped", "")
    status, told = await api.call("POST", f"{path}/start", headers=person.by_key)
    assert (status, told["data"]["status"]) == (200, "running")  # it boots at once
    status, told = await api.call("GET", f"{path}/logs?tail=2", headers=person.by_key)
    assert status == 200
    assert told["data"]["logs"].count("\n") == 2


async def test_prices_and_bids_bind(api: Api, person: Person) -> None:
    offer = (await offers(api, person))["data"][0]
    status, told = await rent(api, person, offer["id"], max_price=offer["price_per_hour"] / 2)
    assert (status, told["code"]) == (409, "CAPACITY_GONE")
    status, told = await rent(api, person, offer["id"], bid=1.0)
    assert (status, "leave it out" in told["error"]) == (422, True)
    spot = (await offers(api, person, "?spot=true"))["data"][0]
    status, told = await rent(api, person, spot["id"])
    assert (status, "needs a bid" in told["error"]) == (422, True)
    status, told = await rent(api, person, spot["id"], bid=spot["price_per_hour"])
    assert (status, told["data"]["price_per_hour"]) == (201, spot["price_per_hour"])


class Taken(Simulated):
    """A market in which one offer is gone when it is wanted, or that limits calls."""

    gone = ""
    limit_s = 0.0

    async def create(self, offer_id: str, spec: InstanceSpec, tag: str) -> ProviderInstance:
        if self.limit_s:
            raise RateLimited("simulated", "create", "too many calls", retry_after_s=self.limit_s)
        if offer_id == self.gone:
            raise CapacityGone("simulated", "create", f"offer {offer_id} is taken; choose another")
        return await super().create(offer_id, spec, tag)


@pytest.fixture
async def taken(api: Api) -> Taken:
    """Put a market whose time stands still in the place of the other."""
    market = Taken(ProviderSettings(options={"boot_s": "0"}), lambda: NOW_NS)
    api.fleet.providers["simulated"] = market  # type: ignore[index]
    return market


async def test_the_next_best_offer_is_rented_only_if_the_caller_allows(api: Api, person: Person, taken: Taken) -> None:
    found = (await offers(api, person))["data"]
    first, second = next(
        (one, other)
        for one in found
        for other in found
        if (one["gpu_model"], one["gpu_count"]) == (other["gpu_model"], other["gpu_count"]) and one is not other
    )
    taken.gone = first["id"].removeprefix("sim-")
    dearest = max(first["price_per_hour"], second["price_per_hour"])
    status, told = await rent(api, person, first["id"])
    assert (status, told["code"]) == (409, "CAPACITY_GONE")
    await api.client.app[OFFERS].refresh_all()  # the offer that was taken is shown again
    status, told = await rent(api, person, first["id"], next_best=True, max_price=dearest)
    assert (status, told["gpu_model"], told["gpu_count"]) == (201, first["gpu_model"], first["gpu_count"])
    assert len(await taken.list()) == 1


async def test_a_provider_that_limits_calls_says_when_to_come_back(api: Api, person: Person, taken: Taken) -> None:
    taken.limit_s = 3_600.0
    id = (await offers(api, person))["data"][0]["id"]
    path = f"{GPU}/instances/simulated/{id}"
    async with api.client.post(path, json={"image": "x"}, headers=person.by_key) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (502, "3600")
        told = await answer.json()
        assert (told["code"], told["error"]) == ("PROVIDER_FAILED", "simulated takes no more calls at the moment")


async def test_a_reservation_gets_so_many(api: Api, person: Person) -> None:
    status, told = await api.call("POST", f"{GPU}/instances/reserve", {"count": 3, "wait": 5}, person.by_key)
    assert (status, len(told["instances"])) == (201, 3)
    assert {each["status"] for each in told["instances"]} == {"running"}
    status, told = await api.call("POST", f"{GPU}/instances/reserve", {"count": 16, "gpu_model": "H200"}, person.by_key)
    assert (status, told["code"]) == (409, "CAPACITY_GONE")
    assert len(await api.fleet.providers["simulated"].list()) == 3


async def test_secrets_of_a_spec_are_not_stored(api: Api, person: Person, store_url: str) -> None:
    status, told = await rent(api, person, env={"HF_TOKEN": "canary-1"}, command="run --key canary-2")
    assert status == 201
    assert "canary" not in repr(told)
    for path in Path(store_url.removeprefix("sqlite:///")).parent.glob("gpuproxy.db*"):
        assert b"canary" not in path.read_bytes()


async def test_events_name_the_instance_as_the_guide_does(api: Api, person: Person) -> None:
    _, told = await rent(api, person)
    async with api.store.reading() as connection:
        rows = (await connection.execute(events.select().where(events.c.name == "instance.created"))).all()
    assert [row.user_id for row in rows] == [person.id]
    rented = told["data"]
    assert {name: rows[0].data[name] for name in ("instance_id", "provider", "gpu_model")} == {
        "instance_id": rented["instance_id"], "provider": "simulated", "gpu_model": rented["gpu_model"]
    }  # fmt: skip


class Slow(Simulated):
    """A provider that answers late, or not at all."""

    name = "slow"
    aliases = ()
    id_prefix = "slow"

    def __init__(self, answers_s: float) -> None:
        super().__init__(ProviderSettings())
        self._answers_s = answers_s

    async def offers(self, query: OfferQuery) -> list[Offer]:  # type: ignore[override]
        await asyncio.sleep(self._answers_s)
        raise ProviderUnavailable("slow", "search", "no connection to https://inner:8443")


async def test_a_provider_that_fails_is_told_and_the_others_are_listed(api: Api) -> None:
    quick = Simulated(ProviderSettings())
    fleet = Fleet(api.store, {"simulated": quick, "slow": Slow(0.05)}, api.fleet.settings)
    shelves = Offers(fleet)
    found, providers = await shelves.find(["simulated", "slow"], OfferQuery(), "price")
    assert found
    assert (providers["simulated"].status, providers["slow"].status) == ("ok", "failed")
    assert providers["slow"].error == "slow is not available at the moment"
    assert shelves.faults() == {"simulated": "", "slow": "slow: no connection to https://inner:8443"}
    with pytest.raises(GatewayError, match="slow is not available at the moment"):
        await shelves.get("slow", "1")
