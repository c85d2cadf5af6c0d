"""What calls add up to: each counted once, under bounded labels."""

from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpuproxy.observe.series import COUNTERS, GAUGES, HISTOGRAMS, MANAGEMENT
from gpuproxy.observe.traffic import TOOLS_MAX, Traffic
from gpuproxy.types import Receipt

CALL = Receipt(
    "r1", "q1", 10**18, 2_000_000, 500_000, "u1", "k1", "openinference", "llm", "m", "POST", "/v1/chat/completions",
    200, "ok", "", 100, 900, 7, 3, 4, "provider", 1, True,
)  # fmt: skip


def like(**changes: Any) -> Receipt:
    return msgspec.structs.replace(CALL, **changes)


def shown(*receipts: Receipt) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels."""
    traffic, registry = Traffic({"m", "m2"}.__contains__), CollectorRegistry()
    traffic.add(receipts)
    registry.register(traffic)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *_in_order(sample.labels)): sample.value for sample in samples}


def _in_order(labels: dict[str, str]) -> list[str]:
    names = ("protocol", "upstream", "model", "tool", "type", "status", "outcome", "code", "direction", "le")
    return [labels[name] for name in names if name in labels]


def test_a_call_is_counted_timed_and_metered() -> None:
    told = shown(CALL, like(attempts=3))
    assert told["gpuproxy_requests_total", "openinference", "llm", "m", "200", "ok"] == 2
    assert told["gpuproxy_tokens_total", "m", "input"] == 14
    assert told["gpuproxy_tokens_total", "m", "cached"] == 6
    assert told["gpuproxy_tokens_total", "m", "output"] == 8
    assert told["gpuproxy_retries_total", "llm"] == 2
    assert told["gpuproxy_bytes_total", "response"] == 1800
    assert told["gpuproxy_latency_seconds_count", "openinference", "llm"] == 2
    assert told["gpuproxy_latency_seconds_sum", "openinference", "llm"] == 4
    assert told["gpuproxy_latency_seconds_bucket", "openinference", "llm", "1.0"] == 0
    assert told["gpuproxy_latency_seconds_bucket", "openinference", "llm", "2.5"] == 2
    assert told["gpuproxy_latency_seconds_bucket", "openinference", "llm", "+Inf"] == 2
    assert told["gpuproxy_time_to_first_token_seconds_sum", "m"] == 1
    assert told["gpuproxy_time_per_output_token_seconds_sum", "m"] == 1


def test_a_refused_call_counts_as_an_error_and_not_as_a_first_token() -> None:
    told = shown(like(status=402, outcome="refused", error="INSUFFICIENT_CREDITS", output_tokens=-1, first_byte_us=-1))
    assert told["gpuproxy_errors_total", "INSUFFICIENT_CREDITS"] == 1
    assert told["gpuproxy_requests_total", "openinference", "llm", "m", "402", "refused"] == 1
    assert not any(key[0].startswith(("gpuproxy_time", "gpuproxy_tokens")) for key in told)


def test_a_tunnel_is_counted_and_metered_but_times_nothing() -> None:
    told = shown(like(status=101, duration_us=3_600_000_000))
    assert told["gpuproxy_requests_total", "openinference", "llm", "m", "101", "ok"] == 1
    assert told["gpuproxy_tokens_total", "m", "output"] == 4
    assert told["gpuproxy_bytes_total", "response"] == 900
    assert not any(key[0].startswith(("gpuproxy_time", "gpuproxy_latency")) for key in told)


def test_callers_cannot_make_series_by_naming_models() -> None:
    unrouted = [like(model=f"x{n}", upstream="") for n in range(9)]
    by_upstream = [like(model=f"x{n}") for n in range(9)]
    told = shown(*unrouted, *by_upstream, like(model="m2"), like(model=""))
    assert {key[1:]: value for key, value in told.items() if key[0] == "gpuproxy_requests_total"} == {
        ("openinference", "", "other", "200", "ok"): 9,
        ("openinference", "llm", "other", "200", "ok"): 9,
        ("openinference", "llm", "m2", "200", "ok"): 1,
        ("openinference", "llm", "", "200", "ok"): 1,
    }
    assert {key[1] for key in told if key[0] == "gpuproxy_tokens_total"} == {"other", "m2", ""}


def tool_call(tool: str, rpc_outcome: str = "ok", **changes: Any) -> Receipt:
    return like(upstream="tools", model="", rpc_method="tools/call", rpc_name=tool, rpc_outcome=rpc_outcome, **changes)


def test_calls_of_tools_are_counted_by_what_became_of_them() -> None:
    told = shown(
        tool_call("search"),
        tool_call("search", "tool_error"),
        tool_call("search", "jsonrpc_error:-32602"),
        tool_call("search", "", status=502),
        tool_call("search", "", status=202),
        tool_call("search", "", outcome="client_gone"),
        like(rpc_method="prompts/get", rpc_name="greet", rpc_outcome="ok"),
    )
    outcomes = ["client_gone", "http_error", "jsonrpc_error", "ok", "tool_error", "unknown"]
    keys = [("gpuproxy_tool_calls_total", "tools", "search", outcome) for outcome in outcomes]
    assert {key: told[key] for key in told if key[0] == "gpuproxy_tool_calls_total"} == dict.fromkeys(keys, 1)


def test_only_tools_that_have_served_are_counted_by_name() -> None:
    told = shown(tool_call("made up", "tool_error"), *(tool_call(f"t{n}") for n in range(TOOLS_MAX + 5)))
    names = [key for key in told if key[0] == "gpuproxy_tool_calls_total"]
    assert told["gpuproxy_tool_calls_total", "tools", "other", "tool_error"] == 1
    assert told["gpuproxy_tool_calls_total", "tools", "other", "ok"] == 5
    assert len(names) == TOOLS_MAX + 2


def test_every_series_says_what_it_is() -> None:
    for name, (description, *_) in {**COUNTERS, **HISTOGRAMS, **GAUGES, **MANAGEMENT}.items():
        assert name.startswith("gpuproxy_")
        assert description
