"""Every series of ``/metrics``, in one place: its name, what it tells, its labels. README lists them; a test compares.

Buckets of token times are those of OpenTelemetry's GenAI conventions, so that dashboards made for them fit.
"""

Labels = tuple[str, ...]

COUNTERS: dict[str, tuple[str, None, tuple[str, ...]]] = {
    "gpuproxy_requests_total": (
        "API requests by what became of them",
        None,
        ("protocol", "upstream", "model", "status", "outcome"),
    ),
    "gpuproxy_errors_total": ("requests that ended with an error code of the gateway", None, ("code",)),
    "gpuproxy_retries_total": ("attempts beyond the first", None, ("upstream",)),
    "gpuproxy_tokens_total": ("tokens used: input, the cached part of it, output", None, ("model", "type")),
    "gpuproxy_tool_calls_total": (
        "calls of MCP tools by what became of them",
        None,
        ("upstream", "tool", "outcome"),
    ),
    "gpuproxy_traces_total": (
        "calls whose spans were sent, refused by the receiver, or dropped for want of room",
        None,
        ("outcome",),
    ),
    "gpuproxy_bytes_total": ("bytes of bodies, from clients and to them", None, ("direction",)),
}

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "gpuproxy_latency_seconds": (
        "time from a request's head to the end of its answer",
        ("protocol", "upstream"),
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
    ),
    "gpuproxy_time_to_first_token_seconds": (
        "time from a request's head to the first byte of a streamed answer",
        ("model",),
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    "gpuproxy_time_per_output_token_seconds": (
        "time between tokens of a streamed answer, behind the first",
        ("model",),
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
}

MANAGEMENT: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpuproxy_management_seconds": ("time the management API took to answer", ("route",)),
}

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpuproxy_active_instances": ("rented instances that are not gone", ("provider",)),
    "gpuproxy_breaker_open": (
        "workers in which the breaker of an endpoint is open or half open",
        ("upstream", "endpoint"),
    ),
    "gpuproxy_endpoint_calls": ("calls an endpoint serves now", ("upstream", "endpoint")),
    "gpuproxy_fleet_findings": ("strays, foreign instances, charges that differ", ("provider", "kind")),
    "gpuproxy_provider_listed_seconds": ("when a provider last told what is rented, unix time", ("provider",)),
    "gpuproxy_unreachable_instances": ("instances that should run and nobody knows how they are", ("provider",)),
    "gpuproxy_journal_bytes": ("receipts on their way to the store", ()),
    "gpuproxy_waiting_calls": ("calls that wait for room at an endpoint", ("model",)),
    "gpuproxy_workers": ("workers that are linked to control", ()),
}
