"""What a marketplace offers, as anybody hears it at a whole gateway: GPUs that go, come, cost another price."""

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import gpuproxy_plugins.vast  # noqa: F401  # the provider of this market
import requests
from simulators.vast import KEY, VastSimulator

from .gateway import Gateway, running_gateway, toml_table
from .servers import serve_aiohttp

WAIT_S = 30.0
MODEL = "RTX 4090"


def settings(port: int) -> str:
    provider = {"name": "vast.ai", "api_key_env": "VAST_KEY", "base_url": f"http://127.0.0.1:{port}", "spacing_s": 0}
    return (
        toml_table("[plugins]", {"enabled": ["vast"]})
        + toml_table("[fleet]", {"offers_s": 1.0})
        + toml_table("[[providers]]", provider)
    )


def is_stocked(gateway: Gateway) -> bool:
    answer = requests.get(f"{gateway.url}/api/v1/gpu/instances", headers={"X-API-Key": gateway.key}, timeout=WAIT_S)
    return bool(answer.json().get("count"))


async def heard(socket: aiohttp.ClientWebSocketResponse, name: str) -> Any:
    """Return what the next event of that name says of the model."""
    while True:
        told = await socket.receive_json(timeout=WAIT_S)
        if told["type"] == name and told["payload"]["gpu_model"] == MODEL:
            return told["payload"]


async def climb(asks: list[dict[str, Any]]) -> None:
    """Let prices rise."""
    while True:
        for ask in asks:
            ask["dph_base"] *= 1.05
        await asyncio.sleep(0.3)


async def test_anybody_hears_what_changes_at_a_marketplace(tmp_path: Path) -> None:
    simulator = VastSimulator(time.time)
    market = simulator.market
    ours = {number: ask for number, ask in market.asks.items() if ask["gpu_name"] == MODEL}
    assert ours
    with (
        serve_aiohttp(simulator.server.app) as server,
        running_gateway(tmp_path, settings(server.port), {"VAST_KEY": KEY}) as gateway,
    ):
        while not is_stocked(gateway):
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{gateway.url}/ws") as socket:
            await socket.send_json({"type": "subscribe", "channels": ["gpu_updates"]})
            assert (await socket.receive_json(timeout=WAIT_S))["type"] == "subscribed"
            climbing = asyncio.create_task(climb(list(ours.values())))  # the gateway's first look tells nothing
            dearer = await heard(socket, "gpu_price_changed")
            climbing.cancel()
            assert (dearer["provider"], dearer["price_per_hour"] > dearer["price_per_hour_before"]) == ("vast.ai", True)
            for number in ours:
                del market.asks[number]
            gone = await heard(socket, "gpu_unavailable")
            market.asks |= ours
            back = await heard(socket, "gpu_available")
            assert gone["price_per_hour"] >= dearer["price_per_hour"]
            assert back["gpu_count"] >= 1
