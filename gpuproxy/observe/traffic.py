"""What calls add up to, counted from receipts: each call once, whichever worker served it, with no work in workers.

Counting a receipt costs about 2 µs. No label is unbounded: a model counts by name only if it was routed to a
configured upstream, and of those only MODELS_MAX.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpuproxy.observe.series import COUNTERS, HISTOGRAMS, Labels
from gpuproxy.types import Receipt

MODELS_MAX = 500
OTHER = "other"


class Histogram:
    """Observations in buckets, with their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulated counts by upper bound, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Traffic(Collector):
    """The sums of this process's life."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._models: set[str] = set()

    def add(self, receipts: Iterable[Receipt]) -> None:
        """Count ended calls."""
        for receipt in receipts:
            self._add(receipt)

    def add_managed(self, status: int, error: str) -> None:
        """Count an answer of the management API."""
        self._count("gpuproxy_requests_total", ("management", "", "", str(status), "ok" if status < 400 else "refused"))
        if error:
            self._count("gpuproxy_errors_total", (error,))

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

    def _add(self, receipt: Receipt) -> None:
        model = self._model(receipt)
        protocol, upstream = receipt.protocol, receipt.upstream
        self._count("gpuproxy_requests_total", (protocol, upstream, model, str(receipt.status), receipt.outcome))
        self._observe("gpuproxy_latency_seconds", (protocol, upstream), receipt.duration_us / 1e6)
        self._count("gpuproxy_bytes_total", ("request",), receipt.request_bytes)
        self._count("gpuproxy_bytes_total", ("response",), receipt.response_bytes)
        if receipt.error:
            self._count("gpuproxy_errors_total", (receipt.error,))
        if receipt.attempts > 1:
            self._count("gpuproxy_retries_total", (upstream,), receipt.attempts - 1)
        if receipt.is_stream and receipt.first_byte_us >= 0 and receipt.outcome != "refused":
            self._observe("gpuproxy_time_to_first_token_seconds", (model,), receipt.first_byte_us / 1e6)
        if receipt.output_tokens >= 0:
            self._add_tokens(receipt, model)

    def _add_tokens(self, receipt: Receipt, model: str) -> None:
        self._count("gpuproxy_tokens_total", (model, "input"), receipt.input_tokens)
        self._count("gpuproxy_tokens_total", (model, "cached"), receipt.cached_tokens)
        self._count("gpuproxy_tokens_total", (model, "output"), receipt.output_tokens)
        if receipt.is_stream and receipt.output_tokens > 1 and receipt.first_byte_us >= 0:
            after_first_us = (receipt.duration_us - receipt.first_byte_us) / (receipt.output_tokens - 1)
            self._observe("gpuproxy_time_per_output_token_seconds", (model,), after_first_us / 1e6)

    def _model(self, receipt: Receipt) -> str:
        model = receipt.model
        if not model or model in self._models:
            return model
        if not receipt.upstream or len(self._models) >= MODELS_MAX:
            return OTHER
        self._models.add(model)
        return model

    def _count(self, name: str, labels: Labels, amount: float = 1) -> None:
        counts = self._counters[name]
        counts[labels] = counts.get(labels, 0) + amount

    def _observe(self, name: str, labels: Labels, value: float) -> None:
        found = self._histograms[name]
        histogram = found.get(labels)
        if histogram is None:
            histogram = found[labels] = Histogram(HISTOGRAMS[name][2])
        histogram.observe(value)
