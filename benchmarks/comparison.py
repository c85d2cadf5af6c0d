"""The arithmetic of a comparison: samples, the least of them, ratios, figures to reach."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One round of one contender, or the least of several. CPU is per call; busy is the share of one core."""

    worker_us: float
    all_us: float
    calls_per_s: float
    p50_us: float
    p99_us: float
    busy: float


@dataclass(frozen=True)
class Figure:
    """A ratio to nginx that is to be reached, and the one measured."""

    name: str
    ratio: float
    ratio_max: float

    @property
    def is_reached(self) -> bool:
        """Say whether the measured ratio is within the figure."""
        return self.ratio <= self.ratio_max


RATIO_MAX = {
    "json": {"worker": 1.5, "all processes": 2.2},
    "sse": {"worker": 1.3},
    "sse_burst": {"worker": 1.3},
}


def sample(calls: int, elapsed_s: float, worker_cpu_s: float, all_cpu_s: float, p50_us: float, p99_us: float) -> Sample:
    """Put one round into figures per call."""
    return Sample(
        worker_us=worker_cpu_s / calls * 1e6,
        all_us=all_cpu_s / calls * 1e6,
        calls_per_s=calls / elapsed_s,
        p50_us=p50_us,
        p99_us=p99_us,
        busy=all_cpu_s / elapsed_s,
    )


def best(rounds: Sequence[Sample]) -> Sample:
    """Return the best of each figure over the rounds; `busy` is that of the round with most calls.

    Noise on a machine only ever adds, so the least is what comes nearest to the cost itself.
    """
    quickest = max(rounds, key=lambda one: one.calls_per_s)
    return Sample(
        worker_us=min(one.worker_us for one in rounds),
        all_us=min(one.all_us for one in rounds),
        calls_per_s=quickest.calls_per_s,
        p50_us=min(one.p50_us for one in rounds),
        p99_us=min(one.p99_us for one in rounds),
        busy=quickest.busy,
    )


def figures(load_name: str, nginx: Sample, gateway: Sample) -> list[Figure]:
    """Return the figures for one kind of call; both are ratios to nginx's worker."""
    measured = {"worker": gateway.worker_us, "all processes": gateway.all_us}
    return [
        Figure(name, measured[name] / nginx.worker_us, ratio_max) for name, ratio_max in RATIO_MAX[load_name].items()
    ]


def is_exact(calls: int, probes: int, receipts: int, in_flight_max: int) -> bool:
    """Say whether each call has its receipt and the rest are no more than were cut at the ends of rounds."""
    return 0 <= receipts - calls - probes <= in_flight_max
