"""Protocol "openinference": where calls go, what envelopes become, and errors in three dialects."""

import json
import tracemalloc

import pytest
from gpuproxy_plugins.openinference import OpenInference

from gpuproxy.plugin import Call, GatewayError, Intent, UpstreamRequest

OPEN = OpenInference()
CHAT = b"/v1/chat/completions"
FORM = b"multipart/form-data; boundary=b0"


def post(body: bytes, *headers: tuple[bytes, bytes], path: bytes = CHAT) -> Call:
    return Call(b"POST", path, list(headers), body)


def refusal(call: Call) -> GatewayError:
    with pytest.raises(GatewayError) as refused:
        OPEN.inspect(call)
    return refused.value


def envelope(body: object, *headers: tuple[bytes, bytes], path: bytes = b"", method: bytes = b"POST") -> Call:
    return Call(method, path, list(headers), json.dumps(body).encode(), is_envelope=True)


@pytest.mark.parametrize(
    ("method", "path", "needs"),
    [
        (b"POST", CHAT, True),
        (b"POST", b"/v1/audio/transcriptions", True),
        (b"POST", b"/v1/messages?beta=true", True),
        (b"GET", b"/v1/models", False),
        (b"POST", b"/v2/models/m/infer", False),
        (b"POST", b"/openai/v1/chat/completions?x=1", True),
        (b"POST", b"/api/chat", True),
        (b"POST", b"/api/blobs/sha256:1", False),
        (b"GET", b"/v2/health/live", False),
    ],
)
def test_only_what_names_its_model_in_the_body_is_read_whole(method: bytes, path: bytes, needs: bool) -> None:
    assert OPEN.needs_body(method, path) is needs


@pytest.mark.parametrize(
    ("body", "intent"),
    [
        (b'{"model":"m"}', Intent("m")),
        (b' {"messages":[{"role":"user"}],"stream":true,"model":"a/b"} ', Intent("a/b", is_stream=True)),
        (b'{"model":"m","stream":false}', Intent("m")),
        (b'{"model":"m","stream":null}', Intent("m")),
        (b'{"model":"m","stream":"odd"}', Intent("m")),
        (b'{"model":"m","stream":"True"}', Intent("m", is_stream=True)),
        (b'{"model":"m","stream":"1"}', Intent("m", is_stream=True)),
        (b'{"model":"m","stream":1.0}', Intent("m", is_stream=True)),
        (b'{"model":"m","stream":0}', Intent("m")),
        (b'{"model":"m","stream":"off"}', Intent("m")),
        (b'{"model":"m","stream":[1]}', Intent("m")),
        (b'{"model":"a","model":"m"}', Intent("m")),
        ('{"model":"größe"}'.encode(), Intent("größe")),
    ],
)
def test_the_body_names_model_and_stream(body: bytes, intent: Intent) -> None:
    assert OPEN.inspect(post(body)) == intent


@pytest.mark.parametrize(
    ("fields", "most", "count"),
    [
        ({}, 0, 1),
        ({"max_tokens": 5}, 5, 1),
        ({"max_completion_tokens": 6}, 6, 1),
        ({"max_output_tokens": 7}, 7, 1),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6, 1),
        ({"max_tokens": None, "n": None}, 0, 1),
        ({"max_tokens": "odd", "n": [2]}, 0, 1),
        ({"max_tokens": True, "n": True}, 0, 1),
        ({"max_tokens": -5, "n": -5}, 0, 1),
        ({"max_tokens": 5, "n": 3}, 5, 3),
        ({"prompt": "one"}, 0, 1),
        ({"prompt": ["one", "two"]}, 0, 2),
        ({"prompt": [1, 2, 3]}, 0, 1),
        ({"prompt": [[1, 2], [3]], "n": 2}, 0, 4),
        ({"prompt": []}, 0, 1),
    ],
)
def test_the_body_bounds_its_answer(fields: dict[str, object], most: int, count: int) -> None:
    intent = OPEN.inspect(post(json.dumps({"model": "m", **fields}).encode()))
    assert intent == Intent("m", max_output_tokens=most, choice_count=count)


