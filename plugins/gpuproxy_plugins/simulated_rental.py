"""One instance of the simulated marketplace over time: it boots, runs, fails, is outbid, stops, costs.

What has happened to it is a list of states with the moment each began. Time moves only when somebody looks.
"""

from typing import Literal

from msgspec import Struct

from gpuproxy_plugins.simulated_market import WINDOW_NS, Machine, Market

State = Literal["pending", "running", "stopped", "failed", "gone"]
HOUR_NS = 3_600_000_000_000
WINDOWS_MAX = 2_016  # one week: of a longer absence only the end is played


class Step(Struct, array_like=True):
    """From this moment on it was so."""

    since_ns: int
    state: State


class Rental(Struct):
    """What was rented, and what became of it."""

    id: str
    tag: str
    machine_id: str
    ports: dict[int, int]
    disk_gb: int
    price_nanousd_per_hour: int
    is_spot: bool
    boot_ns: int
    will_fail: bool
    steps: list[Step]
    is_interrupted: bool = False

    @property
    def state(self) -> State:
        """Return the state it is in."""
        return self.steps[-1].state

    def started_ns(self) -> int:
        """Return when it last began to run, 0 if it never did."""
        return next((step.since_ns for step in reversed(self.steps) if step.state == "running"), 0)

    def move(self, now_ns: int, state: State) -> None:
        """Be in another state from now on."""
        self.steps.append(Step(now_ns, state))

    def advance(self, market: Market, now_ns: int) -> None:
        """Let happen what has happened since somebody last looked."""
        began = self.steps[-1].since_ns
        if self.state == "pending" and now_ns >= began + self.boot_ns:
            self.move(began + self.boot_ns, "failed" if self.will_fail else "running")
        if self.state == "running" and self.is_spot:
            self._be_outbid(market, now_ns)

    def _be_outbid(self, market: Market, now_ns: int) -> None:
        machine, first = market.machines[self.machine_id], self.steps[-1].since_ns // WINDOW_NS + 1
        for window in range(max(first, now_ns // WINDOW_NS - WINDOWS_MAX), now_ns // WINDOW_NS + 1):
            if market.price_nanousd_per_hour(machine, window * WINDOW_NS, is_spot=True) > self.price_nanousd_per_hour:
                self.is_interrupted = True
                self.move(window * WINDOW_NS, "stopped")
                return

    def cost_nanousd(self, machine: Machine, since_ns: int, until_ns: int) -> tuple[int, int]:
        """Return what GPUs and storage cost in a span of time.

        As with vast.ai the price of a running machine includes its storage, which costs by itself from creation to the
        end whenever it does not run.
        """
        gpu_ns = self._lasted_ns(("running",), since_ns, until_ns)
        disk_ns = self._lasted_ns(("pending", "stopped", "failed"), since_ns, until_ns)
        storage = disk_ns * self.disk_gb * machine.storage_nanousd_per_gb_hour
        return gpu_ns * self.price_nanousd_per_hour // HOUR_NS, storage // HOUR_NS

    def _lasted_ns(self, states: tuple[State, ...], since_ns: int, until_ns: int) -> int:
        ends = [step.since_ns for step in self.steps[1:]] + [until_ns]
        spans = [(step.since_ns, end) for step, end in zip(self.steps, ends, strict=True) if step.state in states]
        return sum(max(0, min(end, until_ns) - max(since, since_ns)) for since, end in spans)
