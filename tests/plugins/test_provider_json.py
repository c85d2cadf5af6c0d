"""Whatever JSON a provider sends, its adapter understands it or raises a ProviderError that names the provider."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from gpuproxy_plugins.ionet import IoNet
from gpuproxy_plugins.provider_http import Answer
from gpuproxy_plugins.vast import Vast
from hypothesis import given, settings
from hypothesis import strategies as some
from simulators.ionet import IoNetSimulator
from simulators.vast import VastSimulator

from gpuproxy.plugin import (
    InstanceSpec,
    OfferQuery,
    Phase,
    ProviderAdapter,
    ProviderError,
    ProviderSettings,
)

ID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"
QUICK = settings(max_examples=120)


def adapters(status: int, body: bytes) -> list[ProviderAdapter]:
    """Return each adapter before a provider that says only this."""

    async def send(phase: Phase, *_rest: object) -> Answer:
        return Answer(phase, status, {}, body)

    made: list[ProviderAdapter] = []
    for kind in (Vast, IoNet):
        adapter = kind(ProviderSettings(spacing_s=0.0, timeout_s=0.001))
        adapter._http._send = send
        made.append(adapter)
    return made


def calls(adapter: ProviderAdapter) -> list[Callable[[], Coroutine[Any, Any, object]]]:
    """Return every call that reads an answer."""
    id = ID if adapter.name == "io.net" else "7"
    spec = InstanceSpec(image="a/b", max_price_nanousd_per_hour=10**9)
    return [
        lambda: adapter.offers(OfferQuery()),
        lambda: adapter.offers(OfferQuery(gpu_model="H100")),
        lambda: adapter.offers(OfferQuery(is_spot=True)),
        lambda: adapter.create("12__1" if adapter.name == "io.net" else "7", spec, "gp-1"),
        lambda: adapter.get(id),
        lambda: adapter.list(),
        lambda: adapter.find("gp-1"),
        lambda: adapter.start(id),
        lambda: adapter.stop(id),
        lambda: adapter.destroy(id),
        lambda: adapter.charges(0, 10**18),
        lambda: adapter.check(),
    ]


def try_all(status: int, body: bytes) -> None:
    """Make every call; what raises must be a ProviderError that names the provider."""

    async def run() -> None:
        for adapter in adapters(status, body):
            for call in calls(adapter):
                try:
                    await call()
                except ProviderError as error:
                    assert str(error).startswith(f"{adapter.name}: ")  # noqa: PT017 - most calls raise nothing

    asyncio.run(run())


scalars = (
    some.none()
    | some.booleans()
    | some.integers(-(10**30), 10**30)
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.sampled_from(
        ["", "NaN", "Infinity", "1e999999999", "running", "stopped", "destroyed", "8000/tcp", ID, "x" * 300]
    )
    | some.text(max_size=10)
)
values = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=6), inner, max_size=3)
)


def rows() -> dict[str, dict[str, Any]]:
    """Return one good row of each kind, by the key it stands under."""
    now_s = 1_790_000_000.0
    vast, ionet = VastSimulator(lambda: now_s), IoNetSimulator(lambda: now_s)
    life = vast.market.create(next(iter(vast.market.asks.values())), {"image": "a/b", "env": {"-p 8000:8000": "1"}})
    life.since_s = now_s - 1_000
    deployed = ionet._made(ionet.rows[0], {"resource_private_name": "x", "duration_hours": 1}, "caas", 1.0)
    return {
        "offers": vast.market.open_asks()[0],
        "instances": vast.market.row(life),
        "results": vast.market.charges(0, now_s)[0],
        "hardware": ionet.rows[0],
        "deployments": ionet._listed(deployed),
        "data": ionet._detail(deployed),
    }


ROWS = rows()


def envelope(key: str, row: Any, extra: Any) -> Any:
    """Return an answer that holds the row where such rows stand."""
    if key == "data":
        return {"data": row}
    if key in ("hardware", "deployments"):
        return {"data": {key: [row], "total": extra}}
    return {"success": True, key: [row], "next_token": None, "total_instances": extra}


@QUICK
@given(
    status=some.sampled_from([200, 201, 302, 400, 401, 403, 404, 409, 410, 422, 429, 500, 503]),
    body=some.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()),
)
def test_any_answer_is_understood_or_a_provider_error(status: int, body: bytes) -> None:
    try_all(status, body)


@QUICK
@given(
    status=some.sampled_from([200, 400, 404, 429]),
    told=some.fixed_dictionaries(
        {},
        optional={
            "success": scalars,
            "error": some.sampled_from(["auth_error", "no_such_ask", "no_such_instance", "invalid_args"]) | values,
            "msg": values,
            "detail": values,
            "new_contract": values,
            "data": values,
        },
    ),
)
def test_any_failure_is_a_provider_error(status: int, told: dict[str, Any]) -> None:
    try_all(status, json.dumps(told).encode())


@QUICK
@given(data=some.data(), key=some.sampled_from(sorted(ROWS)))
def test_a_row_with_any_field_changed_is_understood_or_a_provider_error(data: some.DataObject, key: str) -> None:
    row = dict(ROWS[key])
    for name in data.draw(some.lists(some.sampled_from(sorted(row)), min_size=1, max_size=3)):
        row[name] = data.draw(values)
    if data.draw(some.booleans()):
        del row[data.draw(some.sampled_from(sorted(row)))]
    try_all(200, json.dumps(envelope(key, row, data.draw(some.integers(0, 3)))).encode())
    try_all(200, json.dumps({"instances": row, "success": True}).encode())


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"offers": [' + b"{}," * 50_000 + b"{}]}"])
def test_a_deep_or_long_answer_is_a_provider_error(body: bytes) -> None:
    try_all(200, body)


async def test_fields_not_known_and_null_do_not_matter() -> None:
    row = ROWS["instances"] | {"brand_new": {"deep": [1]}, "label": None, "dph_total": None, "ports": None}
    vast, _ = adapters(200, json.dumps(envelope("instances", row, 1)).encode())
    (seen,) = await vast.list()
    assert (seen.tag, seen.price_nanousd_per_hour, seen.ports) == ("", 0, {})


async def test_an_offer_that_makes_no_sense_is_passed_over_but_not_all_of_them() -> None:
    good, bad = ROWS["offers"], ROWS["offers"] | {"num_gpus": "many"}
    vast, _ = adapters(200, json.dumps({"offers": [bad, good]}).encode())
    assert [offer.id for offer in await vast.offers(OfferQuery())] == [str(good["id"])]
    vast, _ = adapters(200, json.dumps({"offers": [bad, bad]}).encode())
    with pytest.raises(ProviderError, match=r"vast\.ai: no row makes sense"):
        await vast.offers(OfferQuery())


async def test_an_instance_that_makes_no_sense_is_not_passed_over() -> None:
    bad = ROWS["instances"] | {"ports": {"8000/tcp": [{"HostPort": "many"}]}}
    vast, _ = adapters(200, json.dumps(envelope("instances", bad, 1)).encode())
    with pytest.raises(ProviderError, match=r"instance \d+ makes no sense \('many' is no port\)"):
        await vast.list()
