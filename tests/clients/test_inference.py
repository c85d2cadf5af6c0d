"""Every shape of inference besides chats: the same through the gateway as without it, and metered."""

import json
import time
from array import array
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
import requests

from .conftest import Native, Way
from .gateway import Gateway
from .inference import V2, WORDS

TEXT = "".join(WORDS)
MESSAGES = [{"role": "user", "content": "Hi there"}]
TENSOR = {"name": "x", "shape": [3], "datatype": "FP32"}
SOUND = bytes(range(256)) * 40
TOO_LONG_S = 20


def call(way: Way, method: str, path: str, **says: Any) -> requests.Response:
    headers = {"X-API-Key": way.key, **says.pop("headers", {})}
    return requests.request(method, way.url + path, headers=headers, timeout=TOO_LONG_S, **says)


def named(way: Way) -> Way:
    """Return the way to the server by its name, for paths that name no model."""
    return way if way.name == "direct" else way._replace(url=f"{way.url}/upstreams/native")


# -- Open Inference V2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v2/models/dense", {"name": "dense", "platform": "tests", "inputs": [], "outputs": []}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
    ],
)
def test_a_v2_server_tells_about_itself(native_way: Way, path: str, told: Any) -> None:
    way = native_way if "models" in path else named(native_way)
    assert call(way, "GET", path).json() == told


def test_tensors_pass_as_json(native_way: Way) -> None:
    asked = {"id": "7", "inputs": [{**TENSOR, "data": [1.5, -2.0, 0.25]}]}
    told = call(native_way, "POST", "/v2/models/dense/infer", json=asked).json()
    assert (told["id"], told["outputs"][0]["data"]) == ("7", [3.0, -4.0, 0.5])


@pytest.mark.parametrize("size", [3, 500_000], ids=["small", "large"])
def test_tensors_pass_as_bytes_with_the_length_of_their_head(native_way: Way, size: int) -> None:
    numbers = array("f", [number / 4 for number in range(size)])
    parameters = {"binary_data_size": 4 * size}
    head = json.dumps({"inputs": [{**TENSOR, "shape": [size], "parameters": parameters}]}).encode()
    headers = {V2: str(len(head)), "Content-Type": "application/octet-stream"}
    answer = call(native_way, "POST", "/v2/models/dense/infer", data=head + numbers.tobytes(), headers=headers)
    told_size = int(answer.headers[V2])
    told = json.loads(answer.content[:told_size])
    assert told["outputs"][0]["parameters"] == parameters
    assert array("f", answer.content[told_size:]) == array("f", [2 * number for number in numbers])


def test_a_v2_model_generates_whole_and_streamed(native_way: Way) -> None:
    asked = {"text_input": "Hi there"}
    assert call(native_way, "POST", "/v2/models/dense/generate", json=asked).json()["text_output"] == TEXT
    answer = call(native_way, "POST", "/v2/models/dense/generate_stream", json=asked)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(line[5:]) for line in answer.text.split("\n\n") if line]
    assert "".join(event["text_output"] for event in events) == TEXT
    refused = call(native_way, "POST", "/v2/models/dense/generate_stream", json={"text_input": ""})
    assert (refused.status_code, refused.json()) == (400, {"error": "text_input is empty"})


# -- TGI and Ollama ---------------------------------------------------------------------------------------------


def test_tgi_answers_in_its_own_shape(native_way: Way) -> None:
    way, asked = named(native_way), {"inputs": "Hi there", "parameters": {"max_new_tokens": 9}}
    assert call(way, "POST", "/generate", json=asked).json()["generated_text"] == TEXT
    lines = call(way, "POST", "/generate_stream", json=asked).text.split("\n\n")
    assert "".join(json.loads(line[5:])["token"]["text"] for line in lines if line) == TEXT


def test_ollama_answers_in_its_own_shape(native_way: Way) -> None:
    way, asked = named(native_way), {"model": "llama", "messages": MESSAGES}
    answer = call(way, "POST", "/api/chat", json=asked)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    *lines, last = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == TEXT
    assert last["eval_count"] == len(WORDS)
    whole = call(way, "POST", "/api/generate", json={"model": "llama", "prompt": "Hi", "stream": False})
    assert whole.json()["response"] == TEXT


# -- forms, sounds and pictures ---------------------------------------------------------------------------------


def test_a_sound_is_transcribed(native_way: Way) -> None:
    with openai.OpenAI(base_url=f"{native_way.url}/v1", api_key=native_way.key, max_retries=0) as client:
        told = client.audio.transcriptions.create(model="whisper", file=("Grüße.mp3", SOUND))
    assert told.text == f"whisper: Grüße.mp3, {len(SOUND)} bytes, 00010203"


def test_a_text_is_spoken(native_way: Way) -> None:
    with openai.OpenAI(base_url=f"{native_way.url}/v1", api_key=native_way.key, max_retries=0) as client:
        told = client.audio.speech.create(model="speech", voice="alloy", input="x" * 1_000)
    assert told.content == bytes(range(256)) * 1_000


def test_a_picture_is_changed(native_way: Way) -> None:
    with openai.OpenAI(base_url=f"{native_way.url}/v1", api_key=native_way.key, max_retries=0) as client:
        told = client.images.edit(model="paint", image=("a.png", SOUND), prompt="more")
    assert told.data is not None
    assert bytes.fromhex(told.data[0].b64_json or "") == SOUND


def test_tokens_are_counted(native_way: Way) -> None:
    with anthropic.Anthropic(base_url=native_way.url, api_key=native_way.key, max_retries=0) as client:
        asked: Any = MESSAGES
        assert client.messages.count_tokens(model="claude", messages=asked).input_tokens == 2


# -- a target without a path ------------------------------------------------------------------------------------

