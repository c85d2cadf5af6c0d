"""Usage is read from every dialect, whole or streamed, the same however the bytes arrive."""

import json
from itertools import pairwise
from typing import Any

import pytest
from gpuproxy_plugins.openinference import OpenInference
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.plugin import TAIL_BYTES, Call, Intent, Usage

OPEN = OpenInference()
CALL = Call(b"POST", b"/v1/chat/completions", [], None)
JSON = b"application/json; charset=utf-8"
SSE = b"text/event-stream"


def read(content_type: bytes, *chunks: bytes, path: bytes = b"/v1/chat/completions") -> Usage | None:
    reader = OPEN.reader(Call(b"POST", path, [], None, body_bytes=60), 200, content_type)
    assert reader is not None
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def bytewise(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


def stream(*events: Any, end: bytes = b"\n", names: bool = False) -> bytes:
    """Return the events as a stream with the given line end; bytes are data as they are."""
    lines: list[bytes] = []
    for event in events:
        data = event if isinstance(event, bytes) else json.dumps(event, separators=(",", ":")).encode()
        if names and isinstance(event, dict):
            lines.append(b"event: " + str(event.get("type")).encode())
        lines += [b"data: " + data, b""]
    return end.join(lines) + end


def token(text: str, **more: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}], **more}


OPENAI = [token("Hel"), token("lo"), {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}, b"[DONE]"]
NULLS = [token("Hel", usage=None), token("lo", usage=None), *OPENAI[2:]]
CONTINUOUS = [token("a", usage={"prompt_tokens": 3, "completion_tokens": n}) for n in range(1, 6)]
ZEROS = [token("a", usage={"prompt_tokens": 0, "completion_tokens": 0}), *OPENAI]
TOLD = {"prompt_tokens": 3, "completion_tokens": 2}
QUOTED = [token('she said "usage":{"prompt_tokens":99}'), token('"usage"'), *OPENAI]
ANTHROPIC = [
    {
        "type": "message_start",
        "message": {
            "usage": {
                "input_tokens": 10,
                "cache_creation_input_tokens": 20,
                "cache_read_input_tokens": 30,
                "output_tokens": 1,
            }
        },
    },
    {"type": "ping"},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
    {"type": "message_delta", "delta": {}, "usage": {"input_tokens": None, "output_tokens": 7}},
    {"type": "message_stop"},
]


def responses(status: str) -> list[Any]:
    usage = {"input_tokens": 12, "output_tokens": 8, "input_tokens_details": {"cached_tokens": 4}}
    return [
        {"type": "response.created", "response": {"id": "r", "usage": None}},
        {"type": "response.output_text.delta", "delta": "Hi"},
        {"type": f"response.{status}", "response": {"id": "r", "status": status, "usage": usage}},
    ]


STREAMS: list[tuple[list[Any], Usage | None]] = [
    (OPENAI, Usage(3, 0, 5)),
    (NULLS, Usage(3, 0, 5)),
    (CONTINUOUS, Usage(3, 0, 5)),
    (ZEROS, Usage(3, 0, 5)),
    (QUOTED, Usage(3, 0, 5)),
    (ANTHROPIC, Usage(60, 30, 7)),
    (responses("completed"), Usage(12, 4, 8)),
    (responses("incomplete"), Usage(12, 4, 8)),
    (responses("failed"), Usage(12, 4, 8)),
    ([{"type": "transcript.text.done", "usage": {"input_tokens": 2, "output_tokens": 3}}], Usage(2, 0, 3)),
    ([{"response": "text", "usage": {"prompt_tokens": 1}}], Usage(1, 0, 0)),
    ([{"usage": {"prompt_tokens": 0, "completion_tokens": 0}}], Usage(0, 0, 0)),
    ([token("a"), b"[DONE]"], None),
    ([token("a"), {"choices": [{"finish_reason": "stop", "usage": TOLD}]}, b"[DONE]"], Usage(3, 0, 2)),
    ([token("a"), {"choices": [{"finish_reason": "stop"}], "x_groq": {"usage": TOLD}}, b"[DONE]"], Usage(3, 0, 2)),
    ([token("a"), {"choices": [], "usage": {"prompt_tokens": 3.0, "completion_tokens": "2"}}], Usage(3, 0, 2)),
    ([{"error": {"message": "x"}}, b"[DONE]"], None),
    ([{"usage": "much"}, {"usage": {}}, b'{"usage":{"prompt_tokens":1'], Usage(10, 0, 2, "estimated")),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("events", "usage"), STREAMS)
