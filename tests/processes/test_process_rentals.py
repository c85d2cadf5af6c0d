"""Control is killed during every step of a rental's life; nothing is rented twice, forgotten, or wrongly charged."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from callers import Answer, Caller, ClosedError, CutError
from conftest import MakeCaller, MakePlace
from gateways import Gateway, Place, kill, running, until

from gpuproxy.fleet.care import IN_FLIGHT_S

GPU = "/api/v1/gpu"
QUICK = {"reconcile_s": 1.0, "poll_s": 1.0, "offers_s": 10.0, "pending_s": 60.0}
DELAYS_S = (0.004, 0.012)


@pytest.fixture
def gateway(place: MakePlace) -> Iterator[Gateway]:
    plugins = {"enabled": ["https", "openinference", "simulated"]}
    made = place(fleet=QUICK, server={"workers": 1}, plugins=plugins)
    options = f'{{ boot_s = "0.2", file = "{made.directory}/market.json" }}'
    made.configure(tail=f'[[providers]]\nname = "simulated"\noptions = {options}\n')
    made.command("credits", "add", "caller@example.com", "1000")
    with running(made) as gateway:
        yield gateway


async def ask(caller: Caller, what: str, body: object = None) -> Answer:
    """Call until control, which may be away, has answered."""
    async with asyncio.timeout(20):
        while True:
            try:
                answer = await caller.call(what.encode(), json.dumps(body).encode() if body is not None else b"")
            except (ClosedError, CutError):
                continue
            if answer.status not in (502, 503, 504):
                return answer
            await asyncio.sleep(0.05)


async def killed_at(gateway: Gateway, caller: Caller, what: str, delay_s: float, body: object = None) -> None:
    """Begin a call, kill control after a while, and wait until another answers."""
    before = gateway.control()
    call = asyncio.create_task(caller.call(what.encode(), json.dumps(body).encode() if body is not None else b""))
    await caller.is_sent.wait()
    await asyncio.sleep(delay_s)
    kill(before)
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: gateway.control() not in (0, before), 10, "another control runs")


def living(place: Place) -> dict[str, str]:
    """Return the states of the rentals that have not ended, by the provider's id of their machine."""
    rows = place.query("SELECT native_id, state FROM rentals WHERE state NOT IN ('destroyed', 'failed')")
    assert len(rows) == len(dict(rows)), rows
    return dict(rows)


def machines(place: Place) -> set[str]:
    """Return the machines that are really there."""
    file = Path(place.directory / "market.json")
    rentals: list[dict[str, Any]] = json.loads(file.read_bytes()) if file.exists() else []
    return {each["id"] for each in rentals if each["steps"][-1][1] != "gone"}


def age_pending(place: Place) -> None:
    """Let the time pass in which a rental without a machine is its call's own affair."""
    with closing(sqlite3.connect(place.database, timeout=10)) as connection, connection:
        for id, created_at in connection.execute("SELECT id, created_at FROM rentals WHERE state = 'pending'"):
            earlier = (datetime.fromisoformat(created_at) - timedelta(seconds=IN_FLIGHT_S)).isoformat(" ")
            connection.execute("UPDATE rentals SET created_at = ? WHERE id = ?", (earlier, id))


async def state_is(place: Place, *states: str) -> None:
    """Wait until every rental that lives is in one of the states."""
    await until(lambda: set(living(place).values()) <= set(states), 20, f"all are {states}: {living(place)}")


async def test_control_killed_in_any_step_loses_and_doubles_nothing(gateway: Gateway, new_caller: MakeCaller) -> None:
    place, caller = gateway.place, new_caller(gateway)
    ids = iter([each["id"] for each in json.loads((await ask(caller, f"GET {GPU}/instances")).body)["data"]])
    for delay_s in DELAYS_S:
        offer = next(ids)
        await killed_at(gateway, caller, f"POST {GPU}/instances/simulated/{offer}", delay_s, {"image": "x"})
        await ask(caller, f"GET {GPU}/rentals")
        if not living(place):
            await ask(caller, f"POST {GPU}/instances/simulated/{offer}", {"image": "x"})
        age_pending(place)
        await until(lambda: machines(place) == set(living(place)), 20, "what was made is known")
        for step, then in (("stop", "stopped"), ("start", "running")):
            await state_is(place, "running", "stopped")
            for contract in contracts(place):
                await killed_at(gateway, caller, f"POST {GPU}/rentals/{contract}/{step}", delay_s)
                await ask(caller, f"POST {GPU}/rentals/{contract}/{step}")
            await state_is(place, then)
        for contract in contracts(place):
            await killed_at(gateway, caller, f"DELETE {GPU}/instances/simulated/{contract}", delay_s)
            await ask(caller, f"DELETE {GPU}/instances/simulated/{contract}")
        await until(lambda: not living(place) and not machines(place), 20, "nothing is left")
    assert place.command("ledger", "verify") == "no fault"


def contracts(place: Place) -> list[str]:
    """Return the rentals that have not ended."""
    return [row[0] for row in place.query("SELECT id FROM rentals WHERE state NOT IN ('destroyed', 'failed')")]
