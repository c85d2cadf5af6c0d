"""The spans a receipt becomes, as a receiver decodes them."""

from typing import Any

import pytest
from observe.test_traffic import like
from otlp_receiver import Span, decoded

from gpuproxy.observe.otlp import request_of
from gpuproxy.observe.spans import spans_of
from gpuproxy.types import Attempt, Receipt, Trace

TRACE_ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ID = 0x1111111111111111
ATTEMPT = Attempt(1_000, 1_900_000, "10.0.0.5", 8000, 200)


def traced(*attempts: Attempt, parent_id: str = PARENT, operation: str = "chat", **changes: Any) -> Receipt:
    trace = Trace(ID, parent_id, operation, list(attempts))
    return like(trace_id=TRACE_ID, trace=trace, **changes)


def sent(receipt: Receipt) -> list[Span]:
    return decoded(request_of({"service.name": "gateway"}, "1.0", spans_of(receipt)))


def mcp(**changes: Any) -> Receipt:
    path = "/api/v1/gpu/proxy/mcp/tools"
    plain = {"operation": "", "model": "", "usage_source": "none", "is_stream": False, "path": path}
    return traced(ATTEMPT, **{**plain, **changes})


def test_a_call_is_a_server_span_and_below_it_a_client_span() -> None:
    call, attempt = sent(traced(ATTEMPT))
    assert (call.trace_id, call.id, call.parent_id) == (TRACE_ID, "1" * 16, PARENT)
    assert (attempt.trace_id, attempt.id, attempt.parent_id) == (TRACE_ID, "1" * 15 + "2", "1" * 16)
    assert (call.name, call.kind, call.start_ns, call.end_ns) == (
        "POST /v1/chat/completions", 2, 10**18, 10**18 + 2 * 10**9,
    )  # fmt: skip
    assert (attempt.name, attempt.kind) == ("chat m", 3)
    assert (attempt.start_ns - call.start_ns, attempt.end_ns - attempt.start_ns) == (1_000_000, 1_900_000_000)
    assert (call.is_error, attempt.is_error, call.flags, attempt.flags) == (False, False, 0x301, 0x101)
    assert call.resource == {"service.name": "gateway"}
    assert call.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.request.body.size": 100,
        "http.response.body.size": 900,
        "http.response.status_code": 200,
        "user.id": "u1",
        "gpuproxy.request_id": "q1",
        "gpuproxy.key_id": "k1",
        "gpuproxy.outcome": "ok",
        "gpuproxy.attempts": 1,
        "gpuproxy.protocol": "openinference",
        "gpuproxy.upstream": "llm",
        "gpuproxy.model": "m",
    }
    assert attempt.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "10.0.0.5",
        "server.port": 8000,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llm",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.time_to_first_chunk": 0.499,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
    }


def test_the_model_that_an_answer_is_of_is_told_of_the_last_attempt() -> None:
    failed = Attempt(0, 500, "10.0.0.4", 8000, 503, "503")
    receipt = like(trace_id=TRACE_ID, trace=Trace(ID, PARENT, "chat", [failed, ATTEMPT], "m-2026"), attempts=2)
    call, first, last = sent(receipt)
    assert last.attributes["gen_ai.response.model"] == "m-2026"
    assert last.attributes["gen_ai.request.model"] == "m"
    assert "gen_ai.response.model" not in call.attributes | first.attributes


def test_a_call_that_began_its_trace_has_no_parent() -> None:
    call, _ = sent(traced(ATTEMPT, parent_id=""))
    assert (call.parent_id, call.flags) == ("", 0x101)


def test_a_call_whose_spans_nobody_wants_has_none() -> None:
    assert sent(like(trace_id=TRACE_ID)) == []


def test_an_attempt_that_was_given_up_says_why_and_tells_no_tokens() -> None:
    failed = Attempt(0, 500, "10.0.0.4", 8000, 503, "503")
    call, first, second = sent(traced(failed, ATTEMPT, attempts=2))
    assert (call.is_error, first.is_error, second.is_error) == (False, True, False)
    assert first.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 503,
        "error.type": "503",
        "server.address": "10.0.0.4",
        "server.port": 8000,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llm",
        "gen_ai.request.model": "m",
    }
    assert second.attributes["http.request.resend_count"] == 1
    assert (first.id[-1], second.id[-1], second.parent_id) == ("2", "3", call.id)