def test_a_stream_tells_the_same_in_one_piece_byte_by_byte_and_event_by_event(
    events: list[Any], usage: Usage | None, end: bytes
) -> None:
    body = b": PROCESSING" + end + end + stream(*events, end=end, names=True)
    assert read(SSE, body) == usage
    assert read(SSE, *bytewise(body)) == usage
    assert read(SSE, *[piece + end + end for piece in body.split(end + end)]) == usage


@settings(max_examples=150)
@given(
    events=st.lists(st.sampled_from([*OPENAI, *NULLS, *QUOTED, *ANTHROPIC, *responses("completed")]), max_size=8),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 1_500), max_size=12),
)
def test_a_stream_tells_the_same_under_any_splitting(events: list[Any], end: bytes, cuts: list[int]) -> None:
    body = stream(*events, end=end)
    borders = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    assert read(SSE, *(body[start:stop] for start, stop in pairwise(borders))) == read(SSE, body)


ROLE = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
END = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
EMPTY_REASON = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": ""}]}
CHAT = [ROLE, *[token("data: [DONE]")] * 7, END, b"[DONE]"]
DELTAS = [{"type": "response.output_text.delta", "delta": "event: x.delta"}] * 5
GENERATED = [{"text_output": "a", "details": None}] * 4
TGI_END = {"token": {"id": 1}, "details": {"generated_tokens": 6, "input_length": 17}}
FAILED = {"error": {"message": "x"}}
OLD_FAILED = {"object": "error", "message": "x"}
FORGED = {"type": "content_block_start", "content_block": {"input": {"usage": {"input_tokens": 0}}}}
ESTIMATES: list[tuple[bytes, list[Any], Usage | None]] = [
    (b"/v1/chat/completions", CHAT, Usage(10, 0, 7, "estimated")),
    (b"/v1/chat/completions", CHAT[:5], Usage(10, 0, 4, "estimated")),
    (b"/v1/chat/completions?x=/messages", CHAT[:5], Usage(10, 0, 4, "estimated")),
    (b"/v1/chat/completions", CHAT[:1], None),
    (b"/v1/chat/completions", [ROLE, *[EMPTY_REASON] * 4, END, b"[DONE]"], Usage(10, 0, 4, "estimated")),
    (b"/v1/chat/completions", [], None),
    (b"/v1/messages", [*ANTHROPIC[:2], *ANTHROPIC[2:3] * 9], Usage(60, 30, 9, "estimated")),
    (b"/v1/messages", ANTHROPIC[:2], Usage(60, 30, 1)),
    (b"/v1/messages", [*ANTHROPIC[:2], FORGED], Usage(60, 30, 1)),
    (b"/v1/messages", [*ANTHROPIC[:2], *ANTHROPIC[2:3] * 9, *ANTHROPIC[3:]], Usage(60, 30, 7)),
    (b"/v1/responses", [responses("completed")[0], *DELTAS], Usage(10, 0, 5, "estimated")),
    (b"/v1/responses", [responses("completed")[0], *DELTAS, responses("incomplete")[2]], Usage(12, 4, 8)),
    (b"/v2/models/m/generate_stream", GENERATED, Usage(10, 0, 4, "estimated")),
    (b"/generate_stream", [*GENERATED, TGI_END], Usage(17, 0, 6)),
    (b"/", [*GENERATED, TGI_END], Usage(17, 0, 6)),
    (b"?x=1", GENERATED, Usage(10, 0, 4, "estimated")),
    (b"/v1/chat/completions", [ROLE, FAILED, b"[DONE]"], None),
    (b"/v1/chat/completions", [ROLE, token("a"), token('"error"'), FAILED, b"[DONE]"], Usage(10, 0, 2, "estimated")),
    (b"/v1/completions", [ROLE, token("a"), OLD_FAILED], Usage(10, 0, 1, "estimated")),
    (b"/v1/completions", [ROLE, {"error": None, **token("a")}, token("b")], Usage(10, 0, 2, "estimated")),
    (b"/generate_stream", [FAILED], None),
    (b"/v2/models/m/generate_stream", [*GENERATED, FAILED], Usage(10, 0, 4, "estimated")),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("path", "events", "usage"), ESTIMATES)
