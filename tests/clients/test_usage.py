"""What the SDKs were told they used is what the gateway wrote down, call by call."""

import uuid
from typing import Any

import anthropic
import openai
import pytest

from .gateway import Gateway

ASK: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def key(gateway: Gateway) -> str:
    return gateway.new_key(f"{uuid.uuid4().hex}@example.com")


def test_every_kind_of_call_is_metered(gateway: Gateway, key: str) -> None:
    base = f"{gateway.url}/api/v1/gpu/proxy"
    with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
        plain = client.chat.completions.create(model="chat", messages=ASK)
        options: Any = {"include_usage": True}
        *_, last = client.chat.completions.create(
            model="chat", messages=ASK, stream=True, stream_options=options
        )
        embedded = client.embeddings.create(model="embed", input="a b c d")
        *_, completed = client.responses.create(model="chat", input="x y", stream=True)
    with anthropic.Anthropic(base_url=base, api_key=key, max_retries=0) as claude:
        said = claude.messages.create(model="chat", max_tokens=9, messages=ASK)
        with claude.messages.stream(model="chat", max_tokens=9, messages=ASK) as stream:
            streamed = stream.get_final_message()
    assert plain.usage and last.usage and completed.type == "response.completed" and completed.response.usage
    told = [plain.usage, last.usage, embedded.usage]
    cached = (
        said.usage.cache_read_input_tokens or 0
    )  # Anthropic counts them beside the input, the gateway within
    input_tokens = sum(usage.prompt_tokens for usage in told) + completed.response.usage.input_tokens
    input_tokens += said.usage.input_tokens + streamed.usage.input_tokens + 2 * cached
    output_tokens = plain.usage.completion_tokens + last.usage.completion_tokens
    output_tokens += (
        completed.response.usage.output_tokens + said.usage.output_tokens + streamed.usage.output_tokens
    )
    usage = gateway.usage(key, lambda usage: usage["requests"] >= 6)
    assert usage["requests"] == 6
    assert (usage["input_tokens"], usage["output_tokens"]) == (input_tokens, output_tokens)
    assert usage["cached_tokens"] == 2 + 2 * cached


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


def test_a_revoked_key_stops_working(gateway: Gateway, key: str) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)
    client.chat.completions.create(model="chat", messages=ASK)
    listed = gateway.command("key", "list", "--json")
    assert key not in listed
