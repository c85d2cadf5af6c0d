"""The official Anthropic SDK, unmodified: what it sees through the gateway is what it sees without it."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest

from .conftest import Models, Way

TEXT = "Grüße aus Łódź, 你好 🙂 and so on"
ECHO = f"echo: {TEXT}"
ASK: Any = [{"role": "user", "content": TEXT}]
INPUT_TOKENS, OUTPUT_TOKENS = 8, 9


@pytest.fixture
def client(way: Way) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=way.url, api_key=way.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(way: Way) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=way.url, api_key=way.key, max_retries=0) as client:
        yield client


def test_a_message_is_what_the_model_said(client: anthropic.Anthropic, models: Models) -> None:
    answer = client.messages.create(model="chat", max_tokens=100, messages=ASK)
    assert [block.text for block in answer.content if block.type == "text"] == [ECHO]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (INPUT_TOKENS, OUTPUT_TOKENS)
    assert models.server.seen[-1].headers["anthropic-version"] >= "2023-06-01"


def test_a_stream_keeps_its_events(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="chat", max_tokens=100, messages=ASK) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_message()
    assert "".join(block.text for block in answer.content if block.type == "text") == ECHO
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (INPUT_TOKENS, OUTPUT_TOKENS)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


async def test_the_asynchronous_client_works_plain_and_streamed(
    async_client: anthropic.AsyncAnthropic,
) -> None:
    answer = await async_client.messages.create(model="chat", max_tokens=100, messages=ASK)
    assert answer.stop_reason == "end_turn"
    async with async_client.messages.stream(model="chat", max_tokens=100, messages=ASK) as stream:
        assert "".join([text async for text in stream.text_stream]) == ECHO


def test_a_bearer_token_is_as_good_as_a_key(way: Way) -> None:
    with anthropic.Anthropic(base_url=way.url, auth_token=way.key, api_key=None, max_retries=0) as client:
        assert client.messages.create(model="chat", max_tokens=100, messages=ASK).stop_reason == "end_turn"


def test_a_wrong_key_is_an_authentication_error(way: Way) -> None:
    with anthropic.Anthropic(base_url=way.url, api_key="gp_wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(model="chat", max_tokens=100, messages=ASK)
        assert caught.value.type == "authentication_error"
        if way.name == "gateway":
            assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no-such-model") as caught:
        client.messages.create(model="no-such-model", max_tokens=100, messages=ASK)
    assert caught.value.type == "not_found_error"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("error-400", anthropic.BadRequestError),
        ("error-429", anthropic.RateLimitError),
        ("error-500", anthropic.InternalServerError),
        ("error-529", anthropic.InternalServerError),
    ],
)
def test_the_upstreams_refusal_is_handed_over(
    client: anthropic.Anthropic, model: str, kind: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(kind, match=f"upstream says {model[-3:]}") as caught:
        client.messages.create(model=model, max_tokens=100, messages=ASK)
    assert caught.value.status_code == int(model[-3:])


def test_an_error_in_midstream_reaches_the_reader(client: anthropic.Anthropic) -> None:
    stream = client.messages.create(model="error-stream", max_tokens=100, messages=ASK, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the model fell over"):
        list(stream)


def test_a_stream_that_is_cut_never_looks_finished(client: anthropic.Anthropic) -> None:
    import httpx2

    stream = client.messages.create(model="cut-stream", max_tokens=100, messages=ASK, stream=True)
    with pytest.raises((anthropic.APIConnectionError, httpx2.RemoteProtocolError)):
        list(stream)