def test_what_was_delivered_is_counted_where_the_upstream_tells_no_usage(
    path: bytes, events: list[Any], usage: Usage | None, end: bytes
) -> None:
    body = stream(*events, end=end, names=True)
    assert read(SSE, body, path=path) == usage
    assert read(SSE, *bytewise(body), path=path) == usage


@pytest.mark.parametrize(
    ("asked", "events", "usage"),
    [
        ({"messages": [], "stream": True}, OPENAI[:2], Usage(10, 0, 1, "estimated")),
        ({"inputs": "x", "stream": True}, [*GENERATED, TGI_END], Usage(17, 0, 6)),
        ({"inputs": "x", "stream": True}, GENERATED, Usage(10, 0, 4, "estimated")),
        ({"input": "x", "stream": True}, [{"type": "response.output_text.delta"}] * 3, Usage(10, 0, 3, "estimated")),
    ],
)
def test_an_envelopes_answer_is_read_as_that_of_the_path_its_body_chose(
    asked: Any, events: list[Any], usage: Usage
) -> None:
    body = json.dumps(asked).encode().ljust(60)
    call = Call(b"POST", b"", [], body, is_envelope=True, body_bytes=60)
    OPEN.prepare(call, OPEN.describe(call))
    call.body = None
    reader = OPEN.reader(call, 200, SSE)
    assert reader is not None
    reader.feed(stream(*events, names=True))
    assert reader.finish() == usage


def choice(index: int, delta: Any, reason: str | None = None) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


ROLES = [choice(index, {"role": "assistant", "content": ""}) for index in range(3)]
SEVERAL: list[tuple[list[Any], int | None]] = [
    ([*ROLES, *[choice(0, {"content": '"index":7,'})] * 3, *[choice(2, {"content": "b"})] * 4], 7),
    ([*ROLES, choice(0, {"content": "a"}), choice(0, {}, "stop"), *[choice(1, {"content": "b"})] * 4], 5),
    ([*ROLES, *[choice(0, {}, "stop"), choice(1, {"content": "b"})] * 2, choice(2, {}, "length"), b"[DONE]"], 2),
    ([*ROLES, *[choice(1, {"content": "b"})] * 4, FAILED, choice(5, {"content": "b"}), b"[DONE]"], 4),
    (CHAT, 7),  # of a server that gives one answer all the same
    (ROLES, None),
]


def read_several(*pieces: bytes, count: int = 3) -> Usage | None:
    call = Call(b"POST", b"/v1/chat/completions", [], json.dumps({"model": "m", "stream": True, "n": count}).encode())
    OPEN.prepare(call, OPEN.inspect(call))
    reader: Any = OPEN.reader(call, 200, SSE)
    for piece in pieces:
        reader.feed(piece)
    return reader.finish()


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(("events", "count"), SEVERAL)
def test_of_several_answers_each_has_its_own_start_and_end(events: list[Any], count: int | None, end: bytes) -> None:
    body = stream(*events, end=end)
    told = read_several(body)
    assert (told and told.output_tokens) == count
    assert read_several(*bytewise(body)) == told
    assert read_several(*(event + 2 * end for event in body.split(2 * end) if event)) == told


@settings(max_examples=100)
@given(end=st.sampled_from([b"\n", b"\r\n", b"\r"]), cuts=st.lists(st.integers(0, 1_500), max_size=12))
@pytest.mark.parametrize(("path", "events"), [(path, events) for path, events, _ in ESTIMATES])
def test_what_is_counted_does_not_depend_on_the_splitting(
    path: bytes, events: list[Any], end: bytes, cuts: list[int]
) -> None:
    body = stream(*events, end=end, names=True)
    borders = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[start:stop] for start, stop in pairwise(borders)]
    assert read(SSE, *pieces, path=path) == read(SSE, body, path=path)


