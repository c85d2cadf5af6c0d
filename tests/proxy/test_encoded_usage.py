"""An upstream that compresses although it was asked not to: its bytes pass as they are and are metered all the same."""

import gzip
import json
import zlib
from collections.abc import Callable

import pytest

from .harness import CHAT, ENVELOPE, Gateway, request
from .wire import Wire

MESSAGE = json.dumps({"model": "m", "usage": {"prompt_tokens": 5, "completion_tokens": 9}}).encode()
DELTA = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'


def _head(kind: bytes, *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in (b"Content-Type: " + kind, *fields))
    return b"HTTP/1.1 200 OK\r\n" + lines


def _whole(body: bytes, *fields: bytes) -> bytes:
    return _head(b"application/json", *fields) + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def _ask(gateway: Gateway, body: bytes = b'{"model":"m"}') -> tuple[Wire, Wire]:
    client = await gateway.ask(request(b"POST " + CHAT, body=body))
    upstream = await gateway.llm.accept()
    assert b"Accept-Encoding: identity\r\n" in await upstream.read_head()
    await upstream.expect(body)
    return client, upstream


@pytest.mark.parametrize(
    ("coding", "encode"), [(b"gzip", gzip.compress), (b"X-GZIP", gzip.compress), (b"deflate", zlib.compress)]
)
async def test_a_whole_answer_is_metered(gateway: Gateway, coding: bytes, encode: Callable[[bytes], bytes]) -> None:
    client, upstream = await _ask(gateway)
    body = encode(MESSAGE)
    await upstream.send(_whole(body, b"Content-Encoding: " + coding))
    answer = await client.answer()
    assert (answer.body, answer.field(b"content-encoding")) == (body, coding)
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (5, 9, "provider")
    assert receipt.response_bytes == len(body)


async def test_each_event_of_a_stream_passes_at_once_and_is_metered(gateway: Gateway) -> None:
    client, upstream = await _ask(gateway, b'{"model":"m","stream":true}')
    await upstream.send(_head(b"text/event-stream", b"Content-Encoding: gzip") + b"Transfer-Encoding: chunked\r\n\r\n")
    await client.read_head()
    deflater = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    for event in (DELTA, DELTA, USAGE, b"data: [DONE]\n\n"):
        data = deflater.compress(event) + deflater.flush(zlib.Z_SYNC_FLUSH)
        piece = b"%x\r\n%b\r\n" % (len(data), data)
        await upstream.send(piece)
        await client.expect(piece)
    client.close()  # as SDKs do at the end marker
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.usage_source) == ("ok", "provider")
    assert (receipt.input_tokens, receipt.output_tokens) == (7, 2)


async def test_a_stream_that_is_cut_is_billed_for_what_was_delivered(gateway: Gateway) -> None:
    client, upstream = await _ask(gateway, b'{"model":"m","stream":true}')
    deflater = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    data = deflater.compress(DELTA * 4) + deflater.flush(zlib.Z_SYNC_FLUSH)
    head = _head(b"text/event-stream", b"Content-Encoding: gzip") + b"Transfer-Encoding: chunked\r\n\r\n"
    await upstream.send(head + b"%x\r\n%b\r\n" % (len(data), data))
    await client.read_head()
    await client.expect(b"%x\r\n%b\r\n" % (len(data), data))
    upstream.close()
    await client.expect_end()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.usage_source, receipt.output_tokens) == ("upstream_failed", "estimated", 3)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Content-Encoding: gzip",),  # it is not
        (b"Content-Encoding: unheard-of",),
        (b"Content-Encoding: gzip", b"Content-Encoding: gzip"),
        (b"Content-Encoding: gzip", b"Content-Encoding: identity"),
    ],
)
async def test_what_cannot_be_read_passes_all_the_same(gateway: Gateway, fields: tuple[bytes, ...]) -> None:
    client, upstream = await _ask(gateway)
    await upstream.send(_whole(MESSAGE, *fields))
    assert (await client.answer()).body == MESSAGE
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.usage_source) == ("ok", "none")


async def test_the_answer_of_an_envelope_is_metered(gateway: Gateway) -> None:
    target = f"http://127.0.0.1:{gateway.llm.port}/v1/chat/completions"
    asked = {"protocol": "openinference", "target_url": target, "body": {"model": "m"}}
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=json.dumps(asked).encode()))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(_whole(gzip.compress(MESSAGE), b"Content-Encoding: gzip"))
    told = (await client.answer()).json()
    assert (told["encoding"], told["usage"]["output_tokens"]) == ("base64", 9)
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (5, 9, "provider")
