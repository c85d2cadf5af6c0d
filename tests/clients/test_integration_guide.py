"""The samples of the integration guide, run as they are printed; only URL and key are put in."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

import gpuproxy

from .gateway import Gateway
from .guide import sample

CALL = re.compile(r"^client = .*\Z", re.MULTILINE | re.DOTALL)  # lists GPUs, which is no proxied call


@pytest.fixture
def client(gateway: Gateway, example_hosts: dict[str, int]) -> Iterator[gpuproxy.Client]:
    with gpuproxy.Client(f"{gateway.url}/api/v1", gateway.key) as client:
        yield client


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "sample", "exec"), names)
    return names


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_class_of_the_guide_calls_through_the_gateway(gateway: Gateway, host: str) -> None:
    source = CALL.sub("", sample("Python Example"))
    assert "def proxy_request" in source
    url = gateway.url.replace("127.0.0.1", host)
    theirs = run(source)["GPUProxyClient"](f"{url}/api/v1", gateway.key)
    answer = theirs.proxy_request("https", "https://api.example.com/endpoint", body={"data": "value"})
    assert answer["data"]["received"] == {"data": "value"}
    assert (answer["status"], answer["status_code"]) == ("success", 200)


def test_the_https_sample_runs(client: gpuproxy.Client) -> None:
    response = run(sample("HTTP/HTTPS Proxy"), client=client)["response"]
    assert response["data"] == {"received": {"data": "value"}, "content_type": "application/json"}


def test_the_mcp_sample_runs(client: gpuproxy.Client) -> None:
    response = run(sample("Model Context Protocol (MCP)"), client=client)["response"]
    assert response["status_code"] == 404  # the official server knows no method "inference" and says so
    assert response["data"]["jsonrpc"] == "2.0"
    assert response["data"]["error"]["code"] == -32601


def test_the_openinference_sample_runs(client: gpuproxy.Client) -> None:
    response = run(sample("Open Inference Protocol"), client=client)["response"]
    assert response["data"]["choices"][0]["message"]["content"] == "echo: Hello!"
    assert response["usage"]["output_tokens"] == 2


def test_a_certificate_of_another_host_is_refused(client: gpuproxy.Client) -> None:
    with pytest.raises(gpuproxy.GpuproxyError) as caught:
        client.proxy_request("https", "https://other.example.com/endpoint", body={})
    assert caught.value.code == "UPSTREAM_UNREACHABLE"


def test_the_client_streams_through_the_gateway(client: gpuproxy.Client) -> None:
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    stream = client.proxy_request("openinference", "https://inference.example.com", body=body, stream=True)
    assert b"".join(stream).endswith(b"data: [DONE]\n\n")