@pytest.mark.parametrize(
    ("body", "position"),
    [
        (b'{"model": tru}', "(byte 14)"),
        (b'{"model":"m"', "(byte 12)"),
        (b'{"model":"m"} x', "(byte 15)"),
        (b"", "(byte 0)"),
        (b'{"model":"\xff"}', "(byte "),
    ],
)
def test_invalid_json_is_refused_with_its_position(body: bytes, position: str) -> None:
    error = refusal(post(body))
    assert error.code == "INVALID_JSON"
    assert position in error.message


def test_json_that_is_no_object_is_refused() -> None:
    error = refusal(post(b"[1]"))
    assert (error.code, "Expected `object`" in error.message) == ("INVALID_JSON", True)


@pytest.mark.parametrize("opener", [b"[", b'{"a":'])
def test_deep_nesting_is_invalid_json_and_nothing_worse(opener: bytes) -> None:
    error = refusal(post(b'{"model":"m","x":' + opener * 100_000))
    assert (error.code, "nested too deeply" in error.message) == ("INVALID_JSON", True)


@pytest.mark.parametrize(
    "body", [b"{}", b'{"model":""}', b'{"model":null}', b'{"model":5}', b'{"model":"%s"}' % (b"x" * 300)]
)
def test_a_missing_or_impossible_model_is_named(body: bytes) -> None:
    error = refusal(post(body))
    assert (error.code, error.param) == ("BAD_REQUEST", "model")
    assert "model" in error.message


def test_what_is_done_later_is_known() -> None:
    later = Intent("m", is_deferred=True)
    assert OPEN.inspect(post(b'{"model":"m","background":true}', path=b"/v1/responses")) == later
    assert OPEN.inspect(post(b'{"model":"m","background":false}', path=b"/v1/responses")) == Intent("m")
    assert OPEN.describe(post(b'{"requests":[]}', path=b"/v1/messages/batches/?x")) == Intent(is_deferred=True)


@pytest.mark.parametrize("key", ["Model", "MODEL", "mOdEl", "\\u004dodel"])
def test_no_other_spelling_hides_a_model(key: str) -> None:
    body = f'{{"model":"cheap","{key}":"dear"}}'.encode()
    error = refusal(post(body))
    assert (error.code, error.param, "capitals" in error.message) == ("BAD_REQUEST", "model", True)
    assert OPEN.describe(post(body, path=b"/api/chat")) == Intent()
    assert OPEN.inspect(post(b'{"model":"m","x":{"%b":"y"}}' % key.encode())) == Intent("m")


def test_a_compressed_body_is_refused_with_the_remedy() -> None:
    error = refusal(post(b"\x1f\x8b\x08", (b"Content-Encoding", b"gzip")))
    assert (error.code, "uncompressed" in error.message) == ("BAD_REQUEST", True)


def test_a_form_names_its_model_behind_the_file() -> None:
    body = (
        b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\xff\r\n'
        b'--b0\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--b0\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n--b0--\r\n'
    )
    call = post(body, (b"content-type", FORM), path=b"/v1/audio/transcriptions")
    assert OPEN.inspect(call) == Intent("whisper-1", is_stream=True)


@pytest.mark.parametrize("body", [b"--b0--\r\n", b"--b0\r\n", b"junk"])
def test_a_form_without_model_is_refused(body: bytes) -> None:
    error = refusal(post(body, (b"Content-Type", FORM)))
    assert (error.code, error.param) == ("BAD_REQUEST", "model")


