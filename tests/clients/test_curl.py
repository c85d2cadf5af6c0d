"""curl, and WebSocket clients: plain HTTP in all its forms goes through unchanged."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from .conftest import Files, Models, Way
from .files import some_bytes
from .gateway import Gateway
from .upstreams import SECRET

CALL_S = "20"
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hello you"}]}


def curl(way: Way, *words: str, stdin: bytes | None = None) -> bytes:
    line = ["curl", "-sS", "--max-time", CALL_S, "-H", f"X-API-Key: {way.key}", *words]
    return subprocess.run(line, input=stdin, capture_output=True, check=True).stdout


def status_of(way: Way, *words: str) -> int:
    return int(curl(way, "-o", "/dev/null", "-w", "%{http_code}", *words))


@pytest.mark.parametrize("prefix", ["/api/v1/gpu/proxy/v1", "/v1"])
def test_a_chat_goes_by_the_long_path_and_the_short(gateway: Gateway, prefix: str) -> None:
    way = Way("gateway", gateway.url, gateway.key)
    answer = json.loads(curl(way, f"{gateway.url}{prefix}/chat/completions", "--json", json.dumps(CHAT)))
    assert answer["choices"][0]["message"]["content"] == "echo: hello you"


def test_a_line_arrives_before_the_next_is_sent(file_way: Way, files: Files) -> None:
    files.thread.loop.call_soon_threadsafe(files.server.gate.clear)
    line = ["curl", "-sSN", "--max-time", CALL_S, "-H", f"X-API-Key: {file_way.key}", f"{file_way.url}/gated"]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        files.thread.loop.call_soon_threadsafe(files.server.gate.set)
        assert process.stdout.readline() == b"second\n"
    assert process.returncode == 0


def test_a_client_that_expects_100_continue_gets_it(file_way: Way, tmp_path: Path) -> None:
    content = some_bytes(2_000_000)
    (tmp_path / "body").write_bytes(content)
    line = [
        "curl",
        "-sSv",
        "--max-time",
        CALL_S,
        "-H",
        f"X-API-Key: {file_way.key}",
        "-H",
        "Expect: 100-continue",
    ]
    line += ["--expect100-timeout", "10", "--data-binary", f"@{tmp_path}/body", f"{file_way.url}/digest"]
    done = subprocess.run(line, capture_output=True, check=True)
    assert b"< HTTP/1.1 100" in done.stderr
    assert json.loads(done.stdout)["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("words", [(), ("-H", "Transfer-Encoding: chunked")], ids=["sized", "chunked"])
def test_a_large_upload_arrives_whole(file_way: Way, words: tuple[str, ...]) -> None:
    content = some_bytes(20_000_000)
    told = json.loads(curl(file_way, *words, "-T", "-", f"{file_way.url}/digest", stdin=content))
    assert (told["size"], told["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("query", ["", "?chunked"])
def test_a_large_download_arrives_whole(file_way: Way, query: str) -> None:
    content = curl(file_way, f"{file_way.url}/bytes/30000000{query}")
    assert hashlib.sha256(content).digest() == hashlib.sha256(some_bytes(30_000_000)).digest()


def test_the_head_of_an_answer_can_be_had_alone(file_way: Way) -> None:
    head = curl(file_way, "-I", f"{file_way.url}/bytes/12345").decode().lower()
    assert head.startswith("http/1.1 200")
    assert "content-length: 12345\r\n" in head


@pytest.mark.parametrize("query", ["", "?chunked"])
def test_a_client_of_http_1_0_is_served(file_way: Way, query: str) -> None:
    assert curl(file_way, "--http1.0", f"{file_way.url}/bytes/100000{query}") == some_bytes(100_000)


@pytest.mark.parametrize("status", [204, 304, 301, 404, 418, 500, 503])
def test_a_status_is_handed_over(file_way: Way, status: int) -> None:
    assert status_of(file_way, f"{file_way.url}/status/{status}") == status


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_method_is_handed_over(file_way: Way, method: str) -> None:
    seen = json.loads(curl(file_way, "-X", method, f"{file_way.url}/any"))
    assert (seen["method"], seen["body"]) == (method, "")


@pytest.mark.parametrize("path", ["/a%2Fb/%C5%81/x;y=1?q=%20&r=+&r=%2B", "/a//b/./c/../d", "/?", "/~!$&'()*,=:@"])
def test_path_and_query_are_handed_over_byte_for_byte(file_way: Way, path: str) -> None:
    assert json.loads(curl(file_way, "--path-as-is", "-g", f"{file_way.url}{path}"))["path"] == path


def test_a_connection_serves_many_calls(file_way: Way) -> None:
    words = [word for number in range(20) for word in (f"{file_way.url}/n{number}", "-o", "/dev/null")]
    connects = curl(file_way, "-w", "%{num_connects}", *words)
    assert connects == b"1" + b"0" * 19


def test_the_callers_key_stays_at_the_gateway(gateway: Gateway) -> None:
    way = Way("gateway", f"{gateway.url}/api/v1/gpu/proxy/upstreams/files", gateway.key)
    seen = json.loads(curl(way, "-H", "X-Request-Id: my-id-1", "-H", "X-Custom: kept", f"{way.url}/any"))
    assert gateway.key not in json.dumps(seen)
    assert seen["headers"]["x-custom"] == "kept"
    assert seen["headers"]["x-request-id"] == "my-id-1"
    assert seen["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert "via" in seen["headers"]


def test_the_upstream_gets_its_own_key(gateway: Gateway, models: Models) -> None:
    way = Way("gateway", gateway.url, gateway.key)
    curl(way, f"{gateway.url}/v1/chat/completions", "--json", json.dumps(CHAT))
    assert models.server.seen[-1].headers["authorization"] == f"Bearer {SECRET}"
    assert all(gateway.key not in str(seen.headers) for seen in models.server.seen)


def test_an_answer_carries_a_request_id(gateway: Gateway) -> None:
    way = Way("gateway", gateway.url, gateway.key)
    assert (
        "x-request-id:" in curl(way, "-I", f"{gateway.url}/api/v1/gpu/proxy/upstreams/files/bytes/1").decode().lower()
    )


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/v1/gpu/proxy/upstreams/nothing/x", 404, "UNKNOWN_UPSTREAM"),
        ("/api/v1/gpu/proxy/upstreams/nobody/x", 502, "UPSTREAM_UNREACHABLE"),
        ("/api/v1/no-such-path", 404, "NOT_FOUND"),
    ],
)
def test_the_gateways_own_refusals_say_why(gateway: Gateway, path: str, status: int, code: str) -> None:
    answer = requests.get(gateway.url + path, headers={"X-API-Key": gateway.key}, timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "gp_wrong"}, {"Authorization": "Bearer gp_wrong"}])
def test_without_a_valid_key_nothing_goes_through(gateway: Gateway, headers: dict[str, str]) -> None:
    answer = requests.get(f"{gateway.url}/api/v1/gpu/proxy/upstreams/files/any", headers=headers, timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHORIZED")


def test_invalid_json_is_refused_with_its_position(gateway: Gateway) -> None:
    headers = {"X-API-Key": gateway.key, "Content-Type": "application/json"}
    url = f"{gateway.url}/v1/chat/completions"
    answer = requests.post(url, headers=headers, data='{"model": "chat", x}', timeout=20)
    assert answer.status_code == 400
    assert "byte 18" in answer.json()["error"]["message"]


async def test_a_websocket_is_tunnelled_to_the_upstream(file_way: Way) -> None:
    headers = {"X-API-Key": file_way.key}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{file_way.url}/ws", headers=headers, protocols=("echo",), max_msg_size=0) as socket,
    ):
        assert socket.protocol == "echo"
        await socket.send_str("Grüße")
        assert await socket.receive_str() == "Grüße"
        await socket.send_bytes(some_bytes(3_000_000))
        assert await socket.receive_bytes() == some_bytes(3_000_000)
        await socket.send_str("goodbye")
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 4001


async def test_the_event_channel_is_reached(gateway: Gateway) -> None:
    headers = {"X-API-Key": gateway.key}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{gateway.url}/ws", headers=headers) as socket,
    ):
        await socket.send_json({"type": "subscribe", "channels": ["no-such-channel"]})
        answer: Any = await socket.receive_json()
        assert (answer["type"], answer["payload"]["code"]) == ("error", "UNKNOWN_CHANNEL")


def test_a_tunnel_needs_a_key(gateway: Gateway) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    answer = requests.get(f"{gateway.url}/api/v1/gpu/proxy/upstreams/files/ws", headers=headers, timeout=20)
    assert answer.status_code == 401
