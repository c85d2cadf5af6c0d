"""The envelope, called with requests: what comes back for each kind of answer and each kind of failure."""

import base64
from typing import Any

import pytest
import requests

from .conftest import Files, Models, Tools
from .files import some_bytes
from .gateway import Gateway

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Grüße you"}]}


def ask(gateway: Gateway, **envelope: Any) -> requests.Response:
    headers = {"X-API-Key": gateway.key}
    return requests.post(f"{gateway.url}/api/v1/gpu/proxy", headers=headers, json=envelope, timeout=8)


def test_json_is_handed_over_as_it_is(gateway: Gateway, files: Files) -> None:
    body = {"big": 12345678901234567890123, "float": 1.10, "text": "Łódź", "list": [None, True]}
    answer = ask(gateway, protocol="https", target_url=f"{files.url}/endpoint", method="POST", body=body)
    envelope = answer.json()
    assert (answer.status_code, envelope["status"], envelope["status_code"]) == (200, "success", 200)
    assert envelope["data"] == {"received": body, "content_type": "application/json"}
    assert envelope["request_id"] == answer.headers["x-request-id"]
    assert envelope["duration_ms"] > 0
    assert any(name.lower() == "content-type" for name in envelope["headers"])


def test_text_becomes_a_string(gateway: Gateway, files: Files) -> None:
    envelope = ask(gateway, protocol="https", target_url=f"{files.url}/status/200").json()
    assert envelope["data"] == "status 200"


def test_other_bytes_become_base64(gateway: Gateway, files: Files) -> None:
    envelope = ask(gateway, protocol="https", target_url=f"{files.url}/bytes/1000", method="GET").json()
    assert envelope["encoding"] == "base64"
    assert base64.b64decode(envelope["data"]) == some_bytes(1000)


def test_an_empty_answer_has_no_data(gateway: Gateway, files: Files) -> None:
    envelope = ask(gateway, protocol="https", target_url=f"{files.url}/status/204").json()
    assert (envelope["status_code"], envelope["data"] or None) == (204, None)


def test_the_upstreams_status_is_told_not_taken(gateway: Gateway, files: Files) -> None:
    answer = ask(gateway, protocol="https", target_url=f"{files.url}/status/404")
    assert (answer.status_code, answer.json()["status_code"]) == (200, 404)


def test_a_redirect_is_told_not_followed(gateway: Gateway, files: Files) -> None:
    envelope = ask(gateway, protocol="https", target_url=f"{files.url}/status/301").json()
    headers = {name.lower(): value for name, value in envelope["headers"].items()}
    assert (envelope["status_code"], headers["location"]) == (301, "/elsewhere")


def test_headers_method_and_query_are_those_of_the_envelope(gateway: Gateway, files: Files) -> None:
    headers = {"X-Custom": "1", "Authorization": "Bearer theirs"}
    envelope = ask(
        gateway, protocol="https", target_url=f"{files.url}/a%2Fb?x=%20", method="DELETE", headers=headers
    ).json()
    seen = envelope["data"]
    assert (seen["method"], seen["path"]) == ("DELETE", "/a%2Fb?x=%20")
    assert (seen["headers"]["x-custom"], seen["headers"]["authorization"]) == ("1", "Bearer theirs")
    assert gateway.key not in str(envelope)


def test_without_a_body_the_method_is_get(gateway: Gateway, files: Files) -> None:
    assert ask(gateway, protocol="https", target_url=f"{files.url}/x").json()["data"]["method"] == "GET"


