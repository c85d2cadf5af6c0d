"""Names behind a group: given and taken back, whatever a server's events look like and however they are split."""

import json
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from gpuproxy.codec.mcp import decode_fields, mirrored_name, unmirrored_name
from gpuproxy.control.mcp_inner import ANSWER_BYTES_MAX, Told, inner_fields
from gpuproxy.control.mcp_merge import merged_discovery, merged_list
from gpuproxy.control.mcp_names import MARK, URI_MARK, inward, outward, split
from gpuproxy.control.mcp_relay import EventRelabeller

RESULT = {"jsonrpc": "2.0", "id": 3, "result": {"content": [{"type": "text", "text": "uri"}]}}
ASKED: dict[str, Any] = {"jsonrpc": "2.0", "id": "q__1", "method": "sampling/createMessage", "params": {}}
NOTE = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 0.5}}


def edited(data: bytes, cuts: list[int]) -> bytes:
    relabeller, out, at = EventRelabeller("web"), b"", 0
    for cut in sorted({min(cut, len(data)) for cut in cuts}):
        out += relabeller.edit(data[at:cut])
        at = cut
    return out + relabeller.edit(data[at:]) + relabeller.edit(b"", is_last=True)


@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_ids_of_events_and_of_questions_name_their_server(cuts: list[int], end: str, is_open: bool) -> None:
    def stream(*events: tuple[str, object]) -> bytes:
        told = [f"id: {id}\nevent: message\ndata: {json.dumps(message)}\nretry: 5\n\n" for id, message in events]
        text = ": ping\n\nid:\ndata: \n\n" + "".join(told)
        return text.replace("\n", end).encode()

    data = stream(("a", NOTE), ("b", ASKED), ("c", RESULT))
    data = data[: -len(end)] if is_open else data
    lines = edited(data, cuts).decode().split(end)
    assert [line for line in lines if line.startswith("id:")] == ["id:", "id: web__a", "id: web__b", "id: web__c"]
    messages = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert messages == [NOTE, ASKED | {"id": 'web__"q__1"'}, RESULT]
    assert len(lines) == len(data.decode().split(end))


@given(st.integers() | st.text(max_size=20))
def test_an_answer_finds_back_to_who_asked(rpc_id: int | str) -> None:
    asked = decode_fields(outward(msgspec.json.encode(ASKED | {"id": rpc_id}), "web"))
    answer = {"jsonrpc": Raw(b'"2.0"'), "id": asked["id"], "result": Raw(b"{}")}
    server, found = inward(answer, ["tools", "web"])
    assert (server, msgspec.json.decode(found["id"])) == ("web", rpc_id)


def test_links_to_resources_lead_back_to_the_group() -> None:
    content = [
        {"type": "resource_link", "uri": "file:///a", "name": "a"},
        {"type": "resource", "resource": {"uri": "file:///b", "text": "t"}},
        {"type": "text", "text": '"uri"'},
    ]
    found = json.loads(outward(json.dumps({"id": 1, "result": {"content": content}}).encode(), "web"))
    shown = found["result"]["content"]
    assert (shown[0]["uri"], shown[1]["resource"]["uri"], shown[2]) == ("web+file:///a", "web+file:///b", content[2])


def test_links_in_the_messages_of_a_prompt_lead_back_to_the_group() -> None:
    content = [
        {"type": "resource", "resource": {"uri": "file:///b", "text": "t"}},
        {"type": "resource_link", "uri": "file:///a", "name": "a"},
        {"type": "text", "text": '"uri"'},
        "no object",
    ]
    result = {"messages": [{"role": "user", "content": each} for each in content]}
    found = json.loads(outward(json.dumps({"id": 1, "result": result}).encode(), "web"))
    shown = [each["content"] for each in found["result"]["messages"]]
    assert (shown[0]["resource"]["uri"], shown[1]["uri"]) == ("web+file:///b", "web+file:///a")
    assert shown[2:] == content[2:]


def test_a_question_is_cancelled_by_the_id_it_was_asked_by() -> None:
    asked = json.loads(outward(json.dumps(ASKED).encode(), "web"))
    note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": ASKED["id"], "reason": "x"}}
    found = json.loads(outward(json.dumps(note).encode(), "web"))
    assert found["params"] == {"requestId": asked["id"], "reason": "x"}