@pytest.mark.parametrize(
    ("method", "path", "intent"),
    [
        (b"GET", b"/v1/models", Intent()),
        (b"GET", b"/v1/models?limit=1", Intent()),
        (b"GET", b"/v1/models/meta%2Fllama", Intent()),  # answered by the gateway
        (b"DELETE", b"/v1/models/meta%2Fllama", Intent("meta/llama")),
        (b"DELETE", b"/v1/models/meta/llama", Intent("meta/llama")),
        (b"GET", b"/v1/realtime?model=rt-1", Intent("rt-1", is_stream=True)),
        (b"GET", b"/v1/realtime?x=1&deployment=rt-1", Intent("rt-1", is_stream=True)),
        (b"GET", b"/v2", Intent()),
        (b"GET", b"/v2/health/ready", Intent()),
        (b"GET", b"/v2/models", Intent()),
        (b"GET", b"/v2/models/m%20x/ready", Intent("m x")),
        (b"POST", b"/v2/models/m/infer?x=/..", Intent("m")),
        (b"POST", b"/v2/models/m/versions/1/infer", Intent("m")),
        (b"POST", b"/v2/models/m/generate_stream", Intent("m", is_stream=True)),
        (b"POST", b"/v2/repository/models/m/load", Intent("m")),
    ],
)
def test_the_path_names_the_model_or_any_upstream_will_do(method: bytes, path: bytes, intent: Intent) -> None:
    assert OPEN.inspect(Call(method, path, [], None)) == intent


@pytest.mark.parametrize(
    "path",
    [
        b"/v2/models/cheap/../dear/infer",
        b"/v2/models/cheap/%2e%2E/dear/infer",
        b"/v2/models/cheap/..;/dear/infer",
        b"/v2/models/cheap/..%2fdear/infer",
        b"/v2/models/cheap/x\\..\\..\\dear/infer",
        b"/v2/models/cheap/x%5c..%5C..%5cdear/infer",
        b"/v1/./models",
        b"/v2/models//infer",
        b"/v1/realtime?model=a&model=b",
        b"/v1/realtime?model=a&deployment=b",
    ],
)
def test_a_path_that_hides_its_model_is_refused(path: bytes) -> None:
    assert refusal(Call(b"GET", path, [], None)).code == "BAD_REQUEST"


def test_a_dot_segment_is_refused_with_a_body_too() -> None:
    assert refusal(post(b'{"model":"cheap"}', path=b"/v1/../v2/models/dear/infer")).code == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("method", "path", "identity"),
    [
        (b"POST", CHAT, True),
        (b"POST", b"/openai/v1/embeddings?x=1", True),
        (b"POST", b"/v2/models/m/generate", True),
        (b"POST", b"/v2/models/m/infer?x", False),
        (b"POST", b"/v1/responses/resp_1/cancel", False),
        (b"POST", b"/v1/chat/completions/c_1?x", False),
        (b"GET", b"/v1/models", False),
    ],
)
def test_only_answers_that_may_tell_usage_are_asked_for_uncompressed(
    method: bytes, path: bytes, identity: bool
) -> None:
    assert OPEN.prepare(Call(method, path, [], None), Intent()) == UpstreamRequest(identity=identity)


MESSAGES = [{"role": "user", "content": "Hello!"}]
TENSORS = [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]
SHAPES = [
    ({"model": "m", "messages": MESSAGES}, b"/v1/chat/completions"),
    ({"model": "m", "messages": MESSAGES, "system": "x"}, b"/v1/messages"),
    ({"model": "m", "messages": MESSAGES, "anthropic_version": "x"}, b"/v1/messages"),
    ({"model": "m", "input": "x", "instructions": "y"}, b"/v1/responses"),
    ({"model": "m", "input": "x", "dimensions": 8}, b"/v1/embeddings"),
    ({"model": "m", "input": ["x"], "encoding_format": "float"}, b"/v1/embeddings"),
    ({"model": "m", "input": "x"}, b"/v1/responses"),
    ({"model": "m", "prompt": "x"}, b"/v1/completions"),
    ({"model": "m", "messages": MESSAGES, "options": {"num_ctx": 8}}, b"/api/chat"),
    ({"model": "m", "messages": MESSAGES, "stream": False, "keep_alive": "5m"}, b"/api/chat"),
    ({"model": "m", "prompt": "x", "raw": True}, b"/api/generate"),
    ({"model": "a/b", "inputs": TENSORS}, b"/v2/models/a%2Fb/infer"),
    ({"model_name": "m", "text_input": "x"}, b"/v2/models/m/generate"),
    ({"model": "m", "text_input": "x", "stream": True}, b"/v2/models/m/generate_stream"),
    ({"inputs": "x", "parameters": {}}, b"/generate"),
    ({"inputs": "x", "stream": True}, b"/generate_stream"),
]


