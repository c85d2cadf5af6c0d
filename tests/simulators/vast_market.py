"""The state behind the simulated vast.ai: machines with asks, instances that live, credit that goes down.

All of it follows a clock that the test holds. An instance is null for a moment, loads, runs; its ports exist only
while it runs. A stop takes seconds, a start waits for the machine. GPUs cost while running, storage from creation to
the end, by the second.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NULL_S = 2.0  # before a status shows
LOAD_S = 20.0  # to pull the image
STOP_S = 3.0
HOUR_S = 3_600.0
MONTH_HOURS = 720
MODELS = (
    ("RTX 3060", 12288, 0.06),
    ("RTX 3090", 24576, 0.16),
    ("RTX 4090", 24564, 0.35),
    ("RTX 4090 D", 24564, 0.33),
    ("RTX 5090", 32607, 0.55),
    ("L40S", 46068, 0.75),
    ("A100 SXM4", 81920, 1.0),
    ("H100 SXM", 81559, 2.0),
    ("H200", 143771, 3.0),
)
PLACES = ("California, US", "Texas, US", "Quebec, CA", "Bavaria, DE", "Norway, NO", "Tokyo, JP", ", SE")


@dataclass
class Life:
    """One instance."""

    id: int
    ask: dict[str, Any]
    body: dict[str, Any]
    created_s: float
    price: float | None  # the bid, None on demand
    intended: str = "running"
    since_s: float = 0.0  # of the last order to run or to stop
    ran: list[tuple[float, float]] = field(default_factory=list)  # whole stretches of running that have ended
    is_broken: bool = False

    @property
    def dph_base(self) -> float:
        return self.ask["dph_base"] if self.price is None else self.price

    def running_from(self) -> float:
        """Return when the present order to run takes effect."""
        return self.since_s + NULL_S + LOAD_S

    def status(self, now_s: float) -> str | None:
        """Return actual_status."""
        age = now_s - self.since_s
        if self.intended == "stopped":
            return "exited" if age >= STOP_S else "running"
        if age < NULL_S and not self.ran:
            return None
        if self.is_broken:
            return "created"
        return "loading" if now_s < self.running_from() else "running"

    def order(self, intended: str, now_s: float) -> None:
        """Start or stop."""
        if intended == self.intended:
            return
        if self.intended == "running" and now_s > self.running_from():
            self.ran.append((self.running_from(), now_s))
        self.intended, self.since_s = intended, now_s

    def gpu_s(self, since_s: float, until_s: float, now_s: float) -> float:
        """Return how many seconds of a span it ran."""
        spans = list(self.ran)
        if self.intended == "running" and not self.is_broken:
            spans.append((self.running_from(), now_s))
        return sum(max(0.0, min(end, until_s) - max(start, since_s)) for start, end in spans)


class Market:
    """Everything the API speaks about."""

    def __init__(self, now_s: Callable[[], float], seed: int = 1, machines: int = 60) -> None:
        self.now_s = now_s
        self.credit = 1_000.0
        self.lives: dict[int, Life] = {}
        self.ended: list[tuple[Life, float]] = []
        self._ids = itertools.count(12_345_678)
        dice = random.Random(seed)
        self.asks = {row["id"]: row for row in (make_ask(number, dice) for number in range(machines))}

    def open_asks(self) -> list[dict[str, Any]]:
        """Return the asks nobody has taken."""
        taken = {life.ask["machine_id"] for life in self.lives.values()}
        return [row for row in self.asks.values() if row["machine_id"] not in taken]

    def create(self, ask: dict[str, Any], body: dict[str, Any]) -> Life:
        """Make an instance; a bid below the market's makes a stopped one."""
        now_s, price = self.now_s(), body.get("price")
        life = Life(next(self._ids), ask, body, now_s, price, since_s=now_s)
        if body.get("target_state") == "stopped" or (price is not None and price < ask["min_bid"]):
            life.intended, life.since_s = "stopped", now_s - STOP_S
        self.lives[life.id] = life
        return life

    def destroy(self, id: int) -> None:
        """End an instance and its cost."""
        life = self.lives.pop(id)
        life.order("stopped", self.now_s())
        self.ended.append((life, self.now_s()))

    def outbid(self, machine_id: int, min_bid: float) -> None:
        """Raise the market's bid for a machine; whoever bids less stops."""
        for row in self.asks.values():
            if row["machine_id"] == machine_id:
                row["min_bid"] = min_bid
        for life in self.lives.values():
            if life.ask["machine_id"] == machine_id and life.price is not None and life.price < min_bid:
                life.order("stopped", self.now_s())

    def settle(self) -> None:
        """Stop everything once the credit is used up."""
        if self.left() <= 0:
            for life in self.lives.values():
                life.order("stopped", self.now_s())

    def left(self) -> float:
        """Return the credit that is left."""
        return self.credit - sum(charge["amount"] for charge in self.charges(0.0, self.now_s()))

    def charges(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Return what each instance cost in a span of time."""
        now_s = self.now_s()
        everything = [(life, now_s) for life in self.lives.values()] + self.ended
        rows = [self._charge(life, end_s, since_s, min(until_s, now_s)) for life, end_s in everything]
        return [row for row in rows if row["amount"] > 0]

    def _charge(self, life: Life, end_s: float, since_s: float, until_s: float) -> dict[str, Any]:
        gpu_h = life.gpu_s(since_s, until_s, self.now_s()) / HOUR_S
        disk_h = max(0.0, min(end_s, until_s) - max(life.created_s, since_s)) / HOUR_S
        disk_price = life.body.get("disk", 10) * life.ask["storage_cost"] / MONTH_HOURS
        items = [
            {"type": kind, "description": f"{hours:.3f} hours at ${price}/hour", "amount": hours * price}
            for kind, hours, price in (("gpu", gpu_h, life.dph_base), ("disk", disk_h, disk_price))
        ]
        return {
            "type": "instance",
            "source": f"instance-{life.id}",
            "amount": sum(item["amount"] for item in items),
            "start": max(since_s, life.created_s),
            "end": min(until_s, end_s),
            "items": items,
        }

    def row(self, life: Life) -> dict[str, Any]:
        """Return an instance as the API shows it."""
        now_s, ask, body = self.now_s(), life.ask, life.body
        status, is_up = life.status(now_s), life.status(now_s) == "running"
        disk = float(body.get("disk") or 10)
        state = "running" if is_up or life.intended == "running" else "stopped"
        return {
            "id": life.id,
            "machine_id": ask["machine_id"],
            "host_id": ask["host_id"],
            "actual_status": status,
            "cur_state": state,
            "next_state": life.intended,
            "intended_status": life.intended,
            "status_msg": status_message(life, status),
            "label": body.get("label"),
            "num_gpus": ask["num_gpus"],
            "gpu_name": ask["gpu_name"],
            "gpu_ram": ask["gpu_ram"],
            "gpu_util": 0.0 if is_up else None,
            "dph_base": life.dph_base,
            "dph_total": life.dph_base + disk * ask["storage_cost"] / MONTH_HOURS,
            "is_bid": life.price is not None,
            "min_bid": ask["min_bid"],
            "storage_cost": ask["storage_cost"],
            "inet_up_cost": ask["inet_up_cost"],
            "inet_down_cost": ask["inet_down_cost"],
            "public_ipaddr": f" {ask['public_ipaddr']}\n",
            "ssh_host": f"ssh{life.id % 9}.vast.ai",
            "ssh_port": 10_000 + life.id % 10_000,
            "direct_port_start": -1,
            "direct_port_end": -1,
            "start_date": life.created_s,
            "end_date": ask["end_date"],
            "uptime_mins": None,
            "duration": ask["duration"],
            "disk_space": disk,
            "image_uuid": body.get("image"),
            "image_runtype": body.get("runtype"),
            "extra_env": [[name, text] for name, text in (body.get("env") or {}).items()],
            "onstart": body.get("onstart"),
            "geolocation": ask["geolocation"],
            "reliability2": ask["reliability2"],
            "verification": ask["verification"],
            "cuda_max_good": ask["cuda_max_good"],
            "template_id": None,
            **({"ports": docker_ports(life)} if is_up else {}),
        }


def status_message(life: Life, status: str | None) -> str | None:
    """Return what the machine says about it."""
    if life.is_broken and status == "created":
        return "Error response from daemon: OCI runtime create failed: no such file"
    words = {"loading": "2f8b4c: Pull complete", "running": "success, running a/b", "exited": "success, exited"}
    return words.get(status or "")


def docker_ports(life: Life) -> dict[str, Any]:
    """Return Docker's port map."""
    inside = [int(name[3:].partition(":")[2]) for name in life.body.get("env") or {} if name.startswith("-p ")]
    inside += [22] if "ssh" in (life.body.get("runtype") or "") else []
    first = 40_000 + life.id * 64 % 20_000
    return {f"{port}/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(first + at)}] for at, port in enumerate(inside)}


def make_ask(number: int, dice: random.Random) -> dict[str, Any]:
    """Return one offer in full."""
    model, ram, usual = MODELS[number % len(MODELS)]
    count = dice.choice((1, 1, 1, 2, 4, 8))
    base = round(usual * count * dice.uniform(0.8, 1.3), 6)
    reliability = round(dice.uniform(0.9, 0.9999), 6)
    return {
        "id": 30_000_001 + number,
        "ask_contract_id": 30_000_001 + number,
        "bundle_id": 9_000 + number,
        "machine_id": 5_001 + number,
        "host_id": 40 + number % 7,
        "num_gpus": count,
        "gpu_name": model,
        "gpu_ram": ram,
        "gpu_total_ram": ram * count,
        "gpu_frac": 1.0,
        "gpu_display_active": False,
        "dph_base": base,
        "dph_total": base,
        "min_bid": round(base * dice.uniform(0.4, 0.6), 6),
        "storage_cost": round(dice.uniform(0.1, 0.3), 6),
        "inet_up_cost": 0.002,
        "inet_down_cost": 0.002,
        "inet_up": round(dice.uniform(200, 900), 1),
        "inet_down": round(dice.uniform(200, 900), 1),
        "cpu_cores": None if number % 11 == 5 else 64,
        "cpu_cores_effective": 16.0,
        "cpu_ram": 257_000,
        "cpu_name": "AMD EPYC 7763",
        "disk_space": float(dice.choice((100, 250, 1000))),
        "disk_bw": 2_000.0,
        "dlperf": round(dice.uniform(20, 300), 3),
        "dlperf_per_dphtotal": 100.0,
        "flops_per_dphtotal": 100.0,
        "total_flops": 80.0,
        "score": round(dice.uniform(100, 900), 3),
        "reliability": reliability,
        "reliability2": reliability,
        "cuda_max_good": dice.choice((12.2, 12.4, 12.8, 13.0)),
        "compute_cap": 890,
        "driver_version": "570.86.15",
        "driver_vers": 570_086_015,
        "geolocation": PLACES[number % len(PLACES)],
        "direct_port_count": 100,
        "public_ipaddr": f"198.51.100.{number + 1}",
        "static_ip": True,
        "duration": 2_592_000.0,
        "start_date": 1_780_000_000.0,
        "end_date": 1_799_000_000.0,
        "verification": "verified" if number % 10 else "unverified",
        "hosting_type": number % 2,
        "external": False,
        "rentable": True,
        "rented": False,
    }
