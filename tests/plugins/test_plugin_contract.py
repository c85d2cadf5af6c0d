"""The suite every protocol plugin passes: those found by entry point, and one written outside the package."""

import json
from importlib.metadata import EntryPoint, entry_points

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.codec.seal import Seal
from gpuproxy.errors import CODES
from gpuproxy.plugin import (
    GROUP,
    Attached,
    Call,
    GatewayError,
    Intent,
    PluginError,
    ProtocolHandler,
    Registry,
    Station,
    UpstreamRequest,
    load_plugins,
)

FOURTH = EntryPoint(name="fourth", value="fourth_plugin", group=GROUP)
FOUND = (*entry_points(group=GROUP), FOURTH)
HANDLERS = list(load_plugins([point.name for point in FOUND], FOUND).protocols.values())
for each in HANDLERS:  # as a worker that has its secrets does
    if isinstance(each, Attached):
        each.attach(Station(Seal((bytes(32),))))

CONTENT_TYPES = (
    b"application/json",
    b"application/json; charset=utf-8",
    b"text/event-stream",
    b"application/x-ndjson",
    b"application/octet-stream",
    b"",
)
PATHS = (
    b"",
    b"/",
    b"?x",
    b"/v1",
    b"/v1/chat/completions",
    b"/v1/messages?beta=true",
    b"/v1/models/a%2Fb",
    b"/v1/realtime?model=m",
    b"/v2",
    b"/v2/health/live",
    b"/v2/models",
    b"/v2/models/m/infer",
    b"/v2/models//infer",
    b"/v2/repository/models/m/load",
    b"/mcp",
    b"/mcp/",
    b"/mcp/tools",
    b"/mcp/tools/x?y=z",
    b"/named/x",
)
FRAGMENTS = (
    b'{"model":"m","stream":true}',
    b'"usage":',
    b'{"usage":{"prompt_tokens":1}}',
    b'data: {"usage":{"input_tokens":',
    b"\n\n",
    b"\r\n\r\n",
    b"\r",
    b'{"method":"tools/call","params":{"name":"x"}}',
    b'{"jsonrpc":"2.0","id":1,"result":{}}',
    b"[" * 2_000,
    b'{"messages":' * 2_000,
    b"--b\r\n",
    b'Content-Disposition: form-data; name="model"\r\n\r\n',
    b"\xff\xfe",
)

arbitrary = st.one_of(
    st.binary(max_size=300),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=20)), max_size=8).map(b"".join),
)
headers = st.lists(
    st.sampled_from(
        [
            (b"Content-Type", b"application/json"),
            (b"content-type", b"multipart/form-data; boundary=b"),
            (b"Content-Type", b'multipart/form-data; boundary="'),
            (b"content-encoding", b"gzip"),
            (b"anthropic-version", b"2023-06-01"),
            (b"mcp-protocol-version", b"2025-11-25"),
            (b"X-Upstream", b"\xff"),
        ]
    ),
    max_size=4,
)
paths = st.one_of(st.sampled_from(PATHS), st.binary(max_size=60).map(lambda rest: b"/v2/models/" + rest))
calls = st.builds(
    Call,
    method=st.sampled_from([b"POST", b"GET", b"DELETE", b"HEAD"]),
    path=paths,
    headers=headers,
    body=st.one_of(st.none(), arbitrary),
    is_envelope=st.booleans(),
)


@pytest.fixture(params=HANDLERS, ids=lambda handler: handler.name)
def handler(request: pytest.FixtureRequest) -> ProtocolHandler:
    found = request.param
    assert isinstance(found, ProtocolHandler)
    return found


def test_the_three_protocols_and_a_fourth_are_found_by_entry_point() -> None:
    assert {handler.name for handler in HANDLERS} >= {"https", "mcp", "openinference", "named"}


def test_mounts_lead_to_their_handlers() -> None:
    registry = load_plugins([point.name for point in FOUND], FOUND)
    mounts = {mount: handler.name for mount, handler in registry.mounts.items()}
    assert mounts == {"v1": "openinference", "v2": "openinference", "mcp": "mcp", "named": "named"}


def test_a_second_handler_of_one_name_stops_the_start() -> None:
    with pytest.raises(PluginError, match="'https' is registered already"):
        load_plugins(["https", "again"], [*FOUND, EntryPoint("again", "gpuproxy_plugins.https", GROUP)])


def test_a_half_made_handler_is_refused_with_what_it_lacks() -> None:
    class Half:
        name = "half"
        mounts = ()

    with pytest.raises(PluginError, match=r"'half'.*lacks collapse, describe"):
        Registry().run("half", lambda registry: registry.protocol(Half()))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", CODES)
def test_every_error_is_told_as_a_json_object_with_its_message(handler: ProtocolHandler, code: str) -> None:
    error = GatewayError(code, 'it is "wrong" \N{SNOWMAN}', param="x")
    for path in PATHS:
        told = json.loads(handler.refuse(path, error, "req-1"))
        assert isinstance(told, dict)
        assert error.message in told.values() or error.message in told["error"].values()


@settings(max_examples=150)
@given(call=calls)
def test_a_call_of_any_bytes_is_understood_or_refused(call: Call) -> None:
    for handler in HANDLERS:
        handler.needs_body(call.method, call.path)
        assert isinstance(handler.describe(call), Intent)
        for step in (handler.inspect, lambda call, handler=handler: handler.prepare(call, Intent())):
            try:
                assert isinstance(step(call), Intent | UpstreamRequest)
            except GatewayError as error:
                is_blamed_on_client = error.status < 500
                assert is_blamed_on_client, error.message  # noqa: PT017 - most calls raise nothing


@settings(max_examples=150)
@given(call=calls, chunks=st.lists(arbitrary, max_size=5))
def test_a_reader_takes_any_bytes(call: Call, chunks: list[bytes]) -> None:
    for handler in HANDLERS:
        for content_type in CONTENT_TYPES:
            reader = handler.reader(call, 200, content_type)
            if reader is None:
                continue
            for chunk in chunks:
                reader.feed(chunk)
            usage = reader.finish()
            assert usage is None or min(usage.input_tokens, usage.cached_tokens, usage.output_tokens) >= 0


@settings(max_examples=150)
@given(call=calls, content_type=st.sampled_from(CONTENT_TYPES), body=arbitrary)
def test_any_answer_can_be_collapsed(call: Call, content_type: bytes, body: bytes) -> None:
    for handler in HANDLERS:
        kind, kept = handler.collapse(call, content_type, body)
        assert isinstance(kind, bytes)
        assert isinstance(kept, bytes)


def test_an_error_answer_is_not_read_for_usage(handler: ProtocolHandler) -> None:
    call = Call(b"POST", b"/v1/chat/completions", [], b"{}")
    for content_type in CONTENT_TYPES:
        assert handler.reader(call, 400, content_type) is None
        assert handler.reader(call, 503, content_type) is None


def test_two_calls_do_not_share_what_a_plugin_adds(handler: ProtocolHandler) -> None:
    call = Call(b"POST", b"/v1/chat/completions", [], b"{}")
    first, second = handler.prepare(call, Intent()), handler.prepare(call, Intent())
    first.headers.append((b"X-Mark", b"1"))
    assert (b"X-Mark", b"1") not in second.headers