@pytest.mark.parametrize(("body", "path"), SHAPES, ids=lambda value: str(value)[:40])
def test_the_shape_of_the_body_chooses_the_path(body: object, path: bytes) -> None:
    request = OPEN.prepare(envelope(body), Intent())
    assert (request.path, request.body) == (path, None)
    assert request.headers == [(b"Content-Type", b"application/json")]


def test_anthropics_header_chooses_its_path() -> None:
    call = envelope({"messages": MESSAGES}, (b"Anthropic-Version", b"2023-06-01"), path=b"/?x=1")
    assert OPEN.prepare(call, Intent()).path == b"/v1/messages?x=1"


@pytest.mark.parametrize(
    ("base", "body", "path"),
    [
        (b"/v1", {"messages": MESSAGES}, b"/v1/chat/completions"),
        (b"/openai/v1/", {"prompt": "x"}, b"/openai/v1/completions"),
        (b"/v1?k=1", {"messages": MESSAGES}, b"/v1/chat/completions?k=1"),
        (b"/v1", {"model": "m", "text_input": "x"}, None),
        (b"/v1", {}, None),
        (b"/other", {"messages": MESSAGES}, None),
        (b"/v1/messages", {"messages": MESSAGES}, None),
    ],
)
def test_a_base_ending_in_v1_is_completed_and_any_other_path_kept(
    base: bytes, body: object, path: bytes | None
) -> None:
    assert OPEN.prepare(envelope(body, path=base), Intent()).path == path


@pytest.mark.parametrize("body", [{}, {"x": 1}, [1], "text", {"model": 5, "text_input": "x"}])
def test_a_body_of_no_known_shape_is_refused_when_the_target_has_no_path(body: object) -> None:
    with pytest.raises(GatewayError) as refused:
        OPEN.prepare(envelope(body), Intent())
    assert refused.value.code == "BAD_REQUEST"


def test_an_envelope_without_body_keeps_its_path() -> None:
    assert OPEN.prepare(Call(b"GET", b"", [], None, is_envelope=True), Intent()) == UpstreamRequest()


@pytest.mark.parametrize(
    ("path", "body", "intent"),
    [
        (CHAT, b'{"model":"m","stream":true}', Intent("m", is_stream=True)),
        (b"/kserve/v2/models/m/generate_stream", None, Intent("m", is_stream=True)),
        (b"", b'{"model_name":"m"}', Intent("m")),
        (CHAT, b'{"model":5}', Intent()),
        (CHAT, b"junk", Intent()),
        (b"/api/chat", b'{"model":"m","messages":[]}', Intent("m", is_stream=True)),
        (b"/api/generate?x", b'{"model":"m","stream":false}', Intent("m")),
        (b"/api/embed", b'{"model":"m"}', Intent("m")),
        (b"/api/chat", b'{"model":"m","options":{"num_predict":9}}', Intent("m", is_stream=True, max_output_tokens=9)),
        (b"/generate_stream", b'{"parameters":{"max_new_tokens":9}}', Intent(is_stream=True, max_output_tokens=9)),
        (b"/generate", b'{"parameters":{"max_new_tokens":"9"},"options":[1]}', Intent()),
        (b"/generate_stream?x", None, Intent(is_stream=True)),
        (b"/openai/deployments/a%2Db/chat/completions?api-version=1", b'{"model":"cheap"}', Intent("a-b")),
        (b"/openai/deployments/a", None, Intent("a")),
        (CHAT, None, Intent()),
    ],
)
def test_a_call_that_is_routed_already_is_described_as_far_as_it_tells(
    path: bytes, body: bytes | None, intent: Intent
) -> None:
    assert OPEN.describe(Call(b"POST", path, [], body)) == intent


