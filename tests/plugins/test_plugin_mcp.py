"""Protocol "mcp": transparent by server name; envelopes completed, never overridden, and collapsed."""

import json
from typing import Any

import pytest
from gpuproxy_plugins.mcp import RPC_CODES, Mcp
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.inbound import InboundModernRoute, classify_inbound_request, decode_header_value

from gpuproxy.codec.mcp import mirrored_name
from gpuproxy.plugin import CODES, Call, GatewayError, HeaderList, Intent, UpstreamRequest

MCP = Mcp()
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"


def envelope(body: object, *headers: tuple[bytes, bytes], path: bytes = b"/mcp") -> Call:
    return Call(b"POST", path, list(headers), json.dumps(body).encode(), is_envelope=True)


def sent(call: Call) -> tuple[Any, dict[str, str]]:
    """Return the message and the headers (lower case) the upstream gets."""
    request = MCP.prepare(call, Intent())
    headers: HeaderList = [*call.headers, *request.headers]
    body = call.body if request.body is None else request.body
    return json.loads(body or b"null"), {name.decode().lower(): value.decode() for name, value in headers}


@pytest.mark.parametrize(
    ("path", "server", "rest"),
    [
        (b"/mcp/tools", "tools", b""),
        (b"/mcp/tools/", "tools", b""),
        (b"/mcp/tools?a=%2F", "tools", b"?a=%2F"),
        (b"/mcp/tools/messages/?session_id=1", "tools", b"/messages/?session_id=1"),
        (b"/mcp/a%2Eb/x%20y", "a.b", b"/x%20y"),
    ],
)
def test_the_path_names_the_server_and_what_is_below_it(path: bytes, server: str, rest: bytes) -> None:
    intent = MCP.inspect(Call(b"POST", path, []))
    assert (intent.upstream, intent.path, intent.is_stream) == (server, rest, False)


@pytest.mark.parametrize("path", [b"/mcp", b"/mcp/", b"/mcp?x"])
def test_a_path_without_a_server_is_refused(path: bytes) -> None:
    with pytest.raises(GatewayError, match=r"/mcp/\{server\}") as refused:
        MCP.inspect(Call(b"POST", path, []))
    assert refused.value.code == "NOT_FOUND"


def test_a_transparent_call_is_left_alone() -> None:
    call = Call(b"POST", b"/mcp/tools", [], None)
    assert MCP.prepare(call, Intent()) == UpstreamRequest()


def test_the_bare_message_becomes_a_request_that_the_official_server_side_accepts() -> None:
    params = {"model": "llama-2", "prompt": "Hello, world!", "max_tokens": 100}
    message, headers = sent(envelope({"method": "inference", "params": params}))
    assert message["jsonrpc"] == "2.0"
    assert message["params"]["model"] == "llama-2"
    assert headers["accept"] == "application/json, text/event-stream"
    assert headers["content-type"] == "application/json"
    assert headers["mcp-method"] == "inference"
    assert isinstance(classify_inbound_request(message, headers=headers), InboundModernRoute)


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("tools/call", {"name": "add", "arguments": {"a": 1}}, "add"),
        ("prompts/get", {"name": " edge "}, " edge "),
        ("resources/read", {"uri": "file:///smörgås"}, "file:///smörgås"),
    ],
)
def test_the_name_is_mirrored_so_that_it_survives_a_header(method: str, params: object, name: str) -> None:
    message, headers = sent(envelope({"method": method, "params": params}))
    assert headers["mcp-name"].isascii()
    assert decode_header_value(headers["mcp-name"]) == name
    assert isinstance(classify_inbound_request(message, headers=headers), InboundModernRoute)


def test_a_request_without_params_gets_them_for_its_meta() -> None:
    message, headers = sent(envelope({"method": "tools/list"}))
    assert list(message["params"]) == ["_meta"]
    assert isinstance(classify_inbound_request(message, headers=headers), InboundModernRoute)


def test_ids_are_unique_strings() -> None:
    ids = [sent(envelope({"method": "tools/list"}))[0]["id"] for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(isinstance(one, str) for one in ids)


@pytest.mark.parametrize("given_id", [0, "", "a", 7, None])
def test_an_id_that_is_there_is_never_touched(given_id: object) -> None:
    assert sent(envelope({"id": given_id, "method": "tools/list"}))[0]["id"] == given_id


def test_a_notification_gets_no_id() -> None:
    assert "id" not in sent(envelope({"method": "notifications/cancelled"}))[0]


@pytest.mark.parametrize(
    "header",
    [(b"Mcp-Session-Id", b"s1"), (b"MCP-Protocol-Version", b"2025-11-25")],
    ids=["session", "version"],
)
def test_a_caller_of_an_older_revision_gets_only_what_json_rpc_needs(header: tuple[bytes, bytes]) -> None:
    message, headers = sent(envelope({"method": "tools/list", "params": {}}, header))
    assert message.keys() == {"jsonrpc", "id", "method", "params"}
    assert message["params"] == {}
    assert "mcp-method" not in headers


def test_the_handshake_is_never_made_modern() -> None:
    message, headers = sent(envelope({"id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25"}}))
    assert "_meta" not in message["params"]
    assert "mcp-protocol-version" not in headers