PICTURE = "data:image/png;base64," + "iVBORw0KGgo+/" * 20_000
TEXT = "words and more " * 2_000


@pytest.mark.parametrize(
    ("path", "body", "counted_bytes"),
    [
        (b"/v1/chat/completions", {"messages": [{"image_url": {"url": PICTURE}}, {"text": TEXT}]}, len(TEXT)),
        (b"/v1/messages", {"messages": [{"source": {"type": "base64", "data": PICTURE[22:]}}]}, 0),
        (b"/api/chat", {"messages": [{"content": "x", "images": [PICTURE[22:]]}]}, 0),
        (b"/v1/chat/completions", {"messages": [{"content": "\u4f60" * 9_000}]}, 54_000),
    ],
)
@pytest.mark.parametrize("is_envelope", [False, True])
def test_a_picture_is_not_taken_for_text(path: bytes, body: Any, counted_bytes: int, is_envelope: bool) -> None:
    sent = json.dumps({"model": "m", "stream": True, **body}).encode()
    call = Call(b"POST", path, [], sent, is_envelope)
    OPEN.prepare(call, OPEN.describe(call))
    call.body, call.body_bytes = None, len(sent)
    if path == b"/api/chat":
        reader: Any = OPEN.reader(call, 200, b"application/x-ndjson")
        reader.feed(b'{"done":false}\n')
    else:
        reader = OPEN.reader(call, 200, SSE)
        reader.feed(stream(*[{**token("a"), "type": "content_block_delta"}] * 3, names=True))
    told = reader.finish()
    assert told.source == "estimated"
    assert abs(told.input_tokens - counted_bytes // 6) < 40


def test_a_file_in_a_form_is_not_taken_for_text() -> None:
    call = Call(b"POST", b"/v1/audio/transcriptions", [], b"--b0\r\n" + b"\0" * 100_000)
    OPEN.prepare(call, Intent("m", is_stream=True))
    call.body, call.body_bytes = None, 100_006
    reader: Any = OPEN.reader(call, 200, SSE)
    reader.feed(stream(*[{"type": "transcript.text.delta"}] * 3))
    assert reader.finish() == Usage(0, 0, 2, "estimated")


def test_the_final_event_may_lack_its_empty_line() -> None:
    assert read(SSE, stream(*OPENAI[:3]).rstrip()) == Usage(3, 0, 5)


def test_a_cut_stream_tells_what_came_last() -> None:
    assert read(SSE, stream(*ANTHROPIC[:3])) == Usage(60, 30, 1)


def test_data_over_several_lines_is_joined() -> None:
    assert read(SSE, b'data: {"usage":\ndata: {"prompt_tokens":3}}\n\ndata: [DONE]\n\n') == Usage(3, 0, 0)


ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
PROMPT_ONLY = {"prompt_tokens": 7, "completion_tokens": 0}


def completion(usage: Any, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": "a", "index": 0, "finish_reason": reason}], "usage": usage}


@pytest.mark.parametrize(
    ("events", "usage"),
    [
        ([completion(ZERO)] * 5, Usage(10, 0, 4, "estimated")),  # Ollama tells the numbers with the last one
        ([completion(ZERO)] * 5 + [{"choices": [], "usage": {**PROMPT_ONLY, "completion_tokens": 5}}], Usage(7, 0, 5)),
        ([completion(PROMPT_ONLY), *[token("a")] * 4], Usage(7, 0, 4, "estimated")),
        ([*[completion(ZERO)] * 5, completion(ZERO, "stop")], Usage(0, 0, 0)),
        ([completion(ZERO), b"[DONE]"], Usage(0, 0, 0)),
    ],
)
def test_zeros_told_in_the_middle_are_not_what_was_used(events: list[Any], usage: Usage) -> None:
    body = stream(*events)
    assert read(SSE, body, path=b"/v1/completions") == usage
    assert read(SSE, *bytewise(body), path=b"/v1/completions") == usage


@pytest.mark.parametrize(
    ("path", "event", "rest"),
    [
        (b"/v1/chat/completions", token("a"), 4),
        (b"/v1/messages", {"type": "content_block_delta"}, 5),
        (b"/v1/responses", {"type": "response.output_text.delta"}, 5),
        (b"/generate_stream", {"token": {"text": "a"}}, 5),
    ],
)
def test_an_event_that_did_not_arrive_whole_is_not_counted(path: bytes, event: Any, rest: int) -> None:
    body = stream(*[event] * 6, names=True)[:-4]
    assert read(SSE, body, path=path) == Usage(10, 0, rest, "estimated")
    assert read(SSE, *bytewise(body), path=path) == Usage(10, 0, rest, "estimated")


def test_usage_at_the_end_of_an_event_too_long_to_hold_is_still_read() -> None:
    event = {"type": "response.completed", "response": {"output": "x" * 400_000, "usage": {"input_tokens": 9}}}
    body = stream(event)
    assert read(SSE, body) == Usage(9, 0, 0)
    assert read(SSE, *(body[at : at + 4_096] for at in range(0, len(body), 4_096))) == Usage(9, 0, 0)


def test_an_endless_event_does_not_hide_the_next() -> None:
    assert read(SSE, *[b"data: " + b"x" * 60_000] * 20, b"\n\n", stream(*OPENAI)) == Usage(3, 0, 5)


ANSWERS: list[tuple[Any, Usage | None]] = [
    ({"usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}, Usage(3, 0, 5)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}, Usage(3, 2, 0)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": None, "completion_tokens": None}}, Usage(3, 0, 0)),
    (
        {"usage": {"input_tokens": 12, "output_tokens": 8, "input_tokens_details": {"cached_tokens": 4}}},
        Usage(12, 4, 8),
    ),
    ({"usage": {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 3}}, Usage(6, 2, 0)),
    ({"message": "text", "response": "text", "usage": {"prompt_tokens": 3}}, Usage(3, 0, 0)),
    ({"model": "m", "message": {}, "prompt_eval_count": 7, "eval_count": 9}, Usage(7, 0, 9)),
    ({"usage": {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}}, Usage(2, 2, 0)),
    ({"generated_text": "x", "details": {"generated_tokens": 5, "prefill": [{"id": 1}, {"id": 2}]}}, Usage(2, 0, 5)),
    ({"generated_text": "x", "details": None}, None),
    ({"usage": {"type": "duration", "seconds": 3}}, None),
    ({"usage": {"prompt_tokens": -1}}, None),
    ({"usage": {"prompt_tokens": 10**30}}, None),
    ({"usage": {"prompt_tokens": "3", "completion_tokens": 5.0}}, Usage(3, 0, 5)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1.0}}}, Usage(3, 1, 0)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": -1}}}, Usage(3, 0, 0)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": ["odd"], "completion_tokens": "5"}}, Usage(3, 0, 5)),
    ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": 7}}, Usage(3, 0, 0)),
    ({"usage": {"prompt_tokens": 3}, "details": "odd", "eval_count": "odd"}, Usage(3, 0, 0)),
    ({"usage": {"prompt_tokens": "much", "completion_tokens": 1.5}}, None),
    ({"usage": {"prompt_tokens": "9" * 5_000}}, None),
    ({"usage": {"completion_tokens": 5}}, Usage(0, 0, 5)),
    ({"usage": {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135}}, Usage(32, 0, 103)),
    ({"usage": {"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81}}, Usage(21, 0, 60)),
    ({"usage": {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 0}}, Usage(32, 0, 9)),
    ({"usage": {"prompt_tokens": 3, "total_tokens": 9}}, Usage(3, 0, 0)),
    ({"results": [], "usage": {"total_tokens": 9}}, Usage(9, 0, 0)),
    ({"logprob": float("-inf"), "usage": {"prompt_tokens": 3}}, Usage(3, 0, 0)),
    ({"embeddings": [[0.5]], "prompt_eval_count": 5}, Usage(5, 0, 0)),
    ({"context": [12_345] * 20_000, "prompt_eval_count": 5, "eval_count": 7}, Usage(5, 0, 7)),
    ({"embeddings": [[0.123] * 20_000], "prompt_eval_count": 5}, Usage(5, 0, 0)),
    ({"note": '"eval_count": 5', "x": "y" * TAIL_BYTES}, None),
    ({"usage": None}, None),
    ({"choices": []}, None),
    ([], None),
]


@pytest.mark.parametrize(("answer", "usage"), ANSWERS)
def test_an_answer_tells_its_usage(answer: Any, usage: Usage | None) -> None:
    body = json.dumps(answer).encode()
    assert read(JSON, body) == usage
    assert read(JSON, *bytewise(body)) == usage


@pytest.mark.parametrize("indent", [None, 2])
def test_of_a_large_answer_only_the_end_is_searched(indent: int | None) -> None:
    data = [{"usage": None, "embedding": [0.5] * 50_000}]
    answer = {"data": data, "note": 'a "usage": b', "usage": {"prompt_tokens": 3}, "service_tier": "x"}
    body = json.dumps(answer, indent=indent).encode()
    assert len(body) > TAIL_BYTES
    assert read(JSON, body) == Usage(3, 0, 0)
    assert read(JSON, *(body[at : at + 1_000] for at in range(0, len(body), 1_000))) == Usage(3, 0, 0)


@pytest.mark.parametrize("size_bytes", [TAIL_BYTES - 1, TAIL_BYTES, TAIL_BYTES + 40, 2 * TAIL_BYTES + 1])
def test_the_limit_does_not_depend_on_the_splitting(size_bytes: int) -> None:
    head, tail = b'{"x":[],"usage":{"prompt_tokens":3},"y":"', b'"}'
    body = head + b"y" * (size_bytes - len(head) - len(tail)) + tail
    halves = [body[: size_bytes // 2], body[size_bytes // 2 :]]
    assert read(JSON, body) == read(JSON, *halves) == (Usage(3, 0, 0) if size_bytes <= TAIL_BYTES else None)


@pytest.mark.parametrize(("first", "usage"), [({}, Usage(3, 0, 0)), ({"x": [{"usage": {"prompt_tokens": 9}}]}, None)])
def test_usage_before_a_long_list_is_read_too(first: Any, usage: Usage | None) -> None:
    answer = {**first, "model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}, "data": [0.5] * 100_000}
    body = json.dumps(answer).encode()
    assert read(JSON, body) == usage
    assert read(JSON, *(body[at : at + 1_000] for at in range(0, len(body), 1_000))) == usage


@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, 200_000), max_size=20), answer=st.sampled_from([one for one, _ in ANSWERS]))
def test_an_answer_of_any_size_tells_the_same_under_any_splitting(cuts: list[int], answer: Any) -> None:
    body = json.dumps({"pad": "x" * 150_000, "answer": answer, "usage": {"prompt_tokens": 3}}).encode()
    borders = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    assert read(JSON, *(body[start:stop] for start, stop in pairwise(borders))) == Usage(3, 0, 0)


ANTHROPIC_START = {"type": "message_start", "message": {"model": "m-1", "usage": {"input_tokens": 1}}}
ANTHROPIC_END = {"type": "message_delta", "usage": {"output_tokens": 1}}
RESPONSE = {"type": "response.completed", "response": {"model": "m-1", "usage": {"input_tokens": 1}}}


@pytest.mark.parametrize(
    ("kind", "body", "model"),
    [
        (JSON, b'{"model":"m-1","usage":{"prompt_tokens":3}}', "m-1"),
        (JSON, b'{"model":"m-1"}', "m-1"),
        (b"", b'{"model":"m-1"}', "m-1"),
        (JSON, b'{"model":["odd"],"usage":null}', ""),
        (JSON, b'{"model":"' + b"x" * 300 + b'"}', ""),
        (JSON, b"{}", ""),
        (SSE, stream(token("a", model="m-1"), {"model": "m-1", "choices": [], "usage": {"prompt_tokens": 3}}), "m-1"),
        (SSE, stream(ANTHROPIC_START, ANTHROPIC_END, names=True), "m-1"),
        (SSE, stream(RESPONSE, names=True), "m-1"),
        (SSE, stream(*OPENAI), ""),
    ],
)
def test_an_answer_tells_the_model_it_is_of(kind: bytes, body: bytes, model: str) -> None:
    for pieces in ([body], bytewise(body)):
        reader: Any = OPEN.reader(CALL, 200, kind)
        for piece in pieces:
            reader.feed(piece)
        reader.finish()
        assert reader.response_model == model


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"generated_text":"twelve bytes"}', Usage(10, 0, 2, "estimated")),
        (b'{"model_name":"m","text_output":"a"}', Usage(10, 0, 1, "estimated")),
        (b'{"generated_text":"a","details":{"generated_tokens":7,"prefill":[]}}', Usage(0, 0, 7)),
        (b'[{"generated_text":"twelve bytes"}]\n', Usage(10, 0, 2, "estimated")),
        (b'[{"generated_text":"a","details":{"generated_tokens":7,"prefill":[]}}]', Usage(0, 0, 7)),
        (b"[[0.5],[0.25]]", None),
        (b"[]", None),
        (b"[", None),
        (b'{"generated_text":""}', None),
        (b'{"generated_text":["odd"]}', None),
        (b'{"error":"x"}', None),
        (b'{"generated_text":"cut', None),
    ],
)
@pytest.mark.parametrize("path", [b"/generate", b"/", b"/v2/models/m/generate?x"])
def test_a_text_whose_usage_is_not_told_is_estimated_by_its_size(path: bytes, body: bytes, usage: Usage | None) -> None:
    assert read(JSON, body, path=path) == read(JSON, *bytewise(body), path=path) == usage