def test_a_form_that_is_routed_already_is_described_too() -> None:
    body = b'--b0\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b0--\r\n'
    headers = [(b"Content-Type", FORM)]
    assert OPEN.describe(Call(b"POST", b"/v1/audio/transcriptions", headers, body)) == Intent("whisper-1")
    assert OPEN.describe(Call(b"POST", b"/v1/audio/transcriptions", headers, b"--b0--\r\n")) == Intent()


def told(path: bytes, code: str, param: str | None = None) -> dict[str, object]:
    answer = json.loads(OPEN.refuse(path, GatewayError(code, "why", param=param), "r1"))
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        ("UNAUTHORIZED", "invalid_request_error", "invalid_api_key"),
        ("UNKNOWN_MODEL", "invalid_request_error", "model_not_found"),
        ("INSUFFICIENT_CREDITS", "insufficient_quota", "insufficient_quota"),
        ("RATE_LIMITED", "rate_limit_error", "rate_limit_exceeded"),
        ("BAD_REQUEST", "invalid_request_error", "BAD_REQUEST"),
        ("UPSTREAM_TIMEOUT", "server_error", "UPSTREAM_TIMEOUT"),
    ],
)
def test_v1_speaks_openai(code: str, kind: str, name: str) -> None:
    param = "model" if code == "UNKNOWN_MODEL" else None
    assert told(CHAT, code) == {"error": {"message": "why", "type": kind, "param": param, "code": name}}


def test_the_field_at_fault_is_named() -> None:
    assert told(CHAT, "BAD_REQUEST", "model")["error"] == {
        "message": "why",
        "type": "invalid_request_error",
        "param": "model",
        "code": "BAD_REQUEST",
    }


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAUTHORIZED", "authentication_error"),
        ("INSUFFICIENT_CREDITS", "billing_error"),
        ("FORBIDDEN", "permission_error"),
        ("UNKNOWN_MODEL", "not_found_error"),
        ("BODY_TOO_LARGE", "request_too_large"),
        ("RATE_LIMITED", "rate_limit_error"),
        ("INVALID_JSON", "invalid_request_error"),
        ("INTERNAL", "api_error"),
        ("UPSTREAM_UNREACHABLE", "api_error"),
        ("UPSTREAM_BUSY", "overloaded_error"),
        ("UPSTREAM_TIMEOUT", "timeout_error"),
    ],
)
@pytest.mark.parametrize("path", [b"/v1/messages", b"/v1/messages?beta=true", b"/v1/messages/count_tokens"])
def test_messages_speaks_anthropic(path: bytes, code: str, kind: str) -> None:
    detail = {"type": kind, "message": "why", "code": code}
    assert told(path, code) == {"type": "error", "error": detail, "request_id": "r1"}


@pytest.mark.parametrize(
    "path",
    [
        b"/v2",
        b"/v2/models/m/infer",
        b"/x/v2/health/live?y",
        b"/api/chat",
        b"/ollama/api/tags?x",
        b"/generate",
        b"/tgi/generate_stream?x",
    ],
)
def test_v2_and_native_routes_tell_a_text(path: bytes) -> None:
    assert told(path, "UNKNOWN_MODEL") == {"error": "why", "code": "UNKNOWN_MODEL", "request_id": "r1"}


def test_long_paths_do_not_fill_the_memory() -> None:
    tracemalloc.start()
    try:
        for number in range(1_100):
            path = b"/v1/x?%d" % number + b"y" * 60_000
            OPEN.needs_body(b"POST", path)
            OPEN.inspect(Call(b"POST", path, [], b'{"model":"m"}'))
        assert tracemalloc.get_traced_memory()[0] < 20 << 20
    finally:
        tracemalloc.stop()
