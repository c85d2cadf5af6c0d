"""Keys bound to tools: what is refused, and what remains of a list, however it comes and is split."""

import json
from typing import Any

import pytest
from gpuproxy_plugins.mcp import RPC_CODES, Mcp
from gpuproxy_plugins.mcp_meter import RpcError
from gpuproxy_plugins.mcp_tools import HELD_BYTES_MAX, OBJECTS_MAX, PARTS_MAX, ToolLists, narrowed, tools_in
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.plugin import Call

MCP = Mcp()
RULES = ("web/search", "web/read_*")


def prepared(body: bytes, rules: tuple[str, ...] = RULES, server: str = "web") -> Any:
    call = Call(b"POST", b"/mcp/web", [], body, tools=rules, upstream=server)
    return MCP.prepare(call, MCP.inspect(call))


def calling(*names: str) -> bytes:
    made = [{"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": name}} for name in names]
    return json.dumps(made[0] if len(made) == 1 else made).encode()


@pytest.mark.parametrize("names", [("search",), ("read_file",), ("search", "read_x")], ids=["plain", "star", "batch"])
def test_allowed_tools_are_called_with_the_message_as_it_is(names: tuple[str, ...]) -> None:
    request = prepared(calling(*names))
    assert request.body is None


@pytest.mark.parametrize("names", [("write",), ("search", "write")], ids=["one", "batch"])
def test_other_tools_are_refused_in_the_words_of_the_protocol(names: tuple[str, ...]) -> None:
    with pytest.raises(RpcError) as refused:
        prepared(calling(*names))
    told = json.loads(MCP.refuse(b"/mcp/web", refused.value, "r1"))
    assert (refused.value.status, told["error"]["code"]) == (403, RPC_CODES["FORBIDDEN"])
    assert told["id"] == (3 if len(names) == 1 else None)
    assert "web/write" in told["error"]["message"]


def test_a_tool_of_that_name_of_another_server_is_another_tool() -> None:
    with pytest.raises(RpcError):
        prepared(calling("search"), server="other")


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b'{"method":"tools/call","params":{"name":"search"}}x',
        b'{"method":"tools/list","method":"tools/call","params":{"name":"write"}}',
        b'{"method":"tools/call","params":{"name":"write","name":"search"}}',
        b'{"method":"tools/call","params":{"name":"search"},"params":{"name":"write"}}',
        b'{"method":"tools/call","params":{"name":"search","Name":"write"}}',
        b'{"method":"ping","Method":"tools/call","params":{"name":"write"}}',
        b'{"Method":"tools/call","params":{"name":"write"}}',
        b'{"method":"tools/call","param\xc5\xbf":{"name":"write"},"params":{"name":"search"}}',
        b'{"method":"ping","\\u006dethod":"tools/call","params":{"name":"write"}}',
        '{"method":"tools/call","params":{"name":"write"}}'.encode("utf-16"),
        b'[{"method":"ping"},{"method":"ping","METHOD":"tools/call"}]',
        b"[1]",
        b"{" + b'"a":{' * 5_000,
    ],
)
def test_what_servers_may_read_in_another_way_is_refused(body: bytes) -> None:
    with pytest.raises(RpcError):
        prepared(body)


def test_arguments_may_have_any_names() -> None:
    body = b'{"method":"tools/call","params":{"name":"search","arguments":{"name":1,"Name":2,"name":3}}}'
    assert prepared(body).body is None