def test_a_streaming_body_is_answered_by_the_stream(gateway: Gateway, models: Models) -> None:
    headers = {"Authorization": "Bearer sk-upstream-secret"}
    body = {**CHAT, "stream": True}
    answer = ask(gateway, protocol="openinference", target_url=models.url, headers=headers, body=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.startswith(b"data: {")
    assert answer.content.endswith(b"data: [DONE]\n\n")


def test_usage_is_told_where_the_model_tells_it(gateway: Gateway, models: Models) -> None:
    headers = {"Authorization": "Bearer sk-upstream-secret"}
    envelope = ask(gateway, protocol="openinference", target_url=models.url, headers=headers, body=CHAT).json()
    assert envelope["data"]["choices"][0]["message"]["content"] == "echo: Grüße you"
    assert (envelope["usage"]["input_tokens"], envelope["usage"]["output_tokens"]) == (2, 3)


def test_a_bare_mcp_body_is_completed_to_json_rpc(gateway: Gateway, tools: Tools) -> None:
    body = {"method": "inference", "params": {"model": "llama-2", "prompt": "Hello, world!"}}
    envelope = ask(gateway, protocol="mcp", target_url=tools.url("tools"), body=body).json()
    assert (envelope["status_code"], envelope["data"]["jsonrpc"]) == (404, "2.0")
    assert envelope["data"]["error"]["code"] == -32601
    assert envelope["data"]["id"]


def test_a_tool_is_called_by_envelope(gateway: Gateway, tools: Tools) -> None:
    params = {"name": "add", "arguments": {"a": 2, "b": 3}}
    body = {"method": "tools/call", "params": params, "id": "mine"}
    data = ask(gateway, protocol="mcp", target_url=tools.url("tools"), body=body).json()["data"]
    assert (data["id"], data["result"]["content"][0]["text"]) == ("mine", "5")


def test_a_streamed_tool_result_is_collapsed_to_its_end(gateway: Gateway, tools: Tools) -> None:
    params = {"name": "count", "arguments": {"to": 3}, "_meta": {"progressToken": "p"}}
    body = {"method": "tools/call", "params": params}
    data = ask(gateway, protocol="mcp", target_url=tools.url("tools"), body=body).json()["data"]
    assert data["result"]["content"][0]["text"] == "done"


@pytest.mark.parametrize(
    ("envelope", "status", "code", "word"),
    [
        ({"protocol": "mpc", "target_url": "https://api.example.com/"}, 400, "UNKNOWN_PROTOCOL", "mcp"),
        ({"protocol": "https", "target_url": "http://10.1.2.3/"}, 403, "TARGET_FORBIDDEN", "10.1.2.3"),
        ({"protocol": "https", "target_url": "http://169.254.169.254/"}, 403, "TARGET_FORBIDDEN", "169.254"),
        ({"protocol": "https", "target_url": "ftp://api.example.com/"}, 400, "BAD_REQUEST", "ftp"),
        ({"protocol": "https"}, 400, "INVALID_JSON", "target_url"),
    ],
)
def test_a_refusal_names_what_is_wrong(
    gateway: Gateway, envelope: dict[str, str], status: int, code: str, word: str
) -> None:
    answer = ask(gateway, **envelope)
    refusal = answer.json()
    assert (answer.status_code, refusal["code"]) == (status, code)
    assert word in refusal["error"]
    assert refusal["request_id"]


def test_an_upstream_that_is_not_there_is_a_bad_gateway(gateway: Gateway, dead_port: int) -> None:
    answer = ask(gateway, protocol="https", target_url=f"http://127.0.0.1:{dead_port}/")
    assert (answer.status_code, answer.json()["code"]) == (502, "UPSTREAM_UNREACHABLE")


@pytest.mark.parametrize("path", ["silent", "gated"])
def test_an_upstream_is_given_up_in_the_time_set(gateway: Gateway, files: Files, path: str) -> None:
    files.thread.loop.call_soon_threadsafe(files.server.gate.clear)
    answer = ask(gateway, protocol="https", target_url=f"{files.url}/{path}", timeout_s=0.2)
    assert (answer.status_code, answer.json()["code"]) == (504, "UPSTREAM_TIMEOUT")


def test_an_upstream_that_breaks_off_is_a_bad_gateway(gateway: Gateway, models: Models) -> None:
    headers = {"Authorization": "Bearer sk-upstream-secret"}
    body = {**CHAT, "model": "cut-body"}
    answer = ask(gateway, protocol="openinference", target_url=models.url, headers=headers, body=body)
    assert (answer.status_code, answer.json()["code"]) == (502, "UPSTREAM_INVALID")
