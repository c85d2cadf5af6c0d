"""OpenAI's WebSockets: what their events tell of usage, and that a client stays with the model it asked for."""

import json
from typing import Any

import pytest
from gpuproxy_plugins.openinference import OpenInference
from gpuproxy_plugins.openinference_realtime import RealtimeReader, ResponsesReader

from gpuproxy.plugin import Call, GatewayError, Intent, Usage

OPEN = OpenInference()
COUNTS = {"input_tokens": 10, "output_tokens": 4, "input_token_details": {"cached_tokens": 3}}


def reader(path: bytes = b"/v1/realtime?model=m") -> RealtimeReader:
    made = OPEN.reader(Call(b"GET", path, []), 101, b"websocket")
    assert isinstance(made, RealtimeReader)
    return made


def check(message: bytes) -> str:
    made = reader(b"/v1/responses?model=m")
    assert isinstance(made, ResponsesReader)
    return made.check(message)


def event(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


def fed(*events: bytes) -> RealtimeReader:
    made = reader()
    for each in events:
        made.feed(each)
    return made


def done(kind: str = "response.done", **usage: Any) -> bytes:
    return event(kind, response={"id": "r", "usage": usage or COUNTS})


DELTA = event("response.output_audio.delta", delta="UklGRg==")


def test_the_usage_of_all_answers_is_summed_up() -> None:
    assert fed(DELTA, DELTA, done(), DELTA, done()).finish() == Usage(20, 6, 8)


@pytest.mark.parametrize("kind", ["response.done", "response.completed", "response.incomplete", "response.failed"])
def test_every_end_of_an_answer_tells_it(kind: str) -> None:
    assert fed(done(kind)).finish() == Usage(10, 3, 4)


def test_the_responses_api_spells_cached_tokens_otherwise() -> None:
    told = {"input_tokens": 9, "output_tokens": 1, "input_tokens_details": {"cached_tokens": 8}}
    assert fed(done("response.completed", **told)).finish() == Usage(9, 8, 1)


def test_what_was_delivered_of_an_answer_that_is_not_over_is_counted() -> None:
    assert fed(DELTA, DELTA).finish() == Usage(0, 0, 2, "estimated")
    assert fed(done(), DELTA).so_far() == Usage(10, 3, 5, "estimated")
    assert fed(done(), DELTA, done()).so_far() == Usage(20, 6, 8)


@pytest.mark.parametrize("response", [{"status": "cancelled"}, {"usage": None}, {"usage": {"input_tokens": -1}}, None])
def test_of_an_answer_that_tells_none_the_delivered_events_stay_counted(response: Any) -> None:
    failed = event("response.done", response=response)
    assert fed(DELTA, DELTA, failed).finish() == Usage(0, 0, 2, "estimated")
    assert fed(DELTA, DELTA, failed, failed, DELTA, done()).finish() == Usage(10, 3, 6, "estimated")
    assert not fed(DELTA, failed).is_amid
    assert fed(failed).finish() is None


def test_what_a_client_says_has_a_token_a_byte_but_for_sounds_and_pictures() -> None:
    said = event("conversation.item.create", item={"content": [{"type": "input_text", "text": "x" * 5_000}]})
    assert reader().weigh(said) == len(said)
    assert reader().weigh(event("input_audio_buffer.append", audio="A" * 48_000)) == 48
    picture = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo" + "A" * 1_000_000}
    assert reader().weigh(event("conversation.item.create", item={"content": [picture]})) < 66_000


def test_counts_may_be_written_as_they_like() -> None:
    assert fed(done(input_tokens=10.0, output_tokens="4")).finish() == Usage(10, 0, 4)


def test_a_transcription_counts_and_ends_no_answer() -> None:
    said = event("conversation.item.input_audio_transcription.completed", usage={"input_tokens": 5, "output_tokens": 2})
    timed = event("conversation.item.input_audio_transcription.completed", usage={"type": "duration", "seconds": 2})
    assert fed(DELTA, said, timed).finish() == Usage(5, 0, 3, "estimated")


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"{",
        b'"usage"',
        event("session.created", session={"usage": 1}),
        event("response.created", response={"usage": None}),
        event("response.done", response={"usage": None}),
        event("response.done", response=None),
        event("conversation.item.input_audio_transcription.delta", delta="x"),
        event("rate_limits.updated", text='"type": "response.x.delta"'),
        event("error", error={"message": '"usage"'}),
    ],
)
def test_nothing_else_is_taken_for_usage(other: bytes) -> None:
    assert fed(other).finish() is None


def test_a_delta_that_talks_of_usage_is_one_event() -> None:
    assert fed(event("response.output_text.delta", delta="x", usage="no")).finish() == Usage(0, 0, 1, "estimated")
    assert fed(event("response.output_text.delta", delta='say "usage"')).finish() == Usage(0, 0, 1, "estimated")


@pytest.mark.parametrize("path", [b"/v1/realtime?model=m", b"/v1/responses?x=1&model=m"])
def test_the_url_names_the_model(path: bytes) -> None:
    call = Call(b"GET", path, [])
    assert OPEN.inspect(call) == OPEN.describe(call) == Intent("m", is_stream=True)
    assert OPEN.prepare(call, Intent("m")).identity, "frames must be readable"


@pytest.mark.parametrize(
    "query", [b"", b"?intent=transcription", b"?model=", b"?model=a&model=b", b"?model=%0300d" % 0]
)
@pytest.mark.parametrize("path", [b"/v1/realtime", b"/v1/responses"])
def test_a_url_that_names_no_model_is_refused(path: bytes, query: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        OPEN.inspect(Call(b"GET", path + query, []))
    assert (caught.value.code, caught.value.param) == ("BAD_REQUEST", "model")
    OPEN.describe(Call(b"GET", path + query, []))  # to an upstream by its name it passes


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/responses/r_1", b"/x"])
def test_other_tunnels_are_not_read(path: bytes) -> None:
    assert OPEN.reader(Call(b"GET", path, []), 101, b"websocket") is None


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ({"type": "response.create", "model": "m"}, True),
        ({"type": "response.create", "model": "dear"}, False),
        ({"type": "response.create", "response": {"model": "dear"}}, False),
        ({"type": "response.create", "model": ["dear"]}, False),
        ({"type": "response.create", "model": None}, True),
        ({"type": "x", "session": {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}}, True),
        ({"type": "response.create", "input": 'the "model" says'}, True),
        ({"type": "response.create", "response": 7, "model": "m"}, False),
    ],
)
def test_a_client_stays_with_the_model_of_the_url(said: Any, passes: bool) -> None:
    assert (check(json.dumps(said).encode()) == "") is passes


def test_where_the_model_cannot_change_nothing_is_checked() -> None:
    assert not hasattr(reader(b"/v1/realtime?model=m"), "check")


@pytest.mark.parametrize("path", [b"/v1/realtime", b"/v1/responses", b"/v1/responses?model="])
def test_a_url_that_names_no_model_leaves_none_for_the_events_to_name(path: bytes) -> None:
    made = reader(path)
    assert isinstance(made, ResponsesReader)
    for said in ({"model": "m"}, {"response": {"model": "m"}}, {"session": {"model": "m"}}):
        assert "?model=" in made.check(json.dumps({"type": "x", **said}).encode())
    transcribing = {"session": {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}}
    assert made.check(json.dumps({"type": "session.update", **transcribing}).encode()) == ""


def test_a_key_in_disguise_is_seen_through() -> None:
    assert "not 'dear'" in check(b'{"mod\\u0065l":"dear"}')
    assert "cannot be read" in check(b'{"model":"dear"')