def test_meta_that_is_there_is_kept_and_mirrored() -> None:
    meta = {VERSION_KEY: "2027-01-01", "traceparent": "00-1"}
    message, headers = sent(envelope({"method": "tools/list", "params": {"_meta": meta}}))
    assert message["params"]["_meta"].items() >= meta.items()
    assert headers["mcp-protocol-version"] == "2027-01-01"


@pytest.mark.parametrize(
    "body",
    [
        [{"method": "ping"}],
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "id": 1, "method": "x", "error": {"code": 1, "message": ""}},
        {"method": 5},
        {},
        "text",
    ],
)
def test_what_is_no_request_is_sent_as_it_is(body: object) -> None:
    assert MCP.prepare(envelope(body), Intent()).body is None


@pytest.mark.parametrize("params", [[1, 2], None, {"_meta": 5}])
def test_params_of_another_shape_are_left_to_the_server(params: object) -> None:
    message, headers = sent(envelope({"method": "x", "params": params}))
    assert message["params"] == params
    assert "mcp-method" not in headers


def test_numbers_keep_their_digits() -> None:
    body = b'{"method":"x","params":{"n":12345678901234567890123.10}}'
    call = Call(b"POST", b"/mcp", [], body, is_envelope=True)
    assert b"12345678901234567890123.10" in (MCP.prepare(call, Intent()).body or b"")


def test_headers_of_the_caller_win() -> None:
    call = envelope(
        {"method": "a"}, (b"accept", b"*/*"), (b"content-type", b"application/json; x"), (b"mcp-method", b"a")
    )
    assert [name for name, _ in MCP.prepare(call, Intent()).headers] == [b"MCP-Protocol-Version"]


@pytest.mark.parametrize(("path", "target"), [(b"", b"/mcp"), (b"?k=1", b"/mcp?k=1"), (b"/", None), (b"/x", None)])
def test_only_a_target_without_path_gets_the_default(path: bytes, target: bytes | None) -> None:
    assert MCP.prepare(envelope({"method": "x"}, path=path), Intent()).path == target


@given(value=st.text(max_size=40))
def test_any_value_survives_as_a_header(value: str) -> None:
    assert decode_header_value(mirrored_name(value)) == value
    assert mirrored_name(value).isascii()
    assert mirrored_name(value).isprintable()


def test_a_stream_collapses_to_its_response() -> None:
    stream = (
        b": hi\r\n\r\nid: 1\r\ndata:\r\n\r\n"
        b'event: message\r\ndata: {"jsonrpc":"2.0","method":"notifications/progress","params":{}}\r\n\r\n'
        b'event: message\r\ndata: {"jsonrpc":"2.0","id":9,"method":"sampling/createMessage"}\r\n\r\n'
        b'event: message\r\nid: 2\r\ndata: {"jsonrpc":"2.0","id":"x",\r\ndata: "result":{"ok":true}}\r\n\r\n'
    )
    kind, body = MCP.collapse(envelope({}), b"text/event-stream; charset=utf-8", stream)
    assert kind == b"application/json"
    assert json.loads(body) == {"jsonrpc": "2.0", "id": "x", "result": {"ok": True}}


@pytest.mark.parametrize(
    "answer",
    [
        (b"application/json", b'{"result":1}'),
        (b"text/event-stream", b": nothing yet\n\n"),
        (b"text/event-stream", b"data: not json\n\n"),
    ],
)
def test_an_answer_without_a_stream_or_response_stays(answer: tuple[bytes, bytes]) -> None:
    assert MCP.collapse(envelope({}), *answer) == answer


def test_errors_are_json_rpc_errors() -> None:
    told = json.loads(MCP.refuse(b"/mcp/tools", GatewayError("UNAUTHORIZED", "no key"), "r1"))
    assert told == {
        "jsonrpc": "2.0",
        "id": None,
        "error": {"code": -32061, "message": "no key", "data": {"code": "UNAUTHORIZED", "request_id": "r1"}},
    }


def test_no_error_of_ours_takes_a_code_of_mcp() -> None:
    assert set(RPC_CODES) <= set(CODES)
    assert not {-32000, -32001, -32002, -32020, -32021, -32022, -32042} & set(RPC_CODES.values())
