"""What is not plain HTTP/1.1 is refused whole: D8, D27, R20, R22, R27, R28."""

import pytest

from .conftest import Serve
from .harness import KEY, OK, RAW, Gateway, request

LINE = b"POST " + RAW + b"/x HTTP/1.1\r\n"
HOST = b"Host: gw\r\nX-API-Key: " + KEY + b"\r\n"
HEAD = LINE + HOST
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET " + RAW + b"/smuggled HTTP/1.1\r\n" + HOST + b"\r\n"


def _head(*fields: bytes) -> bytes:
    return HEAD + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def _line(line: bytes) -> bytes:
    return line + b"\r\n" + HOST + b"\r\n"


# name: bytes sent. Behind each stands a whole second request, which must never be executed.
BAD_HEADS: dict[str, bytes] = {
    "CL and TE": _head(b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "TE and CL": _head(b"Transfer-Encoding: chunked", b"Content-Length: 3") + b"0\r\n\r\n",
    "TE and CL 0": _head(b"Transfer-Encoding: chunked", b"Content-Length: 0") + b"0\r\n\r\n",
    "two CL": _head(b"Content-Length: 3", b"Content-Length: 4") + b"abc",
    "two equal CL": _head(b"Content-Length: 3", b"content-length: 3") + b"abc",
    "CL list": _head(b"Content-Length: 3, 3") + b"abc",
    "CL +": _head(b"Content-Length: +3") + b"abc",
    "CL -": _head(b"Content-Length: -1"),
    "CL hex": _head(b"Content-Length: 0x3") + b"abc",
    "CL underscore": _head(b"Content-Length: 1_0") + b"abcdefghij",
    "CL empty": _head(b"Content-Length:"),
    "CL blank inside": _head(b"Content-Length: 1 0") + b"abcdefghij",
    "CL float": _head(b"Content-Length: 3.0") + b"abc",
    "CL letters": _head(b"Content-Length: abc") + b"abc",
    "CL over 64 bits": _head(b"Content-Length: 18446744073709551619") + b"abc",
    "CL of 5,000 digits": _head(b"Content-Length: " + b"0" * 4_999 + b"3") + b"abc",
    "CL arabic digit": _head("Content-Length: ٣".encode()) + b"abc",
    "CL comma": _head(b"Content-Length: 3,") + b"abc",
    "CL quoted": _head(b'Content-Length: "3"') + b"abc",
    "CL underscore name": _head(b"Content_Length: 3") + b"abc",
    "TE underscore name": _head(b"Transfer_Encoding: chunked") + b"0\r\n\r\n",
    "underscore name": _head(b"X_Y: 1"),
    "TE gzip, chunked": _head(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "TE identity, chunked": _head(b"Transfer-Encoding: identity, chunked") + b"0\r\n\r\n",
    "TE chunked, identity": _head(b"Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "TE identity": _head(b"Transfer-Encoding: identity") + b"0\r\n\r\n",
    "TE gzip": _head(b"Transfer-Encoding: gzip") + b"0\r\n\r\n",
    "TE xchunked": _head(b"Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "TE chunkedx": _head(b"Transfer-Encoding: chunkedx") + b"0\r\n\r\n",
    "TE chunked twice": _head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "TE list of two": _head(b"Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "TE gzip then chunked": _head(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "TE leading comma": _head(b"Transfer-Encoding: ,chunked") + b"0\r\n\r\n",
    "TE trailing comma": _head(b"Transfer-Encoding: chunked,") + b"0\r\n\r\n",
    "TE empty": _head(b"Transfer-Encoding:") + b"0\r\n\r\n",
    "TE vertical tab": _head(b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
    "TE parameter": _head(b"Transfer-Encoding: chunked;q=1") + b"0\r\n\r\n",
    "TE quoted": _head(b'Transfer-Encoding: "chunked"') + b"0\r\n\r\n",
    "TE blank before colon": _head(b"Transfer-Encoding : chunked") + b"0\r\n\r\n",
    "TE folded": _head(b"Transfer-Encoding:\r\n chunked") + b"0\r\n\r\n",
    "TE on 1.0": _head(b"Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "name blank before colon": _head(b"X-A : 1"),
    "name tab before colon": _head(b"X-A\t: 1"),
    "name blank inside": _head(b"X A: 1"),
    "name empty": _head(b": 1"),
    "name NUL": _head(b"X\0A: 1"),
    "name latin": _head(b"X\xe9: 1"),
    "name parenthesis": _head(b"X(: 1"),
    "no colon": _head(b"X-A"),
    "value NUL": _head(b"X-A: a\0b"),
    "value bare CR": _head(b"X-A: a\rb"),
    "value CR before CRLF": _head(b"X-A: a\r"),
    "value control": _head(b"X-A: a\x01b"),
    "value DEL": _head(b"X-A: a\x7fb"),
    "bare LF in head": HEAD + b"X-A: 1\nX-B: 2\r\n\r\n",
    "bare LF ends head": HEAD + b"X-A: 1\r\n\n",
    "bare LF only": HEAD.replace(b"\r\n", b"\n") + b"\n",
    "LF ends the line": (LINE + HOST + b"\r\n").replace(b" HTTP/1.1\r\n", b" HTTP/1.1\n"),
    "obs-fold blank": _head(b"X-A: 1\r\n folded"),
    "obs-fold tab": _head(b"X-A: 1\r\n\tfolded"),
    "fold on the first field": LINE + b" X-A: 1\r\n" + HOST + b"\r\n",
    "HTTP/0.9": b"GET " + RAW + b"/x\r\n\r\n",
    "HTTP/0.9 version": _line(b"GET " + RAW + b"/x HTTP/0.9"),
    "HTTP/1.2": _line(b"GET " + RAW + b"/x HTTP/1.2"),
    "HTTP/2.0": _line(b"GET " + RAW + b"/x HTTP/2.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/11": _line(b"GET " + RAW + b"/x HTTP/11"),
    "HTTP/1": _line(b"GET " + RAW + b"/x HTTP/1"),
    "HTTP/1.10": _line(b"GET " + RAW + b"/x HTTP/1.10"),
    "http lower case": _line(b"GET " + RAW + b"/x http/1.1"),
    "version blank": _line(b"GET " + RAW + b"/x HTTP/ 1.1"),
    "blank after version": _line(b"GET " + RAW + b"/x HTTP/1.1 "),
    "tab between": _line(b"GET\t" + RAW + b"/x\tHTTP/1.1"),
    "lower-case method": _line(b"get " + RAW + b"/x HTTP/1.1"),
    "unknown method": _line(b"BREW " + RAW + b"/x HTTP/1.1"),
    "method of one letter": _line(b"G " + RAW + b"/x HTTP/1.1"),
    "leading blank": _line(b" GET " + RAW + b"/x HTTP/1.1"),
    "NUL in target": _line(b"GET " + RAW + b"/\0 HTTP/1.1"),
    "LF in target": _line(b"GET " + RAW + b"/\nx HTTP/1.1"),
    "CR in target": _line(b"GET " + RAW + b"/\rx HTTP/1.1"),
    "no target": _line(b"GET  HTTP/1.1"),
    "CONNECT": _line(b"CONNECT gw:80 HTTP/1.1"),
    "CONNECT to a path": _line(b"CONNECT " + RAW + b"/x HTTP/1.1"),
    "TRACE": _line(b"TRACE " + RAW + b"/x HTTP/1.1"),
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "proxy protocol": b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + HEAD + b"\r\n",
    "unknown expectation": _head(b"Expect: 200-ok", b"Content-Length: 3") + b"abc",
    "two expectations": _head(b"Expect: 100-continue", b"Expect: 200-ok", b"Content-Length: 3") + b"abc",
}

STATUS = {
    "TE gzip, chunked": 501,
    "HTTP/2.0": 505,
    "HTTP/0.9 version": 505,
    "CONNECT": (400, 405),
    "CONNECT to a path": (400, 405),
    "TRACE": 405,
    "unknown expectation": 417,
    "two expectations": 417,
}


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_a_malformed_head_is_refused_and_reaches_nobody(gateway: Gateway, name: str) -> None:
    client = await gateway.ask(BAD_HEADS[name] + SMUGGLED)
    answer = await client.answer()
    expected = STATUS.get(name)
    assert 400 <= answer.status <= 505
    if expected is not None:
        assert answer.status in (expected if isinstance(expected, tuple) else (expected,))
    assert answer.field(b"connection") == b"close"
    assert (answer.field(b"allow") is not None) == (answer.status == 405)
    assert set(answer.json()) == {"error", "code", "request_id"}
    await client.expect_end()
    assert gateway.raw.is_untouched()
    assert gateway.control.is_untouched()
    assert gateway.receipts() == []


@pytest.mark.parametrize("length", [b"", b" ", b"+2"], ids=["empty", "blank", "plus"])
async def test_a_length_is_read_as_strictly_in_a_head_like_the_one_before(gateway: Gateway, length: bytes) -> None:
    good = _head(b"Content-Length: 2", b"X-A: b")
    client = await gateway.ask(good + b"hi")
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"hi")
    await upstream.send(OK)
    assert (await client.answer()).status == 200
    await client.send(good.replace(b": 2\r", b": %b\r" % length))
    assert (await client.answer()).status == 400
    assert upstream.is_silent()
    await gateway.receipt()


@pytest.mark.parametrize("name", ["two CL", "value NUL", "obs-fold blank", "TE gzip, chunked", "HTTP/2.0", "TLS hello"])
async def test_a_malformed_head_that_comes_byte_by_byte_is_refused_too(gateway: Gateway, name: str) -> None:
    client = await gateway.client()
    for byte in BAD_HEADS[name]:
        if client.send_what_fits(bytes([byte])) == 0:
            break
    assert 400 <= (await client.answer()).status <= 505
    assert gateway.raw.is_untouched()


BAD_CHUNKS = {
    "size not hex": b"x\r\nabc\r\n0\r\n\r\n",
    "size empty": b"\r\nabc\r\n0\r\n\r\n",
    "size negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "size plus": b"+3\r\nabc\r\n0\r\n\r\n",
    "size 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size underscore": b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n",
    "size over 64 bits": b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "size blank before": b" 3\r\nabc\r\n0\r\n\r\n",
    "size blank behind": b"3 \r\nabc\r\n0\r\n\r\n",
    "size ends in LF": b"3\nabc\r\n0\r\n\r\n",
    "size ends in CR": b"3\rabc\r\n0\r\n\r\n",
    "data too long": b"3\r\nabcd\r\n0\r\n\r\n",
    "data too short": b"3\r\nab\r\n0\r\n\r\n",
    "data ends in LF": b"3\r\nabc\n0\r\n\r\n",
    "data without end": b"3\r\nabc0\r\n\r\n",
    "extension with LF": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "extension with CR": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "extension with NUL": b"3;a\0b\r\nabc\r\n0\r\n\r\n",
    "trailer folded": b"0\r\nX: 1\r\n 2\r\n\r\n",
    "trailer without colon": b"0\r\nX\r\n\r\n",
    "trailer NUL": b"0\r\nX: \0\r\n\r\n",
    "trailer ends in LF": b"0\r\nX: 1\n\r\n",
    "last LF": b"0\r\n\n",
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_bad_chunks_end_the_call_and_what_follows_is_never_executed(gateway: Gateway, name: str) -> None:
    client = await gateway.ask(CHUNKED + BAD_CHUNKS[name] + SMUGGLED)
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (400, b"close")
    await client.expect_end()
    sent = await gateway.sent_to(gateway.raw)  # the head was sound, so it may have been on its way
    assert b"smuggled" not in sent
    assert b"\r\n0\r\n\r\n" not in sent, "the upstream must not take a broken upload for a whole one"
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.error) == (400, "refused", "BAD_REQUEST")


@pytest.mark.parametrize("trailer", [b"X-Sum: 1", b"Host: b", b"X_Y: 1", b"Authorization: Bearer x", b"Expect: x"])
async def test_a_trailer_is_dropped_and_changes_nothing(gateway: Gateway, trailer: bytes) -> None:
    client = await gateway.ask(CHUNKED + b"3\r\nabc\r\n0\r\n" + trailer + b"\r\n\r\n")
    upstream = await gateway.raw.accept()
    assert trailer not in await upstream.read_head()
    await upstream.expect(b"3\r\nabc\r\n0\r\n\r\n")
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    assert upstream.is_silent()


@pytest.mark.parametrize("trailer", [b"Content-Length: 5", b"Transfer-Encoding: gzip"])
async def test_framing_in_a_trailer_is_refused(gateway: Gateway, trailer: bytes) -> None:
    client = await gateway.ask(CHUNKED + b"3\r\nabc\r\n0\r\n" + trailer + b"\r\n\r\n" + SMUGGLED)
    assert (await client.answer()).status == 400
    await client.expect_end()
    assert b"smuggled" not in await gateway.sent_to(gateway.raw)


@pytest.mark.parametrize(
    "chunks",
    [b"3;name=value\r\nabc\r\n0\r\n\r\n", b"003\r\nabc\r\n000\r\n\r\n", b'3;a="b c"\r\nabc\r\n0;x\r\nT: 1\r\n\r\n'],
)
async def test_sound_chunks_are_framed_anew(gateway: Gateway, chunks: bytes) -> None:
    client = await gateway.ask(CHUNKED + chunks)
    upstream = await gateway.raw.accept()
    assert (await upstream.read_head()).endswith(b"Transfer-Encoding: chunked\r\n\r\n")
    await upstream.expect(b"3\r\nabc\r\n0\r\n\r\n")
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("before", [b"\r\n", b"\r\n\r\n", b"\n"])
async def test_empty_lines_before_a_request_are_skipped(gateway: Gateway, before: bytes) -> None:
    client = await gateway.ask(before + request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    assert (await upstream.read_head()).startswith(b"GET /x HTTP/1.1\r\n")
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_a_malformed_request_behind_a_sound_one_is_refused_after_its_answer(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") + BAD_HEADS["two CL"] + SMUGGLED)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    assert (await client.answer()).status == 400
    await client.expect_end()
    assert gateway.raw.is_untouched()
    await gateway.receipt()


@pytest.mark.parametrize(
    "fields",
    [
        (b"X-Big: " + b"a" * 70_000,),
        tuple(b"X-%d: %b" % (number, b"a" * 1000) for number in range(70)),
        tuple(b"X-%d: 1" % number for number in range(140)),
        tuple(b"Cookie: %d" % number for number in range(140)),
        (b"X-Rate-Limit-Override: " + b"1" * 70_000,),
    ],
)
async def test_an_oversized_head_is_refused(gateway: Gateway, fields: tuple[bytes, ...]) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *fields))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (431, "HEAD_TOO_LARGE")
    await client.expect_end()
    assert gateway.raw.is_untouched()


async def test_an_endless_head_is_cut_at_the_limit(serve: Serve) -> None:
    gateway = await serve(limits={"head_bytes_max": 4_096})
    client = await gateway.ask(b"GET " + RAW + b"/x HTTP/1.1\r\nHost: gw\r\nX-Endless: ")
    for _ in range(64):
        await client.send(b"a" * 256)
        if not client.is_silent():
            break
    assert (await client.answer()).status == 431


@pytest.mark.parametrize("endless", [b"0\r\nX-Endless: ", b"3;endless="])
async def test_what_surrounds_chunks_is_cut_at_the_same_limit(serve: Serve, endless: bytes) -> None:
    gateway = await serve(limits={"head_bytes_max": 4_096})
    client = await gateway.ask(CHUNKED + b"3\r\nabc\r\n" + endless)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"3\r\nabc\r\n")
    for _ in range(64):
        client.send_what_fits(b"a" * 256)
        await gateway.turn()
        if not client.is_silent():
            break
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (431, "HEAD_TOO_LARGE")
    await upstream.expect_gone()
    await client.expect_gone()
    assert (await gateway.receipt()).outcome == "refused"


async def test_long_extensions_between_chunks_that_come_are_no_fault(serve: Serve) -> None:
    gateway = await serve(limits={"head_bytes_max": 4_096})
    client = await gateway.ask(CHUNKED)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    for _ in range(8):
        await client.send(b"1;" + b"a" * 2_000 + b"\r\n")
        await gateway.turn()
        await client.send(b"b\r\n")
        await upstream.expect(b"1\r\nb\r\n")
    await client.send(b"0\r\n\r\n")
    await upstream.expect(b"0\r\n\r\n")
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_a_second_head_on_a_connection_is_bounded_too(serve: Serve) -> None:
    gateway = await serve(limits={"head_bytes_max": 4_096})
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    await client.send(b"GET " + RAW + b"/x HTTP/1.1\r\nHost: gw\r\nX-Endless: " + b"a" * 8_000)
    assert (await client.answer()).status == 431


async def test_an_overlong_target_is_refused(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/" + b"a" * 8_300))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (414, "URI_TOO_LONG")
    await client.expect_end()
    assert gateway.raw.is_untouched()


async def test_a_body_over_the_limit_is_refused_by_its_announcement(serve: Serve) -> None:
    gateway = await serve(limits={"body_bytes_max": 1_000})
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=b"a" * 1_001))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
    assert gateway.raw.is_untouched()


async def test_a_chunked_body_over_the_limit_is_refused_as_it_comes(serve: Serve) -> None:
    gateway = await serve(limits={"body_bytes_max": 1_000})
    client = await gateway.ask(CHUNKED + b"1f4\r\n" + b"a" * 500 + b"\r\n")
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"1f4\r\n" + b"a" * 500 + b"\r\n")
    await client.send(b"1f5\r\n" + b"a" * 501 + b"\r\n")
    assert (await client.answer()).status == 413
    await upstream.expect_gone()
    client.end()
    await client.expect_end()


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_body_that_routing_must_hold_is_bounded(serve: Serve, is_known: bool) -> None:
    gateway = await serve(limits={"buffered_body_bytes_max": 1_000})
    key = KEY if is_known else gateway.keys.add()
    client = await gateway.ask(request(b"POST /v1/chat/completions", body=b" " * 1_001, key=key))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")
    assert gateway.llm.is_untouched()


@pytest.mark.parametrize("body", [b"x\r\n", b"3\r\nabcd\r\n", b"0\r\nX\r\n\r\n"])
async def test_a_broken_body_behind_a_refusal_changes_nothing(gateway: Gateway, body: bytes) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Transfer-Encoding: chunked", key=b"") + body)
    assert (await client.answer()).status == 401
    client.end()
    await client.expect_end()
    assert (await gateway.receipt()).status == 401
