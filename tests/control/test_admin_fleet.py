"""Providers as admins see them."""

from pathlib import Path

import pytest

from gpuproxy.fleet.reconcile import Reconciler
from gpuproxy.plugin import InstanceSpec, OfferQuery

from .conftest import Api

FLEET = "/api/v1/admin/fleet"


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Name a SQLite database."""
    return f"sqlite:///{tmp_path}/gpuproxy.db"


async def stranger(api: Api) -> str:
    """Rent something at the provider that is not ours, and look."""
    provider = api.fleet.providers["simulated"]
    offer = (await provider.offers(OfferQuery()))[0]
    made = await provider.create(offer.id, InstanceSpec(image="x"), "theirs")
    await Reconciler(api.fleet).cycle()
    return made.id


async def test_an_admin_sees_how_providers_are_and_what_is_amiss(api: Api) -> None:
    admin = await api.person(is_admin=True)
    status, told = await api.call("GET", FLEET, headers=admin.by_token)
    assert (status, told["data"][0]["id"], told["data"][0]["listed_at"]) == (200, "simulated", None)
    id = await stranger(api)
    _, told = await api.call("GET", FLEET, headers=admin.by_token)
    provider = told["data"][0]
    assert (provider["basis"], provider["error"], provider["instance_count"]) == ("per_second", "", 1)
    assert (provider["foreign_count"], provider["stray_count"], provider["rental_count"]) == (1, 0, 0)
    assert provider["unreachable_count"] == 0
    assert provider["listed_at"] == provider["looked_at"] is not None
    _, told = await api.call("GET", f"{FLEET}/findings?kind=foreign&provider=sim", headers=admin.by_token)
    assert [(each["subject_id"], each["detail"]["tag"]) for each in told["data"]] == [(id, "theirs")]


async def test_a_finding_is_acknowledged_and_counted_no_more(api: Api) -> None:
    admin = await api.person(is_admin=True)
    await stranger(api)
    assert 'gpuproxy_fleet_findings{kind="foreign",provider="simulated"} 1.0' in await metrics(api)
    _, told = await api.call("GET", f"{FLEET}/findings", headers=admin.by_token)
    path = f"{FLEET}/findings/{told['data'][0]['id']}/acknowledge"
    status, told = await api.call("POST", path, headers=admin.by_token)
    assert (status, told["acknowledged_at"] is not None) == (200, True)
    _, told = await api.call("GET", f"{FLEET}/findings", headers=admin.by_token)
    assert told["data"] == []
    _, told = await api.call("GET", f"{FLEET}/findings?all=true", headers=admin.by_token)
    assert told["count"] == 1
    text = await metrics(api)
    assert "gpuproxy_fleet_findings{" not in text
    assert 'gpuproxy_provider_listed_seconds{provider="simulated"}' in text
    assert 'gpuproxy_unreachable_instances{provider="simulated"} 0.0' in text


@pytest.mark.parametrize(("query", "status"), [("kind=lost", 422), ("provider=aws", 404), ("all=maybe", 422)])
async def test_a_wrong_parameter_is_named(api: Api, query: str, status: int) -> None:
    admin = await api.person(is_admin=True)
    got, told = await api.call("GET", f"{FLEET}/findings?{query}", headers=admin.by_token)
    assert (got, query.partition("=")[0] in told["error"]) == (status, True)


async def metrics(api: Api) -> str:
    async with api.client.get("/metrics") as answer:
        return await answer.text()
