"""The client library against a scripted gateway: what it sends, what it returns, what it raises."""

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from scripted_gateway import ScriptedGateway, answer, scripted_gateway

import gpuproxy
from gpuproxy.client import ProxyStream


def cut_after_the_head(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"data: half")
    handler.close_connection = True


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as server:
        yield server


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[gpuproxy.Client]:
    with gpuproxy.Client(gateway.url, "gp_key", sleep=lambda seconds: None) as client:
        yield client


def test_a_proxy_request_sends_only_what_was_given(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    client.proxy_request("https", "https://api.example.com/x", body={"a": 1})
    method, path, headers, sent = gateway.asked[0]
    assert (method, path) == ("POST", "/api/v1/gpu/proxy")
    assert (headers["x-api-key"], headers["content-type"]) == ("gp_key", "application/json")
    assert sent == {"protocol": "https", "target_url": "https://api.example.com/x", "body": {"a": 1}}


def test_a_proxy_request_returns_the_envelope_as_it_came(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    envelope = {"data": {"x": [1, None]}, "status": "success", "status_code": 500, "headers": {}}
    gateway.script = lambda handler, body: answer(handler, 200, envelope)
    assert client.proxy_request("https", "https://api.example.com/x", method="GET") == envelope


def test_a_time_limit_is_told_to_the_gateway(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    client.proxy_request("https", "https://api.example.com/x", timeout_s=2.5)
    assert gateway.asked[0][3]["timeout_s"] == 2.5


def test_a_refusal_is_raised_with_its_code_status_and_request_id(
    gateway: ScriptedGateway, client: gpuproxy.Client
) -> None:
    refusal = {"error": "slow down", "code": "RATE_LIMITED", "request_id": "r-1"}
    gateway.script = lambda handler, body: answer(handler, 429, refusal, Retry_After="7")
    with pytest.raises(gpuproxy.GpuproxyError) as caught:
        client.proxy_request("https", "https://api.example.com/x")
    error = caught.value
    assert (error.code, error.status, error.request_id, error.retry_after_s) == (
        "RATE_LIMITED",
        429,
        "r-1",
        7,
    )
    assert str(error) == "slow down (RATE_LIMITED, request r-1)"


def test_an_error_page_of_something_else_is_raised_with_its_status(
    gateway: ScriptedGateway, client: gpuproxy.Client
) -> None:
    gateway.script = lambda handler, body: answer(handler, 503, b"<h1>sorry</h1>", X_Request_Id="r-2")
    with pytest.raises(gpuproxy.GpuproxyError, match="503") as caught:
        client.get("/user/usage")
    assert (caught.value.code, caught.value.status, caught.value.request_id) == ("INVALID_ANSWER", 503, "r-2")


def test_an_answer_that_is_not_json_is_no_answer(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    gateway.script = lambda handler, body: answer(handler, 200, b"hello")
    with pytest.raises(gpuproxy.GpuproxyError, match="something else than JSON") as caught:
        client.get("/user/usage")
    assert caught.value.code == "INVALID_ANSWER"


def test_a_gateway_that_is_not_there_is_a_connection_failure(gateway: ScriptedGateway) -> None:
    with (
        gpuproxy.Client("http://127.0.0.1:1/api/v1", "k") as client,
        pytest.raises(gpuproxy.GpuproxyError) as caught,
    ):
        client.get("/user/usage")
    assert (caught.value.code, caught.value.status) == ("CONNECTION_FAILED", 0)


def test_paths_bodies_and_queries_go_where_they_are_told(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    client.get("/user/usage", params={"group_by": "model"})
    client.post("/admin/credits/add", {"amount": 100.0})
    client.put("webhooks/1", {"url": "https://x.example"})
    assert [call[:2] + call[3:] for call in gateway.asked] == [
        ("GET", "/api/v1/user/usage?group_by=model", None),
        ("POST", "/api/v1/admin/credits/add", {"amount": 100.0}),
        ("PUT", "/api/v1/webhooks/1", {"url": "https://x.example"}),
    ]


def test_an_empty_answer_is_none(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    gateway.script = lambda handler, body: answer(handler, 200, b"")
    assert client.delete("/auth/apikey/1") is None


def test_a_stream_arrives_as_the_upstream_sent_it(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    gateway.script = lambda handler, body: answer(handler, 200, b"data: 1\n\n", Content_Type="text/event-stream")
    stream = client.proxy_request("openinference", "http://x.example", body={"stream": True}, stream=True)
    assert isinstance(stream, ProxyStream)
    assert (stream.status_code, stream.headers["content-type"]) == (200, "text/event-stream")
    assert b"".join(stream) == b"data: 1\n\n"
    assert gateway.asked[0][3]["stream"] is True


def test_an_upstreams_refusal_of_a_stream_is_handed_over(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    body = b'{"error": {"message": "no"}}'
    gateway.script = lambda handler, sent: answer(handler, 429, body)
    with client.proxy_request("openinference", "http://x.example", body={}, stream=True) as stream:
        assert (stream.status_code, b"".join(stream)) == (429, body)


def test_the_gateways_refusal_of_a_stream_is_raised(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    refusal = {"error": "gone", "code": "UPSTREAM_UNREACHABLE", "request_id": "r-1"}
    gateway.script = lambda handler, sent: answer(handler, 502, refusal, X_Request_Id="r-1")
    with pytest.raises(gpuproxy.GpuproxyError, match="gone"):
        client.proxy_request("openinference", "http://x.example", body={}, stream=True)


def test_a_cut_stream_raises_instead_of_ending(gateway: ScriptedGateway, client: gpuproxy.Client) -> None:
    gateway.script = cut_after_the_head
    stream = client.proxy_request("https", "http://x.example", stream=True)
    with pytest.raises(gpuproxy.GpuproxyError) as caught:
        list(stream)
    assert caught.value.code == "CONNECTION_FAILED"


def test_a_streaming_body_without_stream_is_refused_before_anything_is_sent(
    gateway: ScriptedGateway, client: gpuproxy.Client
) -> None:
    with pytest.raises(ValueError, match="stream=True"):
        client.proxy_request("openinference", "http://x.example", body={"stream": True})
    assert gateway.asked == []


def test_importing_the_package_does_not_import_the_client() -> None:
    code = 'import gpuproxy as g, sys; m = sys.modules\nassert "httpx" not in m; g.Client; assert "httpx" in m'
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_the_clients_does_not_import_the_server() -> None:
    server = '("sqlalchemy", "gpuproxy.control", "gpuproxy.store", "gpuproxy.proxy", "uvloop", "httptools")'
    code = f"import gpuproxy as g, sys; g.Client, g.AsyncClient\nassert not set({server}) & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="Klient"):
        gpuproxy.Klient  # noqa: B018


PROGRAM = """
import gpuproxy
from gpuproxy.client import AsyncClient, NotFoundError

client = gpuproxy.Client("http://localhost:8080/api/v1", "key")
gpus = client.list_gpus()
best = sorted(gpus, key=lambda x: x["price_per_hour"])[0]
print(f"Found {gpus['count']} GPUs", best["id"])


def call(stream: bool) -> None:
    try:
        print(client.proxy_request("https", "https://x.example", stream=stream))
        print(client.proxy_request("https", "https://x.example")["data"])
    except NotFoundError as error:
        print(error.code.lower())


async def later() -> None:
    async with AsyncClient("http://localhost:8080/api/v1", "key") as other:
        async for piece in await other.proxy_request("https", "https://x.example", stream=True):
            print(piece.hex())
        async for event in other.events(["billing_events"]):
            print(event["type"])


client.lst_gpus()
"""


def test_a_program_that_uses_the_client_is_checked_by_its_types(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["-m", "mypy", "--strict", "--no-error-summary", "program.py"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    (complaint,) = done.stdout.splitlines()
    assert "lst_gpus" in complaint