def test_a_cut_answer_tells_nothing() -> None:
    assert read(JSON, b'{"usage":{"prompt_tokens":3},"x":') is None
    assert read(JSON) is None


def test_json_lines_tell_usage_on_the_last_line_that_has_it() -> None:
    lines = [{"message": {"content": "a"}, "done": False}] * 3 + [
        {"done": True, "prompt_eval_count": 4, "eval_count": 6}
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    assert read(b"application/x-ndjson", body) == Usage(4, 0, 6)
    assert read(b"application/x-ndjson", *bytewise(body)) == Usage(4, 0, 6)


@pytest.mark.parametrize("path", [b"/api/chat", b"/api/generate?x=1"])
def test_a_stream_of_ollamas_is_metered_by_its_lines_when_it_is_cut(path: bytes) -> None:
    line = b'{"model":"m","message":{"content":"x"},"done":false}\n'
    end = b'{"model":"m","done":true,"prompt_eval_count":4,"eval_count":6}\n'
    for pieces in ([line * 3], bytewise(line * 3), [line, line * 2 + line[:9]]):
        cut = OPEN.reader(Call(b"POST", path, [], body_bytes=60), 200, b"application/x-ndjson")
        assert cut is not None
        for piece in pieces:
            cut.feed(piece)
        assert cut.so_far() == cut.finish() == Usage(10, 0, 3, "estimated")  # type: ignore[attr-defined]
    whole = OPEN.reader(Call(b"POST", path, []), 200, b"application/x-ndjson")
    assert whole is not None
    assert whole.finish() is None
    whole.feed(line * 3 + end)
    assert whole.finish() == Usage(4, 0, 6)


@pytest.mark.parametrize(
    "last", [b'{"error":"out of memory"}\n', b'{"response":"","done":true,"done_reason":"load"}\n']
)
@pytest.mark.parametrize(("count", "usage"), [(0, None), (2, Usage(10, 0, 2, "estimated"))])
def test_a_line_that_tells_of_an_error_or_the_end_is_no_token(count: int, usage: Usage | None, last: bytes) -> None:
    body = b'{"model":"m","response":"x","done":false}\n' * count + last
    for pieces in ([body], bytewise(body)):
        assert read(b"application/x-ndjson", *pieces, path=b"/api/generate") == usage


def test_lines_of_another_kind_are_not_taken_for_tokens() -> None:
    pulled = OPEN.reader(Call(b"POST", b"/api/pull", []), 200, b"application/x-ndjson")
    assert pulled is not None
    pulled.feed(b'{"status":"pulling"}\n' * 9)
    assert pulled.finish() is None


@pytest.mark.parametrize("kind", [b"application/jsonl", b"application/ndjson", b"application/stream+json; x=y"])
def test_json_lines_have_several_names(kind: bytes) -> None:
    assert read(kind, b'{"done":false}\n{"done":true,"prompt_eval_count":4,"eval_count":6}\n') == Usage(4, 0, 6)


@pytest.mark.parametrize("kind", [b"text/json", b"application/vnd.x+json; charset=utf-8"])
def test_json_has_several_names(kind: bytes) -> None:
    assert read(kind, b'{"usage":{"prompt_tokens":3}}') == Usage(3, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"done":false}\n{"done":true,"prompt_eval_count":4,"eval_count":6}\n',
        b'data: {"x":1}\n\ndata: {"usage":{"prompt_tokens":4,"completion_tokens":6}}\n\ndata: [DONE]\n\n]',
        b'\xef\xbb\xbf{"usage":{"prompt_tokens":4,"completion_tokens":6}}',
    ],
    ids=["lines", "events", "mark"],
)
def test_what_is_wrongly_called_json_is_read_from_its_end(body: bytes) -> None:
    assert read(JSON, body) == read(JSON, *bytewise(body)) == Usage(4, 0, 6)