def test_a_change_of_a_resource_names_it_as_the_group_does() -> None:
    note = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "file:///a"}}
    assert json.loads(outward(json.dumps(note).encode(), "web"))["params"] == {"uri": "web+file:///a"}


@pytest.mark.parametrize(
    "payload",
    [b"", b"x", b"[]", b'{"result":5,"uri":"uri"}', b'{"error":{"code":1}}', b'{"id":"\xff","method":"x"}'],
)
def test_what_has_no_names_stays_as_it_is(payload: bytes) -> None:
    assert outward(payload, "web") == payload


def test_numbers_of_a_result_stay_as_they_are_written() -> None:
    text = b'{"id":1,"result":{"content":[{"type":"resource_link","uri":"x","n":1.50}],"big":12345678901234567890123}}'
    assert b'"n":1.50' in outward(text, "web")
    assert b"12345678901234567890123" in outward(text, "web")


@pytest.mark.parametrize(
    ("text", "mark", "found"),
    [
        ("web__search", MARK, ("web", "search")),
        ("web__a__b", MARK, ("web", "a__b")),
        ("other__x", MARK, ("", "")),
        ("web", MARK, ("", "")),
        ("web+book+x://y", URI_MARK, ("web", "book+x://y")),
    ],
)
def test_a_name_tells_its_server(text: str, mark: str, found: tuple[str, str]) -> None:
    assert split(text, mark, ["web", "tools"]) == found


def test_an_event_over_the_bound_passes_and_is_not_held() -> None:
    relabeller = EventRelabeller("web")
    piece = b"x" * (1 << 20)
    sent = b"data: " + piece * (ANSWER_BYTES_MAX // len(piece) + 2) + b"\n\n"
    out = b"".join(relabeller.edit(sent[at : at + len(piece)]) for at in range(0, len(sent), len(piece)))
    assert out == sent
    assert relabeller.edit(b"id: 1\n\n") == b"id: web__1\n\n"


def told(server: str, result: object) -> Told:
    from multidict import CIMultiDict

    return Told(server, 200, CIMultiDict(), b"", {"result": Raw(msgspec.json.encode(result))})


def test_merged_lists_are_for_this_caller_only_and_live_as_long_as_the_shortest() -> None:
    pages = [
        told("a", {"tools": [{"name": "x"}], "ttlMs": 9, "cacheScope": "public", "nextCursor": "n"}),
        told("a", {"tools": [{"name": "y"}], "ttlMs": 5, "cacheScope": "public"}),
        told("b", {"tools": [{"name": "x", "title": "X"}], "ttlMs": 7, "cacheScope": "public"}),
    ]
    found = json.loads(msgspec.json.encode(merged_list("tools", pages)))
    assert found == {
        "tools": [{"name": "a__x"}, {"name": "a__y"}, {"name": "b__x", "title": "X"}],
        "ttlMs": 5,
        "cacheScope": "private",
    }


def test_a_group_speaks_the_revisions_that_all_its_servers_speak() -> None:
    one = {"supportedVersions": ["2025-11-25", "2026-07-28"], "capabilities": {"tools": {"listChanged": True}}}
    other = {"supportedVersions": ["2026-07-28", "2027-01-01"], "capabilities": {"prompts": {}, "tasks": {}}}
    found = json.loads(msgspec.json.encode(merged_discovery("all", [told("a", one), told("b", other)])))
    assert found["supportedVersions"] == ["2026-07-28"]
    assert found["capabilities"] == {"tools": {"listChanged": True}, "prompts": {}}


@pytest.mark.parametrize(("name", "shown"), [("a b", "a b"), (" a", "=?base64?IGE=?="), ("é", "=?base64?w6k=?=")])
def test_a_name_is_mirrored_as_the_revision_says(name: str, shown: str) -> None:
    assert mirrored_name(name) == shown
    assert unmirrored_name(shown) == name


def test_a_body_that_was_unpacked_on_its_way_is_not_called_packed() -> None:
    request = make_mocked_request("POST", "/", {"Content-Encoding": "gzip", "Content-Type": "application/json"})
    assert inner_fields(request, None) == {"accept-encoding": "identity", "content-type": "application/json"}
