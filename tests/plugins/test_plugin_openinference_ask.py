"""A stream is asked for its usage, and a client that did not ask never sees the answer to that."""

import json
from itertools import pairwise
from typing import Any

import pytest
from gpuproxy_plugins.openinference import OpenInference
from gpuproxy_plugins.openinference_ask import UsageStripper
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.plugin import Call, UpstreamRequest

OPEN = OpenInference()


def prepared(body: bytes, path: bytes = b"/v1/chat/completions", may_ask: bool = True) -> UpstreamRequest:
    call = Call(b"POST", path, [], body, may_ask_usage=may_ask)
    return OPEN.prepare(call, OPEN.inspect(call))


def asked(**fields: Any) -> bytes | None:
    return prepared(json.dumps({"model": "m", "stream": True, **fields}).encode()).body


def test_a_stream_is_asked_and_nothing_else_of_the_body_changes() -> None:
    body = b' {"model":"m", "stream":true, "temperature":1.0, "seed":12345678901234567890}'
    request = prepared(body)
    assert request.body == body.replace(b"{", b'{"stream_options":{"include_usage":true},', 1)
    assert isinstance(request.editor, UsageStripper)


@pytest.mark.parametrize("options", [{"include_usage": False}, {"include_usage": None}, None])
def test_a_client_that_does_not_want_usage_is_asked_for_and_spared(options: Any) -> None:
    body = asked(stream_options=options, temperature=1.0)
    assert body is not None
    assert json.loads(body) == {
        "model": "m", "stream": True, "temperature": 1.0, "stream_options": {"include_usage": True}
    }  # fmt: skip


def test_what_else_a_client_says_in_its_options_stays() -> None:
    body = asked(stream_options={"include_obfuscation": False, "include_usage": False})
    assert body is not None
    assert json.loads(body)["stream_options"] == {"include_obfuscation": False, "include_usage": True}


@pytest.mark.parametrize("options", [{"include_usage": True}, {}, {"include_usage": True, "x": 1}, "junk", [1]])
def test_a_client_that_asks_itself_is_left_alone(options: Any) -> None:
    assert asked(stream_options=options) is None


@pytest.mark.parametrize("path", [b"/v1/responses", b"/v1/messages", b"/v1/embeddings"])
def test_only_chats_and_completions_are_asked(path: bytes) -> None:
    assert prepared(b'{"model":"m","stream":true}', path).body is None
    assert prepared(b'{"model":"m","stream":true}', b"/v1/completions?x=1").body is not None


def test_a_call_that_does_not_stream_or_may_not_be_asked_is_left_alone() -> None:
    assert prepared(b'{"model":"m"}').body is None
    assert prepared(b'{"model":"m","stream":false}').body is None
    assert prepared(b'{"model":"m","stream":true}', may_ask=False).body is None


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode()


def content(text: str, reason: str | None = None, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more)


ADDED = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 5})
DONE = b"data: [DONE]"
COUNTS = {"prompt_tokens": 0, "completion_tokens": 0}
STREAMS: list[tuple[list[bytes], list[bytes]]] = [
    ([content("a"), content("", "stop"), ADDED, DONE], [content("a"), content("", "stop"), DONE]),
    ([content("a", usage=None), content("", "stop", usage=None), ADDED, DONE],
     [content("a", usage=None), content("", "stop", usage=None), DONE]),
    ([content("a", usage=COUNTS), content("", "length", usage=COUNTS), ADDED, DONE],
     [content("a", usage=COUNTS), content("", "length", usage=COUNTS), DONE]),
    ([content('"finish_reason":"stop"'), content('"usage":{'), b": ping", content("", "stop"), ADDED, DONE],
     [content('"finish_reason":"stop"'), content('"usage":{'), b": ping", content("", "stop"), DONE]),
    ([content("", "stop"), content("b"), content("", "stop"), ADDED, DONE],
     [content("", "stop"), content("b"), content("", "stop"), DONE]),
    ([content("", "stop"), event(choices=[], usage=None), event(error={"message": "usage"}), DONE],
     [content("", "stop"), event(choices=[], usage=None), event(error={"message": "usage"}), DONE]),
]  # fmt: skip


def stripped(pieces: list[bytes]) -> bytes:
    stripper = UsageStripper()
    passed = [stripper.edit(piece, False) for piece in pieces]
    return b"".join(passed) + stripper.edit(b"", True)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("events", "left"), STREAMS)
def test_exactly_the_added_event_is_taken_out(events: list[bytes], left: list[bytes], end: bytes) -> None:
    body = b"".join(one + end for one in events)
    wanted = b"".join(one + end for one in left)
    assert stripped([body]) == wanted
    assert stripped([one + end for one in events]) == wanted
    assert stripped([body[at : at + 1] for at in range(len(body))]) == wanted


@settings(max_examples=200)
@given(st.sampled_from(STREAMS), st.sampled_from([b"\n\n", b"\r\n\r\n"]), st.lists(st.integers(0, 900), max_size=9))
def test_what_is_taken_out_does_not_depend_on_the_splitting(
    case: tuple[list[bytes], list[bytes]], end: bytes, cuts: list[int]
) -> None:
    body = b"".join(one + end for one in case[0])
    borders = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[start:stop] for start, stop in pairwise(borders)]
    assert stripped(pieces) == b"".join(one + end for one in case[1])


def test_nothing_is_held_back_before_the_end_is_near() -> None:
    stripper = UsageStripper()
    for piece in (b'data: {"choi', b'ces":[', b"]", b'}\n\ndata: {"choices":[{"finish_reason":null'):
        assert stripper.edit(piece, False) == piece


def test_an_event_that_never_ends_is_not_held_for_ever() -> None:
    stripper = UsageStripper()
    pieces = [content("", "stop") + b"\n\n", *[b"x" * 60_000] * 6]
    assert sum(len(stripper.edit(piece, False)) for piece in pieces) > 300_000
