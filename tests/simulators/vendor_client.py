"""Try the simulated vast.ai with the vendor's own published client: ``poe vast-client``.

The client is installed into a virtual environment of its own under ``build``. It exits 0 even on HTTP errors, so what
it prints is looked at. Its command line and its SDK are both tried. Any difference ends this with an error.
"""

import asyncio
import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

from simulators.vast import KEY, VastSimulator

CLIENT = "vastai==1.9.1"
PLACE = Path(__file__).parents[2] / "build" / "vast-client"
WAIT_S = 120.0
SDK = """
import sys
from vastai import VastAI
client = VastAI(api_key=sys.argv[1], server_url=sys.argv[2])
offers = client.search_offers(query="gpu_name=RTX_4090 num_gpus=1", limit=3)
assert offers and all(offer["gpu_name"] == "RTX 4090" and offer["num_gpus"] == 1 for offer in offers), offers
made = client.create_instance(id=offers[0]["id"], image="a/b", disk=16, label="sdk", env={"-p 8000:8000": "1"})
assert made["success"], made
id = made["new_contract"]
assert client.show_instance(id)["label"] == "sdk"
assert id in [row["id"] for row in client.show_instances()]
assert client.stop_instance(id)
client.destroy_instance(id)
assert client.show_instance(id) is None
print("sdk done")
"""


def installed() -> Path:
    """Return the directory of the client's programs; installs it when it is missing."""
    programs = PLACE / "bin"
    if not (programs / "vastai").exists():
        print(f"installing {CLIENT} into {PLACE}", flush=True)
        venv.create(PLACE, with_pip=True)
        subprocess.run([programs / "python", "-m", "pip", "install", "-q", CLIENT], check=True)
    return programs