def test_a_failure_of_the_upstream_is_an_error_of_both() -> None:
    lost = Attempt(0, 500, "10.0.0.5", 8000)
    changes = {"status": 504, "outcome": "upstream_failed", "error": "UPSTREAM_TIMEOUT", "usage_source": "none"}
    call, attempt = sent(traced(lost, **changes))
    assert (call.is_error, call.attributes["error.type"]) == (True, "UPSTREAM_TIMEOUT")
    assert (attempt.is_error, attempt.attributes["error.type"]) == (True, "UPSTREAM_TIMEOUT")
    assert "http.response.status_code" not in attempt.attributes


@pytest.mark.parametrize(("outcome", "is_error"), [("cut", True), ("upstream_failed", True), ("client_gone", False)])
def test_a_stream_that_was_broken_off_is_an_error_though_it_began_well(outcome: str, is_error: bool) -> None:
    call, _ = sent(traced(ATTEMPT, outcome=outcome))
    assert (call.is_error, call.attributes["http.response.status_code"]) == (is_error, 200)


def test_what_an_upstream_refuses_is_an_error_of_the_client_side_alone() -> None:
    call, attempt = sent(traced(Attempt(0, 500, "10.0.0.5", 8000, 404), status=404))
    assert (call.is_error, "error.type" in call.attributes) == (False, False)
    assert (attempt.is_error, attempt.attributes["error.type"]) == (True, "404")


def test_a_refused_call_has_one_span() -> None:
    (call,) = sent(traced(status=402, outcome="refused", error="INSUFFICIENT_CREDITS", operation=""))
    assert (call.is_error, call.attributes["error.type"]) == (False, "INSUFFICIENT_CREDITS")


def test_estimated_tokens_are_not_told() -> None:
    _, attempt = sent(traced(ATTEMPT, usage_source="estimated"))
    assert not [name for name in attempt.attributes if name.startswith("gen_ai.usage")]


@pytest.mark.parametrize(
    ("method", "name", "span_name", "attributes"),
    [
        ("tools/call", "add", "tools/call add", {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "add"}),
        ("prompts/get", "sum", "prompts/get sum", {"gen_ai.prompt.name": "sum"}),
        ("resources/read", "file:///secret", "resources/read", {}),
        ("tools/list", "", "tools/list", {}),
        ("batch", "", "batch", {}),
    ],
    ids=str,
)
def test_a_call_of_mcp_is_named_by_its_method_and_tool(
    method: str, name: str, span_name: str, attributes: dict[str, str]
) -> None:
    call, attempt = sent(mcp(rpc_method=method, rpc_name=name, rpc_outcome="ok"))
    assert (call.name, attempt.name) == ("POST /api/v1/gpu/proxy/mcp", span_name)
    told = {key: value for key, value in attempt.attributes.items() if key.startswith(("gen_ai", "mcp", "rpc"))}
    assert told == {"mcp.method.name": method, **attributes}


@pytest.mark.parametrize(
    ("outcome", "error", "code"),
    [
        ("ok", None, None),
        ("input_required", None, None),
        ("tool_error", "tool_error", None),
        ("jsonrpc_error:-32602", "-32602", "-32602"),
        ("", None, None),
    ],
    ids=str,
)
def test_what_became_of_a_tool_is_told(outcome: str, error: str | None, code: str | None) -> None:
    _, attempt = sent(mcp(rpc_method="tools/call", rpc_name="add", rpc_outcome=outcome))
    assert (attempt.attributes.get("error.type"), attempt.attributes.get("rpc.response.status_code")) == (error, code)
    assert attempt.is_error is (error is not None)


def test_names_of_spans_do_not_grow_with_paths() -> None:
    path = "/api/v1/gpu/proxy/upstreams/raw/orders/123"
    call, attempt = sent(traced(ATTEMPT, operation="", model="", path=path, method="GET", usage_source="none"))
    assert (call.name, attempt.name) == ("GET /api/v1/gpu/proxy/upstreams", "GET")
    assert (call.attributes["http.route"], call.attributes["url.path"]) == ("/api/v1/gpu/proxy/upstreams", path)
    assert not [name for name in attempt.attributes if name.startswith("gen_ai")]


def test_text_of_any_kind_and_numbers_of_any_size_arrive() -> None:
    call, _ = sent(traced(ATTEMPT, model="modèle \udcff" + "x" * 300, request_bytes=1 << 40, user_id=""))
    assert call.attributes["gpuproxy.model"] == "modèle ?" + "x" * 300
    assert call.attributes["http.request.body.size"] == 1 << 40
    assert "user.id" not in call.attributes
