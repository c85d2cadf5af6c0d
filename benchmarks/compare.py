"""Compare the CPU cost of a call through gpuproxy with nginx's plain proxying, side by side in one run.

One command: ``python benchmarks/compare.py``. README.md beside this file says what is measured and how.
"""

import json
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from comparison import Figure, Sample, best, figures, is_exact, sample
from contenders import Contender, fake_upstream, gpuproxy, nginx, receipt_count
from load import CONNECTION_COUNT, LOADS, Load, Result, call_once, run_wrk
from proc_cpu import TICK_S, own_cpu_s, tree_cpu_s
from programs import BenchmarkError, program
from rich.console import Console
from rich.table import Table

PACKAGES = {"nginx": "nginx-light", "wrk": "wrk"}
_QUIET_POLL_S = 0.2
_QUIET_TICKS = 2
_QUIET_S_MAX = 15.0
_WARM_UP_S = 1


@dataclass
class Measured:
    """All rounds of one kind of call."""

    load: Load
    direct: Result
    nginx: list[Sample] = field(default_factory=list)
    gpuproxy: list[Sample] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        """Return the ratios of the best rounds."""
        return figures(self.load.name, best(self.nginx), best(self.gpuproxy))


@dataclass
class Exactness:
    """What clients saw answered against what the gateway's store knows of."""

    calls: int = 0
    probes: int = 0
    in_flight_max: int = 0
    receipts: int = 0

    @property
    def is_exact(self) -> bool:
        """Say whether every answered call has its receipt and no receipt lacks a call."""
        return is_exact(self.calls, self.probes, self.receipts, self.in_flight_max)


def measure(contender: Contender, load: Load, seconds: int, cpu: int) -> tuple[Sample, Result]:
    """Put one contender under load and return what it cost."""
    worker_before_s, all_before_s = own_cpu_s(contender.worker_pid), tree_cpu_s(contender.pid)
    result = run_wrk(load, contender.port(load), contender.key, seconds, cpu)
    wait_until_quiet(contender)
    try:
        worker_s = own_cpu_s(contender.worker_pid) - worker_before_s
    except OSError as error:
        raise BenchmarkError(f"the worker of {contender.name} died under load") from error
    all_s = tree_cpu_s(contender.pid) - all_before_s
    elapsed_s = result.duration_us / 1e6
    return sample(result.calls, elapsed_s, worker_s, all_s, result.p50_us, result.p99_us), result


def wait_until_quiet(contender: Contender) -> None:
    """Return when the contender has no work left, so that a backlog is paid by the round that made it."""
    deadline = time.monotonic() + _QUIET_S_MAX
    before_s, now_s = -1.0, tree_cpu_s(contender.pid)
    while now_s - before_s > _QUIET_TICKS * TICK_S and time.monotonic() < deadline:
        time.sleep(_QUIET_POLL_S)
        before_s, now_s = now_s, tree_cpu_s(contender.pid)


def check_answers(contenders: list[Contender], load: Load, upstream_port: int) -> None:
    """Make one call through each contender. Raises BenchmarkError unless the answer is unchanged.

    The load does not ask for a stream's usage, which a metering gateway therefore takes out again.
    """
    expected = call_once(load, upstream_port, "")
    allowed = (expected, without_usage(expected))
    for contender in contenders:
        if call_once(load, contender.port(load), contender.key) not in allowed:
            raise BenchmarkError(f"{contender.name} changed the answer to the {load.title}")


def without_usage(answer: bytes) -> bytes:
    """Return the answer without the event that only tells usage."""
    return b"".join(event + b"\n\n" for event in answer.split(b"\n\n")[:-1] if b'"choices":[],' not in event)


class Run:
    """One comparison from start to end."""

    def __init__(self, rounds: int, seconds: int, console: Console) -> None:
        self._rounds, self._seconds, self._console = rounds, seconds, console
        self._proxy_cpu, self._load_cpu = two_processors()
        self.exactness = Exactness()

    def all_loads(self) -> list[Measured]:
        """Start everything, measure every kind of call, check the receipts, end everything."""
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuproxy-benchmark-")))
            upstream_port = stack.enter_context(fake_upstream(self._load_cpu, home))
            rival = stack.enter_context(nginx(upstream_port, self._proxy_cpu, home))
            gateway = stack.enter_context(gpuproxy(upstream_port, self._proxy_cpu, home))
            measured = [self._one_load(load, upstream_port, rival, gateway) for load in LOADS]
            wait_until_quiet(gateway)
            self.exactness.receipts = receipt_count(gateway)
            return measured

    def _one_load(self, load: Load, upstream_port: int, rival: Contender, gateway: Contender) -> Measured:
        check_answers([rival, gateway], load, upstream_port)
        self.exactness.probes += 1
        measured = Measured(load, run_wrk(load, upstream_port, "", _WARM_UP_S, self._load_cpu))
        for contender in (rival, gateway):
            self._round(contender, load, _WARM_UP_S)
        for number in range(1, self._rounds + 1):
            for contender, samples in ((rival, measured.nginx), (gateway, measured.gpuproxy)):
                samples.append(self._round(contender, load, self._seconds))
                told = f"{samples[-1].worker_us:.1f} us/call worker, {samples[-1].all_us:.1f} all"
                self._console.print(f"{load.title}, round {number}, {contender.name}: {told}", soft_wrap=True)
        return measured

    def _round(self, contender: Contender, load: Load, seconds: int) -> Sample:
        one, result = measure(contender, load, seconds, self._load_cpu)
        if contender.name == "gpuproxy":
            self.exactness.calls += result.calls
            self.exactness.in_flight_max += CONNECTION_COUNT
        return one