class Client:
    """The vendor's client, pointed at the simulator."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.programs = installed()
        self.count = 0

    async def run(self, *words: str) -> str:
        """Run the program; return what it says on both streams."""
        return await self._run(str(self.programs / "vastai"), "--url", self.url, "--api-key", KEY, *words)

    async def raw(self, *words: str) -> Any:
        """Run the program and read the JSON it prints."""
        said = await self.run(*words, "--raw")
        try:
            return json.loads(said)
        except ValueError:
            raise SystemExit(f"vastai {' '.join(words)} said: {said}") from None

    async def sdk(self) -> str:
        """Run the script with the SDK."""
        return await self._run(str(self.programs / "python"), "-c", SDK, KEY, self.url)

    async def _run(self, *command: str) -> str:
        environment = {
            **os.environ,
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "XDG_CONFIG_HOME": str(PLACE / "config"),
            "HOME": str(PLACE),
        }
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment
        )
        said, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
        self.count += 1
        return said.decode()


def expect(what: str, is_so: bool, said: object) -> None:
    """Print what was tried; end with an error if it is not so."""
    print(f"{'ok  ' if is_so else 'FAIL'} {what}", flush=True)
    if not is_so:
        raise SystemExit(f"{what}: {said}")


async def rent(client: Client, simulator: VastSimulator, clock: list[float]) -> int:
    """Search, create and look until it runs; return its id."""
    said = await client.run("search", "offers", "num_gpus=1 gpu_name=RTX_4090", "--limit", "3")
    expect("search offers prints a table", "RTX_4090" in said and "Content-Type" not in said, said)
    offers = await client.raw("search", "offers", "num_gpus=1 dph<3 gpu_ram>=20 reliability>0.5", "-o", "dph")
    fitting = [row for row in offers if row["num_gpus"] == 1 and row["gpu_ram"] >= 20_000 and row["dph_total"] < 3]
    expect("search offers understands numbers as text", 0 < len(offers) == len(fitting), offers)
    prices = [row["dph_total"] for row in offers]
    expect("search offers sorts", prices == sorted(prices), prices)
    image = ("--image", "vllm/vllm-openai", "--disk", "20", "--env", "-p 8000:8000 -e MODEL=m", "--label", "gp-1")
    made = await client.raw("create", "instance", str(offers[0]["id"]), *image, "--ssh", "--direct")
    expect("create instance", made.get("success") is True, made)
    again = await client.run("create", "instance", str(offers[0]["id"]), *image)
    expect("an offer can be rented once", "no_such_ask" in again or "404" in again, again)
    id = int(made["new_contract"])
    row = await client.raw("show", "instance", str(id))
    expect("show instance, not yet running", row["actual_status"] is None and row["label"] == "gp-1", row)
    clock[0] += 60
    row = await client.raw("show", "instance", str(id))
    expect("show instance, running with ports", "8000/tcp" in row["ports"] and "22/tcp" in row["ports"], row)
    return id


async def live(client: Client, simulator: VastSimulator, clock: list[float], id: int) -> None:
    """List, label, stop, start, reboot, read the log, ask what it cost."""
    said = await client.run("show", "instances")
    expect("show instances prints a table", str(id) in said and "gp-1: 1" in said, said)
    rows = await client.raw("show", "instances")
    expect("show instances --raw", [row["id"] for row in rows] == [id], rows)
    await client.run("label", "instance", str(id), "renamed")
    expect("label instance", simulator.market.lives[id].body["label"] == "renamed", simulator.market.lives[id])
    said = await client.run("ssh-url", str(id))
    expect("ssh-url", said.startswith("ssh://root@"), said)
    said = await client.run("logs", str(id), "--tail", "3")
    expect("logs", "line 10" in said, said)
    said = await client.run("reboot", "instance", str(id))
    expect("reboot instance", "Reboot" in said or "reboot" in said, said)
    for word, status in (("stop", "exited"), ("start", "running")):
        await client.run(word, "instance", str(id))
        clock[0] += 60
        row = await client.raw("show", "instance", str(id))
        expect(f"{word} instance", row["actual_status"] == status, row)
    clock[0] += 3_600
    user = await client.raw("show", "user")
    expect("show user tells of less credit", 0 < user["credit"] < 1_000, user)
    span = ("-s", str(int(clock[0]) - 86_400), "-e", str(int(clock[0])))
    charges = await client.raw("show", "invoices-v1", "--charges", *span)
    results = charges if isinstance(charges, list) else charges["results"]
    expect("charges", results[0]["source"] == f"instance-{id}", charges)


async def end(client: Client, simulator: VastSimulator, id: int) -> None:
    """Bid, launch, page through many, destroy."""
    offers = await client.raw("search", "offers", "num_gpus=1", "--type", "bid", "-o", "min_bid")
    bid = str(round(offers[0]["min_bid"] + 0.01, 3))
    made = await client.raw("create", "instance", str(offers[0]["id"]), "--image", "a/b", "--bid_price", bid)
    expect("create instance with a bid", simulator.market.lives[made["new_contract"]].price == float(bid), made)
    await client.run("change", "bid", str(made["new_contract"]), "--price", "0.9")
    expect("change bid", simulator.market.lives[made["new_contract"]].price == 0.9, made)
    left = [row for row in simulator.market.open_asks() if row["num_gpus"] == 1 and row["verification"] == "verified"]
    model = left[0]["gpu_name"].replace(" ", "_")
    launched = await client.raw("launch", "instance", "-g", model, "-n", "1", "-i", "a/b")
    expect("launch instance", launched.get("success") is True, launched)
    for ask in simulator.market.open_asks()[:40]:
        simulator.market.create(ask, {"image": "a/b"})
    rows = await client.raw("show", "instances")
    expect("more instances than a page", len(rows) == len(simulator.market.lives) > 25, len(rows))
    said = await client.run("destroy", "instance", str(id), "-y")
    expect("destroy instance", id not in simulator.market.lives, said)
    row = await client.run("show", "instance", str(id))
    expect("show instance, gone", "not found" in row.lower(), row)


async def main() -> None:
    """Try everything."""
    clock = [1_790_000_000.0]
    simulator = VastSimulator(lambda: clock[0])
    client = Client(await simulator.start())
    try:
        id = await rent(client, simulator, clock)
        await live(client, simulator, clock, id)
        await end(client, simulator, id)
        said = await client.sdk()
        expect("the SDK searches, creates, shows, stops, destroys", "sdk done" in said, said)
    finally:
        await simulator.close()
    print(f"ok: {CLIENT} works against the simulator, {client.count} runs")


if __name__ == "__main__":
    asyncio.run(main())