@pytest.mark.parametrize(
    "argument",
    [b'{"a":1},' * OBJECTS_MAX + b"{}", b"1," * PARTS_MAX + b"1", b'{%b"b":1}' % (b'"a":1,' * (PARTS_MAX // 2))],
    ids=["objects", "numbers", "names"],
)
def test_a_message_of_very_many_parts_is_not_read(argument: bytes) -> None:
    body = calling("search")[:-2] + b',"arguments":[%b]}}' % argument
    assert tools_in(body) is None
    with pytest.raises(RpcError):
        prepared(body)


def test_a_long_text_is_read() -> None:
    text = b"x" * (16 << 20)
    assert tools_in(calling("search")[:-2] + b',"arguments":"%b"}}' % text) == ("search",)


def test_calls_of_keys_without_rules_have_no_part_in_this() -> None:
    call = Call(b"POST", b"/mcp/web", [], b"no json")
    request = MCP.prepare(call, MCP.inspect(call))
    assert not request.identity


# -- lists ------------------------------------------------------------------------------------------------------


def keep(name: str) -> bool:
    return name.startswith("read")


TOOLS = [{"name": "read", "inputSchema": {"é": 1.50}}, {"name": "write"}, {"name": "read_2"}]
LIST = {"jsonrpc": "2.0", "id": 1, "result": {"tools": TOOLS, "nextCursor": "x", "ttlMs": 5, "cacheScope": "public"}}
LEFT = {**LIST, "result": {**LIST["result"], "tools": [TOOLS[0], TOOLS[2]], "cacheScope": "private"}}  # type: ignore[dict-item]
OTHER = {"jsonrpc": "2.0", "id": 2, "result": {"content": [{"type": "text", "text": '"tools"'}]}}


def edited(data: bytes, cuts: list[int]) -> bytes:
    editor, out, at = ToolLists(keep), b"", 0
    for cut in sorted({min(cut, len(data)) for cut in cuts}):
        out += editor.edit(data[at:cut], is_last=False)
        at = cut
    return out + editor.edit(data[at:], is_last=True)


CUTS = st.lists(st.integers(0, 700), max_size=12)


@given(CUTS)
def test_a_list_in_json_shows_the_rest_only(cuts: list[int]) -> None:
    assert json.loads(edited(json.dumps(LIST).encode(), cuts)) == LEFT
    assert json.loads(edited(json.dumps([OTHER, LIST]).encode(), cuts)) == [OTHER, LEFT]


@given(CUTS, st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_a_list_in_a_stream_shows_the_rest_and_other_events_pass_byte_by_byte(cuts: list[int], end: bytes) -> None:
    def event(message: object, id: bytes) -> bytes:
        return b"id: %b\nevent: message\ndata: %b\nretry: 5\n\n" % (id, json.dumps(message).encode())

    before = b": ping\n\nid: 0\ndata: \n\n" + event(OTHER, b"1")
    data = (before + event(LIST, b"2") + event(OTHER, b"3")).replace(b"\n", end)
    out = edited(data, cuts)
    assert out.startswith(before.replace(b"\n", end))
    assert out.endswith(event(OTHER, b"3").replace(b"\n", end))
    middle = out[len(before.replace(b"\n", end)) : -len(event(OTHER, b"3").replace(b"\n", end))]
    lines = middle.split(end)
    assert [line.partition(b":")[0] for line in lines] == [b"id", b"event", b"data", b"retry", b"", b""]
    assert json.loads(lines[2][5:]) == LEFT


def test_an_event_of_several_lines_is_one_message() -> None:
    data = b"data: " + json.dumps(LIST, indent=1).encode().replace(b"\n", b"\ndata: ") + b"\n\n"
    out = edited(data, [])
    payload = b"\n".join(line[6:] for line in out.split(b"\n") if line)
    assert json.loads(payload) == LEFT


@pytest.mark.parametrize(
    "payload",
    [b"", b"x", b"[1]", b'{"result":{"tools":5}}', b'{"result":[]}', json.dumps(OTHER).encode(), b'{"error":{}}'],
)
def test_what_is_no_list_stays_as_it_is(payload: bytes) -> None:
    assert narrowed(payload, keep) == payload


@pytest.mark.parametrize("lead", [b"{", b"data: {"], ids=["json", "stream"])
def test_a_list_without_end_is_not_held(lead: bytes) -> None:
    editor = ToolLists(keep)
    out = editor.edit(lead, is_last=False)
    for _ in range(HELD_BYTES_MAX // 65_536 + 2):
        out += editor.edit(b"x" * 65_536, is_last=False)
        assert len(editor._held) + editor._cutter.held_bytes <= HELD_BYTES_MAX + 65_536
    assert out + editor.edit(b"x", is_last=True) == b""


def test_an_envelopes_answer_shows_the_rest_only() -> None:
    call = Call(b"POST", b"", [], None, is_envelope=True, tools=("web/read*",), upstream="web")
    data = b"data: " + json.dumps(LIST).encode() + b"\n\n"
    kind, body = MCP.collapse(call, b"text/event-stream", data)
    assert (kind, json.loads(body)) == (b"application/json", LEFT)
