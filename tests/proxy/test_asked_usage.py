"""Streams are asked for their usage on the way up, and the answer to that is taken out on the way down."""

import pytest

from .conftest import Serve
from .harness import CHAT, ENVELOPE, OK, PREFIX, Gateway, request

BODY = b'{"model":"m","stream":true}'
ASKING = b'{"stream_options":{"include_usage":true},"model":"m","stream":true}'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture
async def asking(serve: Serve) -> Gateway:
    return await serve(llm={"include_usage": True})


async def test_a_client_that_did_not_ask_is_metered_exactly_and_sees_nothing_of_it(asking: Gateway) -> None:
    client = await asking.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await asking.llm.accept()
    assert b"Content-Length: %d\r\n" % len(ASKING) in await upstream.read_head()
    await upstream.expect(ASKING)
    await upstream.send(STREAM + _chunk(TOKEN))
    await client.read_head()
    await client.expect(_chunk(TOKEN))
    await upstream.send(_chunk(END) + _chunk(USAGE[:30]))
    await client.expect(_chunk(END))
    await upstream.send(_chunk(USAGE[30:]))
    await upstream.send(_chunk(DONE) + b"0\r\n\r\n")
    await client.expect(_chunk(DONE) + b"0\r\n\r\n")
    receipt = await asking.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (7, 2, "provider")
    assert receipt.response_bytes == len(TOKEN + END + DONE)


async def test_a_client_that_asks_itself_gets_what_it_asked_for(asking: Gateway) -> None:
    client = await asking.ask(request(b"POST " + CHAT, body=ASKING))
    upstream = await asking.llm.accept()
    await upstream.read_head()
    await upstream.expect(ASKING)
    await upstream.send(STREAM + _chunk(END) + _chunk(USAGE) + _chunk(DONE) + b"0\r\n\r\n")
    assert (await client.answer(b"POST")).body == END + USAGE + DONE
    assert (await asking.receipt()).output_tokens == 2


async def test_a_stream_of_known_length_is_sent_in_chunks_once_something_is_taken_out(asking: Gateway) -> None:
    client = await asking.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await asking.llm.accept()
    await upstream.read_head()
    body = TOKEN + END + USAGE + DONE
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    await upstream.send(head + body)
    assert b"Content-Length" not in await client.read_head()
    await client.expect(_chunk(TOKEN + END + DONE) + b"0\r\n\r\n")
    assert (await asking.receipt()).input_tokens == 7


async def test_the_stream_of_an_envelope_is_asked_too(asking: Gateway) -> None:
    target = f"http://127.0.0.1:{asking.llm.port}"
    body = b'{"protocol":"openinference","target_url":"%b","body":{"model":"m","stream":true,"messages":[]}}'
    client = await asking.ask(request(b"POST " + ENVELOPE, body=body % target.encode()))
    upstream = await asking.llm.accept()
    assert (await upstream.read_head()).startswith(b"POST /v1/chat/completions ")
    await upstream.expect(b'{"stream_options":{"include_usage":true},"model":"m","stream":true,"messages":[]}')
    await upstream.send(STREAM + _chunk(TOKEN) + _chunk(END) + _chunk(USAGE) + _chunk(DONE) + b"0\r\n\r\n")
    assert (await client.answer()).body == TOKEN + END + DONE
    receipt = await asking.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (7, 2, "provider")


@pytest.mark.parametrize("where", ["llm", "raw"])
async def test_an_envelope_that_is_wrapped_or_goes_elsewhere_is_not(asking: Gateway, where: str) -> None:
    target = f"http://127.0.0.1:{getattr(asking, where).port}".encode()
    is_stream = b"true" if where == "raw" else b"1"
    inner = b'{"model":"m","stream":%b,"prompt":"x"}' % is_stream
    body = b'{"protocol":"openinference","target_url":"%b","body":%b}' % (target, inner)
    client = await asking.ask(request(b"POST " + ENVELOPE, body=body))
    upstream = await getattr(asking, where).accept()
    await upstream.read_head()
    await upstream.expect(inner)
    await upstream.send(STREAM + _chunk(TOKEN * 3) + _chunk(END) + _chunk(DONE) + b"0\r\n\r\n")
    answer = await client.answer()
    if where == "llm":
        assert answer.json()["usage"] == {
            "input_tokens": len(inner) // 6,
            "cached_tokens": 0,
            "output_tokens": 2,
            "estimated": True,
        }
    assert (await asking.receipt()).usage_source == "estimated"


async def test_an_answer_that_is_no_stream_stays_as_it_is(asking: Gateway) -> None:
    client = await asking.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await asking.llm.accept()
    await upstream.read_head()
    body = b'{"choices":[],"usage":{"prompt_tokens":1}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    await upstream.send(head + body)
    assert b"Content-Length: %d\r\n" % len(body) in await client.read_head()
    await client.expect(body)


async def test_a_stream_cut_while_something_is_held_back_ends_visibly(asking: Gateway) -> None:
    client = await asking.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await asking.llm.accept()
    await upstream.read_head()
    await upstream.send(STREAM + _chunk(TOKEN * 3) + _chunk(END) + _chunk(USAGE[:30]))
    await client.read_head()
    await client.expect(_chunk(TOKEN * 3 + END))
    upstream.close()
    await client.expect_end()
    receipt = await asking.receipt()  # of the first event nothing is known: it may name the role
    assert (receipt.outcome, receipt.output_tokens, receipt.usage_source) == ("upstream_failed", 2, "estimated")


@pytest.mark.parametrize(
    "path", [b"/chat/completions", b"/v4/chat/completions", b"/openai/deployments/m/chat/completions?api-version=1"]
)
async def test_an_upstream_that_has_its_chats_elsewhere_is_asked_too(asking: Gateway, path: bytes) -> None:
    await asking.ask(request(b"POST " + PREFIX + b"/upstreams/llm" + path, body=BODY))
    upstream = await asking.llm.accept()
    assert (await upstream.read_head()).startswith(b"POST " + path + b" ")
    await upstream.expect(ASKING)
    await upstream.send(OK)
    receipt = await asking.receipt()
    assert (receipt.model, receipt.is_stream) == ("m", True)
