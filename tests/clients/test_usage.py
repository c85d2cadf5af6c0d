"""What the SDKs were told they used is what the gateway wrote down, call by call."""

import json
import re
import time
import uuid
from typing import Any

import anthropic
import openai
import pytest
import requests

from .gateway import Gateway

REVOKED_S = 1.5  # the promise is a second; the rest is for a busy machine
ASK: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def key(gateway: Gateway) -> str:
    return gateway.new_key(f"{uuid.uuid4().hex}@example.com")


def openai_tokens(client: openai.OpenAI) -> list[tuple[int, int, int]]:
    """Make one call of each kind and return what the SDK was told: input, cached and output tokens."""
    plain: Any = client.chat.completions.create(model="chat", messages=ASK)
    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(model="chat", messages=ASK, stream=True, stream_options=options)
    told: list[Any] = [plain.usage, last.usage]
    chats = [(use.prompt_tokens, use.prompt_tokens_details.cached_tokens, use.completion_tokens) for use in told]
    embedded = client.embeddings.create(model="embed", input="a b c d").usage
    *_, completed = client.responses.create(model="chat", input="x y", stream=True)
    response: Any = completed
    use = response.response.usage
    return [*chats, (embedded.prompt_tokens, 0, 0), (use.input_tokens, 0, use.output_tokens)]


def anthropic_tokens(client: anthropic.Anthropic) -> list[tuple[int, int, int]]:
    """The same for Anthropic, whose input tokens leave out the cached ones that the gateway counts in."""
    plain = client.messages.create(model="chat", max_tokens=9, messages=ASK).usage
    with client.messages.stream(model="chat", max_tokens=9, messages=ASK) as stream:
        streamed = stream.get_final_message().usage
    told = [(use.input_tokens, use.cache_read_input_tokens or 0, use.output_tokens) for use in (plain, streamed)]
    return [(fresh + cached, cached, output) for fresh, cached, output in told]


def test_every_kind_of_call_is_metered(gateway: Gateway, key: str) -> None:
    base = f"{gateway.url}/api/v1/gpu/proxy"
    with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
        told = openai_tokens(client)
    with anthropic.Anthropic(base_url=base, api_key=key, max_retries=0) as claude:
        told += anthropic_tokens(claude)
    usage = gateway.usage(key, lambda usage: usage["requests"] >= len(told))
    written = usage["input_tokens"], usage["cached_tokens"], usage["output_tokens"]
    assert usage["requests"] == len(told) == 6
    assert written == tuple(map(sum, zip(*told, strict=True)))


def test_a_compressed_answer_is_metered(gateway: Gateway, key: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        client.chat.completions.create(model="gzip", messages=ASK)
    usage = gateway.usage(key, lambda usage: usage["requests"] >= 1)
    assert (usage["input_tokens"], usage["output_tokens"]) == (3, 4)


def test_a_failed_and_a_cut_call_are_written_down_too(gateway: Gateway, key: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        for model in ("error-500", "no-such-model"):
            with pytest.raises(openai.APIStatusError):
                client.chat.completions.create(model=model, messages=ASK)
        with pytest.raises(openai.APIConnectionError):
            list(client.chat.completions.create(model="cut-stream", messages=ASK, stream=True))
    assert gateway.usage(key, lambda usage: usage["requests"] >= 3)["requests"] == 3


def ask_until(client: openai.OpenAI, deadline: float) -> None:
    while time.monotonic() < deadline:
        client.chat.completions.create(model="chat", messages=ASK)


def test_a_revoked_key_stops_working_within_a_second(gateway: Gateway, key: str) -> None:
    email = f"{uuid.uuid4().hex}@example.com"
    gateway.command("user", "create", email)
    made = json.loads(gateway.command("key", "create", "--user", email, "--json"))
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=made["api_key"], max_retries=0) as client:
        client.chat.completions.create(model="chat", messages=ASK)
        gateway.command("key", "revoke", made["id"])
        with pytest.raises(openai.AuthenticationError):
            ask_until(client, time.monotonic() + REVOKED_S)


def test_a_key_is_shown_only_once(gateway: Gateway, key: str) -> None:
    assert key not in gateway.command("key", "list", "--json")


def test_metrics_and_the_log_tell_of_a_call(gateway: Gateway, key: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        told = client.chat.completions.with_raw_response.create(model="chat", messages=ASK)
    gateway.usage(key, lambda usage: usage["requests"] >= 1)
    shown = requests.get(f"{gateway.url}/metrics", timeout=10)
    assert shown.headers["Content-Type"].startswith("text/plain")
    assert re.search(r'^gpuproxy_requests_total{.*model="chat".*status="200".*} [1-9]', shown.text, re.MULTILINE)
    assert re.search(r"^gpuproxy_workers 2\.0$", shown.text, re.MULTILINE)
    assert re.search(r'^gpuproxy_management_seconds_count{route="/api/v1/user/usage"}', shown.text, re.MULTILINE)
    assert f"request_id={told.headers['x-request-id']}" in gateway.log.read_text()