@pytest.mark.parametrize("kind", [b"", b"text/plain; charset=utf-8"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \r\n"])
@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"usage":{"prompt_tokens":3}}', Usage(3, 0, 0)),
        (b"{}", None),
        (b"", None),
        (b'a text with "usage": {"prompt_tokens": 3}', None),
        (b"event: x\n" + stream(*OPENAI), Usage(3, 0, 5)),
        (stream(*OPENAI), Usage(3, 0, 5)),
        (stream(*OPENAI[:2]), Usage(10, 0, 1, "estimated")),
    ],
)
def test_an_answer_without_a_type_is_known_by_its_start(
    kind: bytes, before: bytes, body: bytes, usage: Usage | None
) -> None:
    assert read(kind, before + body) == read(kind, *bytewise(before + body)) == usage


def test_a_stream_without_a_type_tells_what_was_delivered_and_where_it_ends() -> None:
    reader: Any = OPEN.reader(CALL, 200, b"")
    assert reader.so_far().output_tokens == 0
    reader.feed(stream(token("a"), token("b"), token("c")))
    assert (reader.so_far().output_tokens, reader.is_terminal) == (2, False)
    reader.feed(stream(b"[DONE]"))
    assert (reader.so_far().output_tokens, reader.is_terminal) == (2, True)


