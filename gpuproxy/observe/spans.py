"""The spans of a call, made of its receipt: one for the call, below it one for each time it was sent.

Names are those of OpenTelemetry's semantic conventions 1.41 for HTTP, GenAI and MCP; ours begin with ``gpuproxy.``.
Nothing of bodies, queries or credentials; so no names of MCP resources either, which are URLs. Tokens are told only if
the provider told them.
"""

from collections.abc import Iterator

from gpuproxy.observe.otlp import CLIENT, SERVER, Span, Value
from gpuproxy.types import TOOL_CALL, Attempt, Receipt, Trace

PREFIX = "/api/v1/gpu/proxy"
NAMED = {TOOL_CALL: "gen_ai.tool.name", "prompts/get": "gen_ai.prompt.name"}
FAILED = ("upstream_failed", "cut")
SAMPLED, KNOWS_REMOTE, IS_REMOTE = 0x01, 0x100, 0x200  # SpanFlags of OTLP


def spans_of(receipt: Receipt) -> Iterator[Span]:
    """Yield the spans of a call; none if nobody wants them."""
    trace = receipt.trace
    if trace is None:
        return
    trace_id = bytes.fromhex(receipt.trace_id)
    yield Span(
        trace_id,
        trace.span_id,
        int(trace.parent_id or "0", 16),
        f"{receipt.method} {_route(receipt, trace)}",
        SERVER,
        receipt.started_ns,
        receipt.started_ns + receipt.duration_us * 1_000,
        _call_attributes(receipt, trace),
        receipt.status >= 500 or receipt.outcome in FAILED,
        SAMPLED | KNOWS_REMOTE | (IS_REMOTE if trace.parent_id else 0),
    )
    for at, attempt in enumerate(trace.attempts):
        attributes = _attempt_attributes(receipt, trace, attempt, at)
        start_ns = receipt.started_ns + attempt.began_us * 1_000
        yield Span(
            trace_id,
            trace.span_id + at + 1,
            trace.span_id,
            _attempt_name(receipt, trace),
            CLIENT,
            start_ns,
            start_ns + attempt.duration_us * 1_000,
            attributes,
            "error.type" in attributes,
            SAMPLED | KNOWS_REMOTE,
        )


def _route(receipt: Receipt, trace: Trace) -> str:
    """Return the path as far as few calls differ in it: backends group spans by name."""
    path = receipt.path
    if trace.operation or not path.startswith(PREFIX + "/"):
        return path
    return PREFIX + "/" + path[len(PREFIX) + 1 :].partition("/")[0]


def _call_attributes(receipt: Receipt, trace: Trace) -> dict[str, Value]:
    found: dict[str, Value] = {
        "http.request.method": receipt.method,
        "http.route": _route(receipt, trace),
        "url.path": receipt.path,
        "url.scheme": "http",
        "http.request.body.size": receipt.request_bytes,
        "http.response.body.size": receipt.response_bytes,
        "gpuproxy.request_id": receipt.request_id,
        "gpuproxy.outcome": receipt.outcome,
        "gpuproxy.attempts": receipt.attempts,
    }
    told: dict[str, Value] = {
        "http.response.status_code": receipt.status,
        "error.type": receipt.error or (str(receipt.status) if receipt.status >= 500 else ""),
        "user.id": receipt.user_id,
        "gpuproxy.key_id": receipt.key_id,
        "gpuproxy.protocol": receipt.protocol,
        "gpuproxy.upstream": receipt.upstream,
        "gpuproxy.model": receipt.model,
    }
    found.update({name: value for name, value in told.items() if value})
    return found


def _attempt_name(receipt: Receipt, trace: Trace) -> str:
    if receipt.rpc_method:
        return f"{receipt.rpc_method} {receipt.rpc_name}" if receipt.rpc_method in NAMED else receipt.rpc_method
    return f"{trace.operation} {receipt.model}" if trace.operation else receipt.method


def _attempt_attributes(receipt: Receipt, trace: Trace, attempt: Attempt, at: int) -> dict[str, Value]:
    is_last = at == len(trace.attempts) - 1
    found: dict[str, Value] = {
        "http.request.method": receipt.method,
        "server.address": attempt.address,
        "server.port": attempt.port,
    }
    told: dict[str, Value] = {
        "http.request.resend_count": at,
        "http.response.status_code": attempt.status,
        "error.type": _error_of(receipt, attempt, is_last),
        "gen_ai.operation.name": trace.operation,
        "gen_ai.provider.name": receipt.upstream if trace.operation else "",
        "gen_ai.request.model": receipt.model,
    }
    found.update({name: value for name, value in told.items() if value})
    if receipt.rpc_method:
        found.update(_rpc_attributes(receipt))
    if is_last:
        found.update(_answer_attributes(receipt, trace, attempt))
    return found


def _rpc_attributes(receipt: Receipt) -> dict[str, Value]:
    method, name = receipt.rpc_method, receipt.rpc_name
    found: dict[str, Value] = {"mcp.method.name": method}
    if method == TOOL_CALL:
        found["gen_ai.operation.name"] = "execute_tool"
    if method in NAMED:
        found[NAMED[method]] = name
    return found


def _error_of(receipt: Receipt, attempt: Attempt, is_last: bool) -> str:
    if not is_last or attempt.error:
        return attempt.error
    if receipt.outcome in FAILED and receipt.error:
        return receipt.error
    if receipt.rpc_outcome not in ("", "ok", "input_required"):
        return receipt.rpc_outcome.partition(":")[2] or receipt.rpc_outcome
    return str(attempt.status) if attempt.status >= 400 else ""


def _answer_attributes(receipt: Receipt, trace: Trace, attempt: Attempt) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if code := receipt.rpc_outcome.partition(":")[2]:
        found["rpc.response.status_code"] = code
    if receipt.model and receipt.is_stream:
        found["gen_ai.request.stream"] = True
        if receipt.first_byte_us >= attempt.began_us:
            found["gen_ai.response.time_to_first_chunk"] = (receipt.first_byte_us - attempt.began_us) / 1e6
    if trace.response_model:
        found["gen_ai.response.model"] = trace.response_model
    if receipt.usage_source == "provider":
        found["gen_ai.usage.input_tokens"] = receipt.input_tokens
        found["gen_ai.usage.output_tokens"] = receipt.output_tokens
        if receipt.cached_tokens > 0:
            found["gen_ai.usage.cache_read.input_tokens"] = receipt.cached_tokens
    return found
