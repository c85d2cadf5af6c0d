"""The demo's inference server, tried with the official OpenAI and MCP clients."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as some
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from gpuproxy.demo import text
from gpuproxy.demo.upstream import running

PROMPT = [{"role": "user", "content": "Why is streaming fast?"}]
FLOWER = [5.1, 3.5, 1.4, 0.2]
ACCEPT = {"Accept": "application/json, text/event-stream"}
MODERN = "2026-07-28"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(token_delay_s=0) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_the_answer_speaks_of_the_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo-chat", messages=PROMPT)
    assert "Why is streaming fast?" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_it_can_reckon() -> None:
    assert text.answer("What is 17 * 23?").startswith("17 times 23 is 391.")


def test_a_stream_says_the_same_as_the_whole_answer_one_token_at_a_time(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo-chat", messages=PROMPT)
    options = {"include_usage": True}
    stream = list(
        client.chat.completions.create(model="demo-chat", messages=PROMPT, stream=True, stream_options=options)
    )
    said = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(piece or "" for piece in said) == whole.choices[0].message.content
    assert stream[-1].choices == []
    assert stream[-1].usage == whole.usage
    assert whole.usage.completion_tokens == sum(piece is not None for piece in said)


def test_a_stream_carries_no_usage_unless_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="demo-chat", messages=PROMPT, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_max_tokens_cuts_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo-chat", messages=PROMPT, max_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_completions_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo-chat", prompt="What is a token?", stop=".")
    stream = client.completions.create(model="demo-chat", prompt="What is a token?", stop=".", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert "." not in whole.choices[0].text


def test_texts_of_like_words_have_like_embeddings(client: openai.OpenAI) -> None:
    inputs = ["the cat sat on the mat", "a cat sits on a mat", "interest rates fell in March"]
    rows = client.embeddings.create(model="demo-embed", input=inputs, dimensions=256)
    first, second, third = (row.embedding for row in rows.data)
    assert math.isclose(sum(value * value for value in first), 1, abs_tol=1e-5)
    assert sum(map(float.__mul__, first, second)) > 2 * sum(map(float.__mul__, first, third))
    assert rows.usage.prompt_tokens > 0


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo-chat", "demo-embed"]


def test_a_bad_request_is_told_in_the_shape_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-9", messages=PROMPT)
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo-chat", messages=[])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", b"{"),
        ("chat/completions", b'{"model":"demo-chat","messages":[{"role":1}]}'),
        ("chat/completions", b'{"model":"demo-chat","messages":[{"role":"user"}],"stream_options":{}}'),
        ("completions", b'{"model":"demo-chat","prompt":"a","n":2}'),
        ("embeddings", b'{"model":"demo-embed","input":[]}'),
        ("embeddings", b'{"model":"demo-embed","input":[1,"a"]}'),
        ("embeddings", b'{"model":"demo-embed","input":"a","dimensions":0}'),
    ],
)
def test_what_is_malformed_is_refused(url: str, path: str, body: bytes) -> None:
    answer = requests.post(f"{url}/v1/{path}", data=body, timeout=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@given(some.text(max_size=80))
def test_any_text_is_answered_cut_and_embedded(prompt: str) -> None:
    said = text.answer(prompt)
    assert said == text.answer(prompt)
    assert "".join(text.tokens(prompt)) == prompt
    assert math.isclose(math.hypot(*text.embedding(prompt, 8)), 1, rel_tol=1e-9)


def infer(url: str, **changes: Any) -> requests.Response:
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": FLOWER} | changes
    body = {"id": "7", "inputs": [tensor]}
    return requests.post(f"{url}/v2/models/iris-centroids/infer", json=body, timeout=5)


def test_flowers_are_classified(url: str) -> None:
    answer = infer(url, shape=[2, 4], data=[FLOWER, [6.5, 3.0, 5.5, 1.8]]).json()
    assert (answer["id"], answer["model_name"]) == ("7", "iris-centroids")
    assert answer["outputs"][0] == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [2],
        "data": ["setosa", "virginica"],
    }
    assert answer["outputs"][1]["shape"] == [2, 3]


@pytest.mark.parametrize(
    "changes", [{"shape": [2, 4]}, {"datatype": "INT8"}, {"name": "x"}, {"data": ["a"] * 4}, {"shape": [4]}]
)
def test_a_wrong_tensor_is_refused_in_the_shape_of_v2(url: str, changes: dict[str, Any]) -> None:
    answer = infer(url, **changes)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_v2_tells_what_it_has(url: str) -> None:
    for path in (
        "",
        "/health/live",
        "/health/ready",
        "/models/demo-chat/ready",
        "/models/iris-centroids/versions/1",
    ):
        assert requests.get(f"{url}/v2{path}", timeout=5).status_code == 200
    assert requests.get(f"{url}/v2/models/iris-centroids/versions/2", timeout=5).status_code == 404
    assert "known: iris-centroids" in requests.get(f"{url}/v2/models/x", timeout=5).json()["error"]


def test_generate_streams_what_it_says_whole(url: str) -> None:
    body = {"text_input": "hello", "parameters": {"max_tokens": 5, "temperature": 0.1}}
    whole = requests.post(f"{url}/v2/models/demo-chat/generate", json=body, timeout=5).json()
    stream = requests.post(f"{url}/v2/models/demo-chat/generate_stream", json=body, timeout=5)
    frames = stream.text.strip().split("\n\n")
    assert len(frames) == 5
    assert all(frame.startswith("data: {") for frame in frames)
    assert whole["text_output"].startswith("Hello!")


@pytest.mark.parametrize(("mode", "version"), [("legacy", "2025-11-25"), (MODERN, MODERN), ("auto", MODERN)])
async def test_the_mcp_sdk_lists_and_calls_tools(url: str, mode: str, version: str) -> None:
    async with Client(streamable_http_client(f"{url}/mcp"), mode=mode) as client:
        assert client.protocol_version == version
        assert [tool.name for tool in (await client.list_tools()).tools] == ["add", "roll_dice"]
        assert (await client.call_tool("add", {"a": 2, "b": 3})).structured_content == {"sum": 5}
        rolls = (await client.call_tool("roll_dice", {"count": 20, "sides": 2})).structured_content
        assert rolls is not None
        assert set(rolls["rolls"]) <= {1, 2}


@pytest.mark.parametrize("mode", ["legacy", MODERN])
async def test_wrong_arguments_are_a_tool_error_and_an_unknown_tool_a_protocol_error(url: str, mode: str) -> None:
    async with Client(streamable_http_client(f"{url}/mcp"), mode=mode) as client:
        assert (await client.call_tool("add", {"a": "2"})).is_error
        assert (await client.call_tool("roll_dice", {"count": 0})).is_error
        with pytest.raises(MCPError, match="no tool 'fly'; known: add, roll_dice"):
            await client.call_tool("fly", {})


def rpc(method: str, params: dict[str, Any] | None = None, message_id: int | None = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params or {}} | (
        {} if message_id is None else {"id": message_id}
    )


def post(url: str, body: Any, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(f"{url}/mcp", json=body, headers=ACCEPT | named, timeout=5)


def test_a_session_lives_from_initialize_to_delete(url: str) -> None:
    opened = post(url, rpc("initialize", {"protocolVersion": "2025-06-18"}))
    assert opened.json()["result"]["protocolVersion"] == "2025-06-18"
    session = {"Mcp_Session_Id": opened.headers["Mcp-Session-Id"]}
    assert post(url, rpc("notifications/initialized", message_id=None), **session).status_code == 202
    assert post(url, rpc("ping"), **session).json() == {"jsonrpc": "2.0", "id": 1, "result": {}}
    assert post(url, rpc("no/such"), **session).json()["error"]["code"] == -32601
    named = {"Mcp-Session-Id": session["Mcp_Session_Id"]}
    assert requests.delete(f"{url}/mcp", headers=named, timeout=5).status_code == 204
    assert requests.delete(f"{url}/mcp", headers=named, timeout=5).status_code == 404
    assert post(url, rpc("ping"), **session).status_code == 404


def test_a_call_without_session_or_with_a_foreign_origin_is_refused(url: str) -> None:
    assert post(url, rpc("tools/list")).status_code == 400
    assert post(url, rpc("initialize"), Origin="https://evil.example").status_code == 403
    assert post(url, rpc("initialize"), Origin="http://localhost:3000").status_code == 200
    assert post(url, rpc("initialize"), Accept="application/json").status_code == 406
    assert post(url, [rpc("ping")]).status_code == 400
    assert requests.get(f"{url}/mcp", headers=ACCEPT, timeout=5).headers["Allow"] == "DELETE,POST"


def stateless(version: str = MODERN) -> dict[str, Any]:
    prefix = "io.modelcontextprotocol/"
    meta = {f"{prefix}protocolVersion": version, f"{prefix}clientCapabilities": {}}
    return rpc("tools/call", {"name": "add", "arguments": {"a": 1, "b": 2}, "_meta": meta})


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({}, 200, None),
        ({"Mcp_Name": "=?base64?YWRk?="}, 200, None),
        ({"Mcp_Name": "roll_dice"}, 400, -32020),
        ({"Mcp_Name": "=?base64?!?="}, 400, -32020),
        ({"Mcp_Method": "tools/list"}, 400, -32020),
        ({"MCP_Protocol_Version": "2025-11-25"}, 400, -32020),
    ],
)
def test_stateless_headers_must_agree_with_the_body(
    url: str, changes: dict[str, str], status: int, code: int | None
) -> None:
    headers = {"MCP_Protocol_Version": MODERN, "Mcp_Method": "tools/call", "Mcp_Name": "add"} | changes
    answer = post(url, stateless(), **headers)
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("code") == code


def test_an_unknown_revision_is_told_the_known_ones(url: str) -> None:
    headers = {"MCP_Protocol_Version": "2099-01-01", "Mcp_Method": "tools/call", "Mcp_Name": "add"}
    answer = post(url, stateless("2099-01-01"), **headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32022)
    assert MODERN in answer.json()["error"]["data"]["supported"]


def test_an_unknown_stateless_method_is_404(url: str) -> None:
    body = stateless() | {"method": "no/such"}
    answer = post(url, body, MCP_Protocol_Version=MODERN, Mcp_Method="no/such")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, -32601)