SHAPES: list[tuple[Any, str]] = [
    ({"model": "m", "messages": MESSAGES}, "/v1/chat/completions"),
    ({"model": "m", "messages": MESSAGES, "system": "x"}, "/v1/messages"),
    ({"model": "m", "prompt": "x"}, "/v1/completions"),
    ({"model": "m", "input": "x", "encoding_format": "float"}, "/v1/embeddings"),
    ({"model": "m", "input": "x"}, "/v1/responses"),
]


@pytest.mark.parametrize(("body", "path"), SHAPES, ids=[path for _, path in SHAPES])
def test_a_target_without_a_path_gets_the_one_for_its_body(
    gateway: Gateway, native: Native, body: Any, path: str
) -> None:
    asked = {"protocol": "openinference", "target_url": native.url, "body": body}
    answer = requests.post(
        f"{gateway.url}/api/v1/gpu/proxy", json=asked, headers={"X-API-Key": gateway.key}, timeout=TOO_LONG_S
    )
    assert answer.json()["data"] == {"path": path, "type": "application/json"}


NATIVE_SHAPES: list[tuple[Any, Callable[[Any], Any]]] = [
    ({"model": "m", "inputs": [{**TENSOR, "data": [1, 2, 3]}]}, lambda data: data["outputs"][0]["data"][2] == 6),
    ({"model": "m", "text_input": "x"}, lambda data: data["text_output"] == TEXT),
    ({"inputs": "x", "parameters": {}}, lambda data: data["generated_text"] == TEXT),
    ({"model": "m", "prompt": "x", "stream": False, "options": {}}, lambda data: data["response"] == TEXT),
    ({"model": "m", "messages": MESSAGES, "keep_alive": 0}, lambda data: '"eval_count": 3' in data),
]


@pytest.mark.parametrize(
    ("body", "is_right"), NATIVE_SHAPES, ids=["tensors", "v2 text", "tgi", "ollama", "ollama chat"]
)
def test_so_does_a_body_of_another_shape(
    gateway: Gateway, native: Native, body: Any, is_right: Callable[[Any], bool]
) -> None:
    asked = {"protocol": "openinference", "target_url": native.url, "body": body}
    answer = requests.post(
        f"{gateway.url}/api/v1/gpu/proxy", json=asked, headers={"X-API-Key": gateway.key}, timeout=TOO_LONG_S
    )
    assert is_right(answer.json()["data"]), answer.text


# -- errors and usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/audio/transcriptions", dict),
        ("/v1/messages/count_tokens", dict),
        ("/v2/models/nope/infer", str),
        ("/v2/models/nope/generate_stream", str),
    ],
)
def test_errors_are_told_in_the_dialect_of_the_path(gateway: Gateway, path: str, kind: type) -> None:
    body: Any = {"json": {"model": "nope"}} if "audio" not in path else {"files": {"model": (None, "nope")}}
    answer = requests.post(gateway.url + "/api/v1/gpu/proxy" + path, headers={"X-API-Key": gateway.key}, **body)
    told = answer.json()
    assert answer.status_code == 404
    assert isinstance(told["error"], kind)
    assert (told.get("type") == "error") is ("messages" in path)


def test_all_of_it_is_metered(gateway: Gateway, native: Native) -> None:
    key = gateway.new_key(f"shapes{time.time_ns()}@example.com")
    way = Way("gateway", f"{gateway.url}/api/v1/gpu/proxy", key)
    asked = {"model": "llama", "messages": MESSAGES}
    call(named(way), "POST", "/api/chat", json=asked)  # 2 in, 3 out
    call(named(way), "POST", "/api/chat", json={**asked, "stream": False})
    call(named(way), "POST", "/generate", json={"inputs": "Hi"})
    call(named(way), "POST", "/generate_stream", json={"inputs": "Hi"})
    call(way, "POST", "/v1/audio/transcriptions", files={"model": (None, "whisper"), "file": ("a", b"x")})  # 14, 3
    call(way, "POST", "/v1/images/edits", files={"model": (None, "paint"), "image": ("a", b"x")})  # 50, 50
    call(way, "POST", "/v2/models/dense/infer", json={"inputs": [{**TENSOR, "data": [1, 2, 3]}]})
    call(way, "POST", "/v2/models/dense/generate_stream", json={"text_input": "Hi"})  # each event is a token
    usage = gateway.usage(key, lambda usage: usage["requests"] == 8)
    streamed_bytes = len('{"text_input": "Hi"}')
    assert (usage["input_tokens"], usage["output_tokens"]) == (8 + 14 + 50 + streamed_bytes // 6, 12 + 3 + 50 + 3)
    models = requests.get(
        f"{gateway.url}/api/v1/user/usage/calls", headers={"X-API-Key": key}, timeout=TOO_LONG_S
    ).json()["data"]
    assert sorted(each["model"] for each in models) == ["", "", "dense", "dense", "llama", "llama", "paint", "whisper"]


def test_a_native_stream_that_is_left_is_metered_by_what_was_delivered(gateway: Gateway, native: Native) -> None:
    key = gateway.new_key(f"left{time.time_ns()}@example.com")
    url = f"{gateway.url}/api/v1/gpu/proxy/upstreams/native/api/chat"
    asked = {"model": "gated", "messages": MESSAGES}
    with requests.post(url, json=asked, headers={"X-API-Key": key}, stream=True, timeout=TOO_LONG_S) as answer:
        lines = answer.iter_lines()
        assert [json.loads(next(lines))["message"]["content"] for _ in range(2)] == WORDS[:2]
    usage = gateway.usage(key, lambda usage: usage["requests"] == 1)
    native.thread.loop.call_soon_threadsafe(native.server.gate.set)  # no sooner: more would be delivered meanwhile
    assert usage["output_tokens"] == 2
