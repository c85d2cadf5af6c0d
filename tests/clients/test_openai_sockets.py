"""The official OpenAI SDK over WebSockets, and a browser's way to open one."""

import uuid
from typing import Any

import aiohttp
import openai
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from .conftest import Models, Way
from .gateway import Gateway

TEXT = "Grüße aus Łódź 🙂"
WORDS = ["echo:", *TEXT.split()]


def said(text: str) -> Any:
    """Return an item of a conversation."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def talk(connection: Any, text: str) -> tuple[list[str], Any]:
    """Say something and return the words of the answer and what its end tells."""
    await connection.conversation.item.create(item=said(text))
    await connection.response.create()
    words = []
    async for event in connection:
        if event.type == "response.output_text.delta":
            words.append(event.delta)
        elif event.type == "response.done":
            return words, event.response
    raise AssertionError("the connection ended")


async def test_the_realtime_client_works(way: Way) -> None:
    client = openai.AsyncOpenAI(base_url=f"{way.url}/v1", api_key=way.key)
    async with client, client.realtime.connect(model="chat") as connection:
        created: Any = await connection.recv()
        assert (created.type, created.session.model) == ("session.created", "chat")
        for _ in range(2):
            words, response = await talk(connection, TEXT)
            assert words == WORDS
        assert (response.usage.input_tokens, response.usage.output_tokens) == (8, 5)


def test_the_blocking_realtime_client_works(way: Way) -> None:
    client = openai.OpenAI(base_url=f"{way.url}/v1", api_key=way.key)
    with client, client.realtime.connect(model="chat") as connection:
        connection.conversation.item.create(item=said(TEXT))
        connection.response.create()
        words: list[str] = []
        for event in connection:
            if event.type == "response.output_text.delta":
                words.append(event.delta)
            elif event.type == "response.done":
                break
    assert words == WORDS


async def test_the_older_realtime_client_works(way: Way) -> None:
    url = f"{way.url}/v1".replace("http://", "ws://")  # by itself it speaks TLS only
    client = openai.AsyncOpenAI(websocket_base_url=url, api_key=way.key)
    async with client, client.beta.realtime.connect(model="chat") as connection:
        words, response = await talk(connection, TEXT)
    assert (words, response.usage.output_tokens) == (WORDS, 5)


async def test_the_responses_api_works_over_a_socket(way: Way) -> None:
    client = openai.AsyncOpenAI(base_url=f"{way.url}/v1", api_key=way.key)
    async with client, client.responses.connect(extra_query={"model": "chat"}) as connection:
        await connection.response.create(model="chat", input=TEXT)
        words: list[str] = []
        async for event in connection:
            if event.type == "response.output_text.delta":
                words.append(event.delta)
            elif event.type == "response.completed":
                break
    assert words == WORDS


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [("gp_wrong", "chat", 401), (None, "no-such-model", 404), (None, None, 400)],
    ids=["wrong key", "unknown model", "no model"],
)
async def test_a_refusal_comes_before_the_upgrade(
    gateway: Gateway, key: str | None, model: str | None, status: int
) -> None:
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key if key is None else key)
    query: Any = {} if model is None else {"model": model}
    async with client:
        with pytest.raises(InvalidStatus) as caught:
            await client.realtime.connect(extra_query=query).enter()
    assert caught.value.response.status_code == status
    assert b'"error"' in (caught.value.response.body or b"")


async def test_another_model_than_that_of_the_url_ends_the_connection(gateway: Gateway, models: Models) -> None:
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key)
    async with client, client.responses.connect(extra_query={"model": "chat"}) as connection:
        await connection.response.create(model="gpt-dear", input=TEXT)
        with pytest.raises(ConnectionClosedError) as caught:
            await connection.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1008
    assert "not 'gpt-dear'" in caught.value.rcvd.reason


async def test_a_browser_opens_one_with_its_key_in_the_subprotocol(gateway: Gateway, models: Models) -> None:
    protocols = ("realtime", f"openai-insecure-api-key.{gateway.key}", "openai-beta.realtime-v1")
    url = f"{gateway.url}/v1/realtime?model=chat"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=protocols, compress=15) as socket:
        assert socket.protocol == "realtime"
        assert not socket.compress, "so that usage can be read"
        assert (await socket.receive_json())["type"] == "session.created"
    seen = [each for each in models.server.seen if each.path == "/v1/realtime?model=chat"][-1]
    assert seen.headers["sec-websocket-protocol"] == "realtime, openai-beta.realtime-v1"
    assert gateway.key not in repr(seen.headers)
    assert gateway.key not in gateway.log.read_text()


async def test_what_a_session_used_is_on_the_account(gateway: Gateway) -> None:
    key = gateway.new_key(f"{uuid.uuid4().hex}@example.com")
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key)
    async with client, client.realtime.connect(model="chat") as connection:
        await talk(connection, "one two three")
        await talk(connection, "four")
    async with client.responses.connect(extra_query={"model": "chat"}) as connection:
        await connection.response.create(model="chat", input="five six")
        async for event in connection:
            if event.type == "response.completed":
                break
    usage = gateway.usage(key, lambda usage: usage["requests"] == 2)
    written = usage["input_tokens"], usage["cached_tokens"], usage["output_tokens"]
    assert written == (3 + 4 + 2, 3, 4 + 2 + 3)
