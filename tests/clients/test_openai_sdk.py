"""The official OpenAI SDK, unmodified: what it sees through the gateway is what it sees without it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from .conftest import Models, Way

TEXT = "Grüße aus Łódź, 你好 🙂 and so on"
ECHO = f"echo: {TEXT}"
ASK: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXT}]
WEATHER: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
INPUT_TOKENS, OUTPUT_TOKENS = 10, 9


@pytest.fixture
def client(way: Way) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{way.url}/v1", api_key=way.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(way: Way) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{way.url}/v1", api_key=way.key, max_retries=0) as client:
        yield client


def test_a_chat_answer_is_what_the_model_said(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="chat", messages=ASK)
    assert answer.choices[0].message.content == ECHO
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (INPUT_TOKENS, OUTPUT_TOKENS)


def test_a_compressed_answer_reads_the_same(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="gzip", messages=ASK).choices[0].message.content == ECHO


def test_a_stream_without_usage_has_only_choices(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="chat", messages=ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ECHO
    assert len(chunks) == OUTPUT_TOKENS + 2
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_asked_for_usage_ends_with_it(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="chat", messages=ASK, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ECHO
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (INPUT_TOKENS, OUTPUT_TOKENS)


def test_a_tool_call_arrives_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tools", messages=ASK, tools=WEATHER)
    assert answer.choices[0].finish_reason == "tool_calls"
    calls: Any = answer.choices[0].message.tool_calls
    assert (calls[0].id, calls[0].function.arguments) == ("call_1", '{"city": "Łódź"}')


def test_a_streamed_tool_call_arrives_in_its_parts(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tools", messages=ASK, tools=WEATHER, stream=True))
    calls: list[Any] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls) == '{"city": "Łódź"}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_completions_work_plain_and_streamed(client: openai.OpenAI) -> None:
    assert client.completions.create(model="chat", prompt=TEXT).choices[0].text == ECHO
    chunks = client.completions.create(model="chat", prompt=TEXT, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ECHO


def test_embeddings_keep_their_numbers(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="embed", input=["a b", "c"], encoding_format="float")
    assert [row.embedding for row in answer.data] == [[3 / 64, 0.5, -0.25], [1 / 64, 0.5, -0.25]]
    assert answer.usage.prompt_tokens == 3


def test_the_responses_api_works_plain_and_streamed(client: openai.OpenAI) -> None:
    assert client.responses.create(model="chat", input=TEXT).output_text == ECHO
    events = list(client.responses.create(model="chat", input=TEXT, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ECHO
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert "chat" in {model.id for model in client.models.list()}
    assert client.models.retrieve("chat").id == "chat"


def test_a_wrong_key_is_an_authentication_error(way: Way) -> None:
    with openai.OpenAI(base_url=f"{way.url}/v1", api_key="gp_wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="chat", messages=ASK)
        assert caught.value.code == "invalid_api_key"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in caught.value.message


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("error-400", openai.BadRequestError),
        ("error-401", openai.AuthenticationError),
        ("error-429", openai.RateLimitError),
        ("error-500", openai.InternalServerError),
    ],
)
def test_the_upstreams_refusal_is_handed_over(
    client: openai.OpenAI, model: str, kind: type[openai.APIStatusError]
) -> None:
    with pytest.raises(kind, match=f"upstream says {model[-3:]}"):
        client.chat.completions.create(model=model, messages=ASK)


def test_the_upstreams_limits_are_handed_over(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="error-429", messages=ASK, stream=True)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_refused_call_is_retried_as_the_upstream_asks(client: openai.OpenAI, models: Models) -> None:
    nonce = uuid.uuid4().hex
    answer = client.with_options(max_retries=2).chat.completions.create(model="flaky", messages=ASK, user=nonce)
    assert answer.choices[0].message.content == ECHO
    assert sum(nonce.encode() in seen.body for seen in models.server.seen) == 2


def test_an_error_in_midstream_reaches_the_reader(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="error-stream", messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="the model fell over") as caught:
        list(stream)
    assert caught.value.code == "overloaded"


def test_a_stream_that_is_cut_never_looks_finished(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="cut-stream", messages=ASK, stream=True)
    received: list[Any] = []
    with pytest.raises(openai.APIConnectionError):
        received.extend(iter(stream))


def test_an_answer_that_is_cut_never_looks_finished(client: openai.OpenAI) -> None:
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        client.chat.completions.create(model="cut-body", messages=ASK)


async def test_the_asynchronous_client_works_plain_and_streamed(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model="chat", messages=ASK)
    assert answer.choices[0].message.content == ECHO
    stream = await async_client.chat.completions.create(model="chat", messages=ASK, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ECHO


async def test_parallel_calls_get_each_their_own_answer(async_client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        message: Any = [{"role": "user", "content": f"call {number}"}]
        answer = await async_client.chat.completions.create(model="chat", messages=message)
        return answer.choices[0].message.content or ""

    answers = await asyncio.gather(*(ask(number) for number in range(60)))
    assert answers == [f"echo: call {number}" for number in range(60)]


async def test_a_token_arrives_before_the_next_is_made(async_client: openai.AsyncOpenAI, models: Models) -> None:
    stream = await async_client.chat.completions.create(model="gated", messages=ASK, stream=True)
    chunks = [await anext(stream), await anext(stream)]  # the upstream makes no third until the gate opens
    models.thread.loop.call_soon_threadsafe(models.server.gate.set)
    chunks += [chunk async for chunk in stream]
    models.thread.loop.call_soon_threadsafe(models.server.gate.clear)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ECHO


async def test_leaving_a_stream_stops_the_model(async_client: openai.AsyncOpenAI, models: Models) -> None:
    models.thread.loop.call_soon_threadsafe(models.server.gone.clear)
    stream = await async_client.chat.completions.create(model="gated", messages=ASK, stream=True)
    await anext(stream)
    left = time.monotonic()
    await async_client.close()
    await asyncio.to_thread(models.thread.call, models.server.gone.wait())
    assert time.monotonic() - left < 1.0  # the promise is 100 ms; the rest is for a busy machine
