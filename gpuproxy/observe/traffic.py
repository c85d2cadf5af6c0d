"""What calls add up to, counted from receipts: each call once, whichever worker served it, with no work in workers.

Receipts are counted a batch at a time, those with the same labels together: half a µs each where labels are few. No
label is unbounded: a model counts by name only if it is one of the configuration, for callers of an upstream may name
any; a tool only once it has answered without an error, and so TOOLS_MAX.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuproxy.observe.series import COUNTERS, HISTOGRAMS, Labels
from gpuproxy.types import TOOL_CALL, Receipt

TOOLS_MAX = 500
OTHER = "other"
TUNNEL = 101  # a status: how long a tunnel lasts, and when those at its ends speak, is up to them

_labels_of = attrgetter("protocol", "upstream", "model", "status", "outcome", "error", "is_stream", "rpc_method")


class Histogram:
    """Observations in buckets, with their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, values: Sequence[float]) -> None:
        """Count values, each in the first bucket whose bound it does not exceed."""
        ordered = sorted(values)
        below = 0
        for at, bound in enumerate(self.bounds):
            reached = bisect_right(ordered, bound, below)
            self.counts[at] += reached - below
            below = reached
        self.counts[-1] += len(ordered) - below
        self.total += sum(ordered)

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulated counts by upper bound, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Traffic(Collector):
    """The sums of this process's life. ``is_model`` tells which names are those of models of the configuration."""

    def __init__(self, is_model: Callable[[str], bool]) -> None:
        self._is_model = is_model
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._tools: set[tuple[str, str]] = set()

    def add(self, receipts: Iterable[Receipt]) -> None:
        """Count ended calls."""
        groups: dict[object, list[Receipt]] = {}
        for receipt in receipts:
            labels = _labels_of(receipt)
            if (group := groups.get(labels)) is not None:
                group.append(receipt)
            else:
                groups[labels] = [receipt]
        for group in groups.values():
            self._add(group)

    def add_managed(self, status: int, error: str) -> None:
        """Count an answer of the management API."""
        self._count("gpuproxy_requests_total", ("management", "", "", str(status), "ok" if status < 400 else "refused"))
        if error:
            self._count("gpuproxy_errors_total", (error,))

    def add_traces(self, outcome: str, count: int) -> None:
        """Count calls by what became of their spans."""
        self._count("gpuproxy_traces_total", (outcome,), count)

    def collect(self) -> Iterator[Metric]:
        """Yield every series, for the registry."""
        for name, counts in self._counters.items():
            counter = CounterMetricFamily(name, *COUNTERS[name])
            for labels, value in counts.copy().items():
                counter.add_metric(labels, value)
            yield counter
        for name, found in self._histograms.items():
            description, names, _ = HISTOGRAMS[name]
            family = HistogramMetricFamily(name, description, labels=names)
            for labels, histogram in found.copy().items():
                family.add_metric(labels, histogram.buckets(), histogram.total)
            yield family

    def _add(self, group: list[Receipt]) -> None:
        """Count receipts whose labels are the same."""
        one, count = group[0], len(group)
        model, protocol, upstream = self._model(one.model), one.protocol, one.upstream
        self._count("gpuproxy_requests_total", (protocol, upstream, model, str(one.status), one.outcome), count)
        if one.status != TUNNEL:
            self._observe("gpuproxy_latency_seconds", (protocol, upstream), [each.duration_us / 1e6 for each in group])
        self._count("gpuproxy_bytes_total", ("request",), sum([each.request_bytes for each in group]))
        self._count("gpuproxy_bytes_total", ("response",), sum([each.response_bytes for each in group]))
        if one.error:
            self._count("gpuproxy_errors_total", (one.error,), count)
        if retries := sum([each.attempts - 1 for each in group if each.attempts > 1]):
            self._count("gpuproxy_retries_total", (upstream,), retries)
        if one.is_stream and one.outcome != "refused" and one.status != TUNNEL:
            waited = [each.first_byte_us / 1e6 for each in group if each.first_byte_us >= 0]
            self._observe("gpuproxy_time_to_first_token_seconds", (model,), waited)
        if told := [each for each in group if each.output_tokens >= 0]:
            self._add_tokens(told, model)
        if one.rpc_method == TOOL_CALL:
            for each in group:
                self._count("gpuproxy_tool_calls_total", (upstream, self._tool(each), _tool_outcome(each)))

    def _add_tokens(self, told: list[Receipt], model: str) -> None:
        self._count("gpuproxy_tokens_total", (model, "input"), sum([each.input_tokens for each in told]))
        self._count("gpuproxy_tokens_total", (model, "cached"), sum([each.cached_tokens for each in told]))
        self._count("gpuproxy_tokens_total", (model, "output"), sum([each.output_tokens for each in told]))
        if told[0].is_stream and told[0].status != TUNNEL:
            timed = [each for each in told if each.output_tokens > 1 and each.first_byte_us >= 0]
            self._observe("gpuproxy_time_per_output_token_seconds", (model,), [_per_token_s(each) for each in timed])

    def _model(self, name: str) -> str:
        return name if not name or self._is_model(name) else OTHER

    def _tool(self, receipt: Receipt) -> str:
        place = receipt.upstream, receipt.rpc_name
        if place not in self._tools:
            if receipt.rpc_outcome != "ok" or not receipt.upstream or len(self._tools) >= TOOLS_MAX:
                return OTHER  # a client may name any; only who has served is known to be one
            self._tools.add(place)
        return receipt.rpc_name

    def _count(self, name: str, labels: Labels, amount: float = 1) -> None:
        counts = self._counters[name]
        counts[labels] = counts.get(labels, 0) + amount

    def _observe(self, name: str, labels: Labels, values: Sequence[float]) -> None:
        if not values:
            return
        found = self._histograms[name]
        histogram = found.get(labels)
        if histogram is None:
            histogram = found[labels] = Histogram(HISTOGRAMS[name][2])
        histogram.observe(values)


def _per_token_s(receipt: Receipt) -> float:
    """Return the time between tokens, behind the first."""
    return (receipt.duration_us - receipt.first_byte_us) / (receipt.output_tokens - 1) / 1e6


def _tool_outcome(receipt: Receipt) -> str:
    if receipt.outcome != "ok":
        return receipt.outcome
    if receipt.rpc_outcome:
        return receipt.rpc_outcome.partition(":")[0]
    return "http_error" if receipt.status >= 400 else "unknown"
