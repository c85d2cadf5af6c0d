"""Streams, encodings and limits of the upstream pass as they are: D22, D23, D24; usage is read on the way."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Serve
from .harness import CHAT, OK, RAW, Gateway, answered, request

EVENTS = (
    b'data: {"choices":[{"delta":{"content":"Hel"}}],"usage":null}\n\n',
    b": a comment\n\n",
    b'data: {"choices":[{"delta":{"content":"lo"}}]}\r\n\r\n',
    b'data: {"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}\n\n',
    b"data: [DONE]\n\n",
)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"model":"m","stream":true}'


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_each_event_reaches_the_client_before_the_next_is_sent(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    await upstream.send(STREAM)
    head = await client.read_head()
    assert b"X-Accel-Buffering: no\r\n" in head
    for event in EVENTS:
        await upstream.send(_chunk(event))
        await client.expect(_chunk(event))
    await upstream.send(b"0\r\n\r\n")
    await client.expect(b"0\r\n\r\n")
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens) == (7, 3, 2)
    assert (receipt.usage_source, receipt.is_stream, receipt.model) == ("provider", True, "m")
    assert receipt.response_bytes == sum(map(len, EVENTS))


@pytest.mark.parametrize("said", [b"X-Accel-Buffering: no", b"x-accel-buffering: yes"])
async def test_the_upstreams_own_word_on_buffering_stays(gateway: Gateway, said: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    fields = (b"Content-Type: text/event-stream; charset=utf-8", said, b"Cache-Control: no-cache")
    await upstream.send(b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(fields) + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    await client.expect(answered(b"200 OK", *fields, framing=b"Transfer-Encoding: chunked"))
    await upstream.send(b"0\r\n\r\n")
    await client.expect(b"0\r\n\r\n")


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"zstd"])
async def test_an_encoded_answer_passes_unopened(gateway: Gateway, coding: bytes) -> None:
    data = gzip.compress(b"hello" * 100)
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"Accept-Encoding: " + coding))
    upstream = await gateway.raw.accept()
    assert b"Accept-Encoding: " + coding + b"\r\n" in await upstream.read_head()
    fields = (b"Content-Encoding: " + coding, b'ETag: "a"', b"Vary: Accept-Encoding")
    length = b"Content-Length: %d" % len(data)
    await upstream.send(b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(fields) + b"\r\n" + length + b"\r\n\r\n" + data)
    await client.expect(answered(b"200 OK", *fields, framing=length, body=data))


async def test_an_answer_whose_usage_is_read_is_asked_for_uncompressed(gateway: Gateway) -> None:
    await gateway.ask(request(b"POST " + CHAT, b"Accept-Encoding: gzip, br", body=BODY))
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    assert b"Accept-Encoding: identity\r\n" in head
    assert b"gzip" not in head
    await upstream.send(OK)
    await gateway.receipt()


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable"])
async def test_limits_of_the_upstream_pass_as_they_are(gateway: Gateway, status: bytes) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    fields = (
        b"Retry-After: 7",
        b"retry-after-ms: 6500",
        b"x-ratelimit-remaining-requests: 0",
        b"Content-Type: application/json",
    )
    await upstream.send(b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(fields) + b"\r\nContent-Length: 2\r\n\r\n{}")
    await client.expect(answered(status, *fields, framing=b"Content-Length: 2", body=b"{}"))
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.usage_source) == (int(status[:3]), "ok", "none")


async def test_redirects_and_cookies_pass_and_are_not_acted_on(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    fields = (b"Location: http://169.254.169.254/", b"Set-Cookie: a=1; Domain=x")
    await upstream.send(b"HTTP/1.1 302 Found\r\n" + b"\r\n".join(fields) + b"\r\nContent-Length: 0\r\n\r\n")
    await client.expect(answered(b"302 Found", *fields, framing=b"Content-Length: 0"))
    await client.send(request(b"GET " + RAW + b"/y"))
    assert b"ookie" not in await upstream.read_head()
    await upstream.send(OK)
    await client.answer()


ANSWER = json.dumps(
    {
        "id": "a",
        "choices": [{"message": {"content": 'the "usage" of x'}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 9},
    }
).encode()


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_usage_of_a_json_answer_is_on_the_receipt(gateway: Gateway, framing: str) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m2"}'))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    if framing == "length":
        await upstream.send(head + b"Content-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
    else:
        await upstream.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunk(ANSWER[:50]))
        await upstream.send(_chunk(ANSWER[50:]) + b"0\r\n\r\n")
    assert (await client.answer()).body == ANSWER
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (5, 9, "provider")
    assert (receipt.model, receipt.is_stream) == ("m2", False)


async def test_an_answer_without_a_content_type_is_metered_too(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert (await client.answer()).body == body
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (3, 4, "provider")


async def test_a_stream_that_is_cut_is_billed_for_what_was_delivered(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    await upstream.send(STREAM + _chunk(EVENTS[3]))
    await client.read_head()
    await client.expect(_chunk(EVENTS[3]))
    upstream.close()
    await client.expect_end()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.input_tokens, receipt.output_tokens) == ("upstream_failed", 7, 2)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 600), max_size=12))
async def test_usage_does_not_depend_on_how_the_stream_is_split(serve: Serve, cuts: list[int]) -> None:
    gateway = serve.last or await serve()
    wire = STREAM + b"".join(map(_chunk, EVENTS)) + b"0\r\n\r\n"
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept() if not gateway.llm.wires else gateway.llm.wires[-1]
    await upstream.read_head()
    await upstream.expect(BODY)
    start = 0
    for end in sorted({min(cut, len(wire)) for cut in cuts} | {len(wire)}):
        await upstream.send(wire[start:end])
        await gateway.turn()
        start = end
    answer = await client.answer()
    assert (answer.body, answer.is_whole) == (b"".join(EVENTS), True)
    receipt = gateway.receipts()[-1]
    assert (receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens) == (7, 3, 2)
    client.close()