def two_processors() -> tuple[int, int]:
    """Return the processor for the proxies and the one for load and upstream."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise BenchmarkError("two processors are needed: one for the proxy, one for load and upstream")
    return usable[0], usable[1]


def check_programs() -> None:
    """Raise BenchmarkError naming the Debian packages when a program is missing."""
    try:
        for name in PACKAGES:
            program(name)
    except BenchmarkError as error:
        packages = " ".join(PACKAGES.values())
        raise BenchmarkError(f"{error}; on Debian: apt-get install {packages}") from error


def table(measured: Measured) -> Table:
    """Lay out what one kind of call cost."""
    rival, gateway = best(measured.nginx), best(measured.gpuproxy)
    shown = Table(title=f"{measured.load.title}, {CONNECTION_COUNT} connections", title_justify="left")
    shown.add_column("")
    for heading in ("nginx", "gpuproxy", "ratio", "direct"):
        shown.add_column(heading, justify="right")
    direct = measured.direct
    direct_calls_per_s = direct.calls / direct.duration_us * 1e6
    rows = [
        ("CPU per call, worker, us", rival.worker_us, gateway.worker_us, None, ".1f"),
        ("CPU per call, all processes, us", rival.all_us, gateway.all_us, None, ".1f"),
        ("calls per second", rival.calls_per_s, gateway.calls_per_s, direct_calls_per_s, ",.0f"),
        ("core in use by the proxy", rival.busy, gateway.busy, None, ".0%"),
        ("latency p50, us", rival.p50_us, gateway.p50_us, direct.p50_us, ",.0f"),
        ("latency p99, us", rival.p99_us, gateway.p99_us, direct.p99_us, ",.0f"),
    ]
    for name, of_nginx, of_gateway, of_direct, form in rows:
        last = "" if of_direct is None else format(of_direct, form)
        ratio = f"{of_gateway / of_nginx:.2f}" if of_nginx else ""
        shown.add_row(name, format(of_nginx, form), format(of_gateway, form), ratio, last)
    return shown


def report(measured: list[Measured], exactness: Exactness, console: Console) -> None:
    """Print tables, figures reached or not, and whether every call has its receipt."""
    for one in measured:
        console.print(table(one))
        for figure in one.figures():
            verdict = "reached" if figure.is_reached else "NOT reached"
            told = f"{figure.ratio:.2f} x nginx, at most {figure.ratio_max:g}: {verdict}"
            console.print(f"{one.load.title}, CPU of {figure.name}: {told}", highlight=False, soft_wrap=True)
    told = f"{exactness.receipts} receipts for {exactness.calls} answered calls, {exactness.probes} probes and"
    verdict = "exact" if exactness.is_exact else "NOT exact"
    console.print(f"{told} up to {exactness.in_flight_max} cut in flight: {verdict}", highlight=False, soft_wrap=True)


def as_json(measured: list[Measured], exactness: Exactness) -> str:
    """Return all rounds and figures as JSON."""
    loads = [
        {
            "load": one.load.name,
            "direct": asdict(one.direct),
            "nginx": [asdict(each) for each in one.nginx],
            "gpuproxy": [asdict(each) for each in one.gpuproxy],
            "figures": [{**asdict(figure), "is_reached": figure.is_reached} for figure in one.figures()],
        }
        for one in measured
    ]
    receipts = {**asdict(exactness), "is_exact": exactness.is_exact}
    return json.dumps({"loads": loads, "receipts": receipts}, indent=2) + "\n"


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@click.command(help="Compare the CPU cost of a call through gpuproxy with nginx's plain proxying.")
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(min=1), help="Rounds of each.")
@click.option("--seconds", default=5, show_default=True, type=click.IntRange(min=1), help="Length of a round.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all rounds.")
def main(rounds: int, seconds: int, json_file: Path | None) -> None:
    """Run the comparison; exits with 1 when it fails, not when a figure is missed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    console = Console()
    try:
        check_programs()
        run = Run(rounds, seconds, console)
        measured = run.all_loads()
        report(measured, run.exactness, console)
        if json_file is not None:
            json_file.write_text(as_json(measured, run.exactness))
        if not run.exactness.is_exact:
            raise BenchmarkError("receipts and calls do not agree")
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
