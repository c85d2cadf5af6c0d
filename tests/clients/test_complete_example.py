"""The guide's complete example, as printed, against a vast.ai that rents machines with a real server behind them."""

import time
from collections.abc import Iterator
from typing import Any

import gpuproxy_plugins.vast  # noqa: F401  # the provider the example rents at
import pytest
import requests
from aiohttp import web
from simulators import vast_market
from simulators.vast import KEY, VastSimulator

from .gateway import Gateway, running_gateway, toml_table
from .guide import sample
from .servers import serve_aiohttp
from .test_integration_guide import run

SPEED = 60  # a minute of the marketplace is a second here


async def infer(request: web.Request) -> web.Response:
    body = await request.json()
    return web.json_response({"completion": f"you said {body['prompt']}"})


@pytest.fixture
def marketplace(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VastSimulator, str]]:
    """Serve vast.ai; what its machines have on port 8000 answers in truth."""
    rented = web.Application()
    rented.router.add_post("/inference", infer)
    began_s = time.time()
    simulator = VastSimulator(lambda: began_s + (time.time() - began_s) * SPEED)
    for ask in simulator.market.asks.values():
        ask["public_ipaddr"] = "127.0.0.1"
    with serve_aiohttp(rented) as machine, serve_aiohttp(simulator.server.app) as market:
        ports = {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(machine.port)}]}
        monkeypatch.setattr(vast_market, "docker_ports", lambda life: ports)
        yield simulator, f"http://127.0.0.1:{market.port}"


@pytest.fixture
def gateway(marketplace: tuple[VastSimulator, str], tmp_path: Any) -> Iterator[Gateway]:
    provider = {"name": "vast.ai", "api_key_env": "VAST_KEY", "base_url": marketplace[1], "spacing_s": 0}
    settings = (
        toml_table("[plugins]", {"enabled": ["https", "mcp", "openinference", "vast"]})
        + toml_table("[egress]", {"allow": ["127.0.0.0/8"]})
        + toml_table("[[providers]]", provider)
    )
    with running_gateway(tmp_path, settings, {"VAST_KEY": KEY}) as gateway:
        gateway.command("credits", "add", "caller@example.com", "100")
        yield gateway


def test_the_complete_example_runs(gateway: Gateway, marketplace: tuple[VastSimulator, str]) -> None:
    source = sample("Complete Integration Example")
    for printed, here in (("http://localhost:8080", gateway.url), ("your-api-key", gateway.key)):
        assert printed in source
        source = source.replace(printed, here)
    names = run(source)
    try:
        _check(names, marketplace[0].market)
    finally:
        names["proxy"].close()  # the example leaves that to its end
    assert _first_call(gateway)["path"] == "/api/v1/gpu/proxy"


def _first_call(gateway: Gateway) -> Any:
    """Return the call that the account shows, as soon as it does."""
    deadline_s = time.monotonic() + 20
    while True:
        usage = requests.get(f"{gateway.url}/api/v1/user/usage/calls", headers={"X-API-Key": gateway.key}, timeout=10)
        if calls := usage.json()["data"]:
            return calls[0]
        assert time.monotonic() < deadline_s, "no call is shown"
        time.sleep(0.05)


def _check(names: dict[str, Any], market: vast_market.Market) -> None:
    assert names["result"]["data"] == {"completion": "you said Hello, AI!"}
    assert names["instance"]["ip"] == "127.0.0.1"
    told = names["proxy"].get(f"/gpu/rentals/{names['instance']['contract_id']}")
    assert told["data"]["status"] in ("destroying", "destroyed")
    deadline_s = time.monotonic() + 30
    while market.lives:
        assert time.monotonic() < deadline_s, "the machine is not destroyed"
        time.sleep(0.05)
    assert len(market.ended) == 1