@pytest.mark.parametrize("path", [b"/v1/responses/resp_1/cancel", b"/openai/v1/chat/completions/c_1"])
def test_what_an_earlier_call_has_used_is_not_counted_again(path: bytes) -> None:
    assert OPEN.reader(Call(b"POST", path, []), 200, JSON) is None


def test_an_answer_of_another_type_is_not_looked_at() -> None:
    assert OPEN.reader(CALL, 200, b"audio/mpeg") is None
    assert OPEN.reader(Call(b"GET", b"/v1/files/x/content", []), 200, b"") is None
    assert OPEN.reader(Call(b"GET", b"/v1/responses/r", []), 200, JSON) is None, "the call that made it was metered"
    assert OPEN.reader(Call(b"POST", b"/v2/models/m/infer", []), 200, b"") is None


def test_what_was_delivered_is_known_before_the_stream_ends() -> None:
    reader: Any = OPEN.reader(CALL, 200, SSE)
    assert reader.so_far().output_tokens == 0
    for count in range(5):
        reader.feed(stream(token("a")))
        assert reader.so_far() == (reader.so_far() if count == 0 else Usage(len(b"{}") // 6, 0, count, "estimated"))
    reader.feed(stream(*OPENAI[2:]))
    assert reader.so_far() == reader.finish() == Usage(3, 0, 5)
