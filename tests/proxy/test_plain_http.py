"""Protocol https, and whatever is not looked into: any method, any bytes, any size, untouched both ways."""

import gzip
import zlib
from http import HTTPStatus

import pytest

from .conftest import Serve
from .harness import OK, RAW, Gateway, answered, forwarded, request

BINARY = bytes(range(256)) * 4
PACKED = gzip.compress(BINARY, mtime=0)
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="\xc5\x81.bin"\r\n\r\n%b\r\n--b--\r\n' % BINARY
KINDS: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "binary": (BINARY, (b"Content-Type: application/octet-stream",)),
    "gzip": (PACKED, (b"Content-Type: application/json", b"Content-Encoding: gzip")),
    "deflate": (zlib.compress(BINARY), (b"Content-Type: text/plain", b"Content-Encoding: deflate")),
    "form": (FORM, (b"Content-Type: multipart/form-data; boundary=b",)),
    "broken json": (b'{"a":', (b"Content-Type: application/json",)),
    "events": (b"data: {\r\rdata: [DONE]\n\n", (b"Content-Type: text/event-stream", b"X-Accel-Buffering: no")),
}


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH", b"DELETE", b"GET", b"OPTIONS", b"PROPFIND", b"SEARCH"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_body_of_any_kind_passes_byte_for_byte_with_any_method(
    gateway: Gateway, method: bytes, kind: str
) -> None:
    body, fields = KINDS[kind]
    fields = (*fields, b'ETag: W/"1"', b"X-Any: \xff")
    client = await gateway.ask(request(method + b" " + RAW + b"/a//b/../%2e?q=%2F&&", *fields, body=body))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(
            method + b" /a//b/../%2e?q=%2F&&",
            *fields,
            port=gateway.raw.port,
            framing=b"Content-Length: %d" % len(body),
            body=body,
        )
    )
    length = b"Content-Length: %d" % len(body)
    await upstream.send(b"HTTP/1.1 207 Multi-Status\r\n" + b"\r\n".join((*fields, length)) + b"\r\n\r\n" + body)
    await client.expect(answered(b"207 Multi-Status", *fields, framing=length, body=body))


RANGES: dict[str, tuple[bytes, bytes, bytes]] = {
    "a part": (b"Range: bytes=2-5", b"206 Partial Content", b"Content-Range: bytes 2-5/10"),
    "the end": (b"Range: bytes=-4", b"206 Partial Content", b"Content-Range: bytes 6-9/10"),
    "several": (b"Range: bytes=0-0,-1", b"206 Partial Content", b"Content-Type: multipart/byteranges; boundary=x"),
    "outside": (b"Range: bytes=99-", b"416 " + HTTPStatus(416).phrase.encode(), b"Content-Range: bytes */10"),
    "changed": (b'If-Range: "1"', b"200 OK", b"Accept-Ranges: bytes"),
}


@pytest.mark.parametrize("name", RANGES)
async def test_ranges_are_between_client_and_upstream(gateway: Gateway, name: str) -> None:
    asked, status, told = RANGES[name]
    client = await gateway.ask(request(b"GET " + RAW + b"/file", asked))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /file", asked, port=gateway.raw.port))
    await upstream.send(b"HTTP/1.1 %b\r\n%b\r\nContent-Length: 4\r\n\r\nabcd" % (status, told))
    await client.expect(answered(status, told, framing=b"Content-Length: 4", body=b"abcd"))


@pytest.mark.parametrize(
    "status", [b"301 Moved Permanently", b"302 Found", b"303 See Other", b"307 Temporary Redirect"]
)
async def test_a_redirect_is_passed_back_and_not_followed(gateway: Gateway, status: bytes) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=b"abc"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"abc")
    location = b"Location: http://127.0.0.1:%d/elsewhere" % gateway.tools.port
    await upstream.send(b"HTTP/1.1 %b\r\n%b\r\nContent-Length: 0\r\n\r\n" % (status, location))
    await client.expect(answered(status, location, framing=b"Content-Length: 0"))
    assert gateway.tools.is_untouched()


async def test_conditions_and_their_answers_pass(gateway: Gateway) -> None:
    fields = (
        b'If-None-Match: "1"',
        b"If-Modified-Since: Thu, 26 Nov 2026 00:00:00 GMT",
        b"Cache-Control: no-transform",
    )
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *fields))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", *fields, port=gateway.raw.port))
    await upstream.send(b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\nVary: Accept\r\n\r\n')
    await client.expect(answered(b"304 Not Modified", b'ETag: "1"', b"Vary: Accept"))


async def test_a_body_of_the_size_configured_passes_without_being_held(serve: Serve) -> None:
    limit = 8 * 1_048_576
    gateway = await serve(limits={"body_bytes_max": limit, "buffered_body_bytes_max": 1_048_576})
    client = await gateway.ask(request(b"PUT " + RAW + b"/x", b"Content-Length: %d" % limit))
    upstream = await gateway.raw.accept()
    assert b"Content-Length: %d\r\n" % limit in await upstream.read_head()
    (exchange,) = [each for each in gateway.started if each.upstream is not None]
    piece = b"x" * 262_144
    for sent in range(0, limit, len(piece)):
        await client.send(piece)
        assert await upstream.read(len(piece)) == piece, "each piece is there before the next is sent"
        held = sum(map(len, exchange.held_body)) + gateway.unsent_upstream_bytes()
        assert held < 1_048_576, sent
    await upstream.send(OK)
    assert (await client.answer()).status == 200
    assert (await gateway.receipt()).request_bytes == limit


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_one_byte_more_is_refused(serve: Serve, is_chunked: bool) -> None:
    gateway = await serve(limits={"body_bytes_max": 1_048_576, "buffered_body_bytes_max": 1_048_576})
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 1048577"
    client = await gateway.ask(request(b"PUT " + RAW + b"/x", framing))
    if is_chunked:
        await client.send(b"100001\r\n" + b"x" * 1_048_577 + b"\r\n0\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
