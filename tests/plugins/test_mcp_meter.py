"""What an MCP call asks for and what became of it, whatever the revision, the form of the answer and its split."""

import base64
import json
from typing import Any

import pytest
from gpuproxy_plugins.mcp import Mcp
from gpuproxy_plugins.mcp_meter import (
    ANSWER_BYTES_MAX,
    BATCH,
    NAME_CHARACTERS_MAX,
    JsonOutcome,
    RpcError,
    StreamOutcome,
    asked_for,
    mirrored,
    outcome_at_end,
)
from hypothesis import example, given
from hypothesis import strategies as st

from gpuproxy.codec.mcp import HEADER_MISMATCH
from gpuproxy.plugin import Call, Intent

MCP = Mcp()
VERSION = (b"MCP-Protocol-Version", b"2026-07-28")
CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "search", "arguments": {"q": "x"}}}
OK = {"jsonrpc": "2.0", "id": 7, "result": {"content": [], "isError": False}}
TOOL_ERROR = {"jsonrpc": "2.0", "id": 7, "result": {"content": [{"type": "text", "text": "no"}], "isError": True}}
RPC_ERROR = {"jsonrpc": "2.0", "id": 7, "error": {"code": -32601, "message": "Method not found"}}
PROGRESS = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 1, "progress": 0.5}}
ASKED = {"jsonrpc": "2.0", "id": 7, "method": "sampling/createMessage", "params": {"messages": []}}


def posted(message: object, *headers: tuple[bytes, bytes]) -> Call:
    return Call(b"POST", b"/mcp/tools", list(headers), json.dumps(message).encode())


def intent_of(message: object) -> Intent:
    return MCP.inspect(posted(message))


@pytest.mark.parametrize(
    ("method", "params", "name", "tools"),
    [
        ("tools/call", {"name": "search"}, "search", ("search",)),
        ("prompts/get", {"name": "greet"}, "greet", ()),
        ("resources/read", {"uri": "file:///a?secret=1"}, "file:///a", ()),
        ("tools/list", {"cursor": "x"}, "", ()),
        ("ping", None, "", ()),
    ],
)
def test_the_body_says_what_is_asked_for(method: str, params: object, name: str, tools: tuple[str, ...]) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": method} | ({"params": params} if params else {})
    intent = intent_of(message)
    assert (intent.rpc_method, intent.rpc_name, intent.tools) == (method, name, tools)


def test_a_batch_names_all_it_calls() -> None:
    intent = intent_of([CALL, {**CALL, "id": 8, "params": {"name": "fetch"}}, PROGRESS])
    assert (intent.rpc_method, intent.rpc_name, intent.tools) == (BATCH, "search, fetch", ("search", "fetch"))


def test_names_in_receipts_are_bounded() -> None:
    intent = intent_of({**CALL, "method": "m" * 1000})
    assert len(intent.rpc_method) == 100
    intent = intent_of({**CALL, "params": {"name": "n" * 1000}})
    assert len(intent.rpc_name) == NAME_CHARACTERS_MAX


@pytest.mark.parametrize("body", [b"", b"[", b"{}x", b'"text"', b"[1]", b"\xff", b"[" * 100_000, b'{"method":1}'])
def test_what_is_no_message_is_passed_on_unread(body: bytes) -> None:
    assert MCP.inspect(Call(b"POST", b"/mcp/tools", [], body)).rpc_method == ""


def test_responses_of_clients_ask_for_nothing() -> None:
    call = posted({"jsonrpc": "2.0", "id": 1, "result": {}})
    assert MCP.inspect(call).rpc_method == ""
    assert MCP.reader(call, 200, b"application/json") is None


@pytest.mark.parametrize("version", [b"2026-07-28", b"2027-01-01"])
def test_headers_of_the_stateless_revision_spare_the_body(version: bytes) -> None:
    headers = [(b"mcp-protocol-version", version), (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"search")]
    assert MCP.needs_body(b"POST", b"/mcp/tools")
    assert MCP.spares_body(headers)
    intent = MCP.inspect(Call(b"POST", b"/mcp/tools", headers, None))
    assert (intent.rpc_method, intent.rpc_name, intent.tools) == ("tools/call", "search", ("search",))


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"search")],
        [(b"MCP-Protocol-Version", b"2025-11-25"), (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"search")],
        [(b"MCP-Protocol-Version", b"9"), (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"search")],
        [VERSION, (b"Mcp-Method", b"tools/call")],
        [VERSION, (b"Mcp-Name", b"search")],
        [VERSION, (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"a"), (b"Mcp-Name", b"search")],
        [VERSION, (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", b"=?base64?/w==?=")],
    ],
    ids=["no-version", "older", "no-date", "no-name", "no-method", "two-names", "no-utf8"],
)
def test_headers_are_not_believed_where_no_server_must_check_them(headers: list[tuple[bytes, bytes]]) -> None:
    assert mirrored(headers) is None
    assert not MCP.spares_body(headers)
    assert asked_for(Call(b"POST", b"/mcp/tools", headers, None)) is None


@given(st.text(min_size=1, max_size=50))
def test_a_name_is_decoded_as_the_revision_encodes_it(name: str) -> None:
    encoded = b"=?base64?" + base64.b64encode(name.encode()) + b"?="
    told = mirrored([VERSION, (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", encoded)])
    assert told is not None
    assert told.name == name


@pytest.mark.parametrize(
    ("method", "name"), [(b"tools/call", b"fetch"), (b"tools/list", b"search")], ids=["name", "method"]
)
def test_headers_that_belie_the_body_are_refused(method: bytes, name: bytes) -> None:
    call = posted(CALL, VERSION, (b"Mcp-Method", method), (b"Mcp-Name", name))
    with pytest.raises(RpcError) as refused:
        MCP.inspect(call)
    assert refused.value.status == 400
    told = json.loads(MCP.refuse(call.path, refused.value, "r1"))
    assert (told["id"], told["error"]["code"]) == (7, HEADER_MISMATCH)


def test_headers_that_agree_with_the_body_pass() -> None:
    name = b"=?base64?" + base64.b64encode(b"search") + b"?="
    assert MCP.inspect(posted(CALL, VERSION, (b"Mcp-Method", b"tools/call"), (b"Mcp-Name", name))).tools == ("search",)


def test_older_headers_are_left_to_the_server_and_the_body_counts() -> None:
    call = posted(CALL, (b"MCP-Protocol-Version", b"2025-11-25"), (b"Mcp-Method", b"ping"), (b"Mcp-Name", b"other"))
    assert MCP.inspect(call).rpc_name == "search"


# -- what became of it ------------------------------------------------------------------------------------------


def read(reader: JsonOutcome | StreamOutcome, answer: bytes, cuts: list[int]) -> str:
    at = 0
    for cut in [*sorted(min(cut, len(answer)) for cut in cuts), len(answer)]:
        if cut > at:
            reader.feed(answer[at:cut])
        at = cut
    assert reader.finish() is None
    return reader.rpc_outcome


def stream_of(*messages: Any, end: str = "\n") -> bytes:
    events = [f"event: message{end}id: {n}{end}data: {json.dumps(each)}{end}{end}" for n, each in enumerate(messages)]
    return f"id: 0{end}data: {end}{end}".encode() + "".join(events).encode()


ANSWERS = [
    (OK, "ok"),
    (TOOL_ERROR, "tool_error"),
    ({"jsonrpc": "2.0", "id": 7, "result": {"resultType": "input_required", "requestState": "s"}}, "input_required"),
    ({"jsonrpc": "2.0", "id": 7, "result": {"resultType": "complete", "content": [], "isError": True}}, "tool_error"),
    ({"jsonrpc": "2.0", "id": 7, "result": {"resultType": 5, "isError": True}}, "tool_error"),
    (RPC_ERROR, "jsonrpc_error:-32601"),
    ({"jsonrpc": "2.0", "id": 7, "result": "text"}, "ok"),
    ({"jsonrpc": "2.0", "id": 7, "error": "odd"}, "jsonrpc_error:0"),
    ({"jsonrpc": "2.0", "id": 7, "error": None, "result": {}}, "ok"),
    ([OK, TOOL_ERROR], "tool_error"),
    ([RPC_ERROR, TOOL_ERROR], "jsonrpc_error:-32601"),
    ({"jsonrpc": "2.0", "id": 7, "result": {"structuredContent": {"isError": True}}}, "ok"),
    (PROGRESS, ""),
    (ASKED, ""),
]
CUTS = st.lists(st.integers(0, 2_000), max_size=12)


@given(st.sampled_from(ANSWERS), CUTS)
def test_the_outcome_of_a_json_answer_does_not_depend_on_its_split(case: tuple[Any, str], cuts: list[int]) -> None:
    answer, outcome = case
    assert read(JsonOutcome(), json.dumps(answer).encode(), cuts) == outcome


@given(st.sampled_from(ANSWERS), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), CUTS)
def test_the_outcome_of_a_stream_does_not_depend_on_its_split(
    case: tuple[Any, str], end: str, is_open: bool, cuts: list[int]
) -> None:
    answer, outcome = case
    data = stream_of(PROGRESS, ASKED, answer, end=end)
    if is_open:  # the last empty line is missing
        data = data[: -len(end)]
    assert read(StreamOutcome(), data, cuts) == outcome


def test_a_stream_is_over_for_the_client_with_its_response() -> None:
    reader = StreamOutcome()
    reader.feed(stream_of(PROGRESS, ASKED))
    assert not reader.is_terminal
    reader.feed(stream_of(OK))
    assert reader.is_terminal


TEXTS = st.text(alphabet='a"\\{}[]:,\n é', max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.just("isError"), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.booleans(), VALUES, st.sampled_from([None, (",", ":"), (" , ", " : ")]))
@example({"isError": True}, False, None, None)
def test_the_end_of_a_long_answer_tells_the_outcome(before: Any, is_error: bool, after: Any, marks: Any) -> None:
    result = {"content": before, "isError": is_error, "structuredContent": after}
    text = json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}, separators=marks, ensure_ascii=False).encode()
    told = "tool_error" if is_error else "ok"
    assert outcome_at_end(text) == told
    assert outcome_at_end(text[len(text) // 4 :] if after is None else text) == told


@pytest.mark.parametrize("is_error", [False, True])
@pytest.mark.parametrize("piece_bytes", [1 << 20, 65_536, 4_097])
def test_a_long_answer_is_not_held(is_error: bool, piece_bytes: int) -> None:
    image = {"type": "image", "data": "A" * (4 * ANSWER_BYTES_MAX)}
    answer = {"jsonrpc": "2.0", "id": 7, "result": {"content": [image], "isError": is_error}}
    told = "tool_error" if is_error else "ok"
    for reader, data in ((JsonOutcome(), json.dumps(answer).encode()), (StreamOutcome(), stream_of(PROGRESS, answer))):
        assert read(reader, data, list(range(0, len(data), piece_bytes))) == told
        assert len(reader._held or b"") <= ANSWER_BYTES_MAX
