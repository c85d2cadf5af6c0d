"""What an upstream answers that is not plain HTTP/1.1 never passes: D9, D10, R26."""

import pytest

from .conftest import Serve
from .harness import CHAT, OK, RAW, Gateway, answered, request
from .wire import Listener

STATUS = b"HTTP/1.1 200 OK\r\n"
SECRET = b"of-somebody-else"

# name: bytes the upstream sends instead of an answer; none of them may reach the client.
BAD_HEADS = {
    "CL and TE": STATUS + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE and CL": STATUS + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two CL": STATUS + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "CL list": STATUS + b"Content-Length: 3, 3\r\n\r\nabc",
    "CL -": STATUS + b"Content-Length: -1\r\n\r\n",
    "CL +": STATUS + b"Content-Length: +3\r\n\r\nabc",
    "CL hex": STATUS + b"Content-Length: 0x3\r\n\r\nabc",
    "CL letters": STATUS + b"Content-Length: abc\r\n\r\nabc",
    "CL over 64 bits": STATUS + b"Content-Length: 18446744073709551619\r\n\r\nabc",
    "CL of 5,000 digits": STATUS + b"Content-Length: " + b"0" * 4_999 + b"3\r\n\r\nabc",
    "TE gzip, chunked": STATUS + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE gzip": STATUS + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "TE chunked, gzip": STATUS + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "TE identity": STATUS + b"Transfer-Encoding: identity\r\n\r\nabc",
    "TE list of two": STATUS + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "TE leading comma": STATUS + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    "TE xchunked": STATUS + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "TE then TE gzip": STATUS + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "name blank before colon": STATUS + b"X-A : 1\r\nContent-Length: 0\r\n\r\n",
    "name empty": STATUS + b": 1\r\nContent-Length: 0\r\n\r\n",
    "name NUL": STATUS + b"X\0: 1\r\nContent-Length: 0\r\n\r\n",
    "no colon": STATUS + b"X-A\r\nContent-Length: 0\r\n\r\n",
    "value NUL": STATUS + b"X-A: a\0b\r\nContent-Length: 0\r\n\r\n",
    "value bare CR": STATUS + b"X-A: a\rb\r\nContent-Length: 0\r\n\r\n",
    "value bare LF": STATUS + b"X-A: a\nContent-Length: 0\r\n\r\n",
    "obs-fold": STATUS + b"X-A: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "ICY": b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no version": b"200 OK\r\nContent-Length: 0\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "status letters": b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
    "status 0": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n",
    "status 99": b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTML": b"<html>" + SECRET + b"</html>",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46" + b"\0" * 20,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "NULs": b"\0" * 64,
    "switch unasked": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + SECRET,
    "a head without end": STATUS + b"X-A: " + b"a" * 300_000,
    "300 fields": STATUS + b"X-A: 1\r\n" * 300 + b"Content-Length: 0\r\n\r\n",
    "20 interim answers": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20 + OK,
}


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_an_answer_that_is_not_http_is_a_502_and_ends_its_connection(gateway: Gateway, name: str) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    upstream.send_what_fits(BAD_HEADS[name])
    answer = await client.answer()
    while answer.status == 103:
        answer = await client.answer()
    assert answer.status == 502
    assert answer.json()["code"] == "UPSTREAM_INVALID"
    assert SECRET not in answer.body
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.error) == (502, "upstream_failed", "UPSTREAM_INVALID")
    await client.send(request(b"GET " + RAW + b"/y"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("name", ["CL and TE", "two CL", "value NUL", "TE gzip", "status of two digits", "HTML"])
async def test_such_an_answer_byte_by_byte_is_a_502_too(gateway: Gateway, name: str) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m"}'))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    for byte in BAD_HEADS[name]:
        if not upstream.send_what_fits(bytes([byte])):
            break
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (502, "UPSTREAM_INVALID")
    await upstream.expect_gone()


@pytest.mark.parametrize(
    "part", [b"", b"H", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"]
)
@pytest.mark.parametrize("is_reset", [False, True])
async def test_an_upstream_that_closes_before_its_head_is_whole_is_a_502(
    gateway: Gateway, part: bytes, is_reset: bool
) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(part)
    if is_reset:
        upstream.reset()
    else:
        upstream.close()
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_INVALID")
    assert (await gateway.receipt()).outcome == "upstream_failed"


@pytest.mark.parametrize("is_envelope", [False, True])
@pytest.mark.parametrize("endless", [b"0\r\nX-Endless: ", b"3;endless="])
async def test_what_surrounds_chunks_has_an_end(gateway: Gateway, endless: bytes, is_envelope: bool) -> None:
    target = b'{"protocol":"https","target_url":"http://127.0.0.1:%d/x"}' % gateway.raw.port
    call = request(b"POST /api/v1/gpu/proxy", body=target) if is_envelope else request(b"GET " + RAW + b"/x")
    client = await gateway.ask(call)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    for number in range(4):  # an extension of a chunk is none of the next one's
        await upstream.send(b"3;" + b"a" * 100_000 + b"\r\n")
        await gateway.turn()
        await upstream.send(b"%d00\r\n" % number)
    await upstream.send(endless)
    for _ in range(100):
        if not upstream.send_what_fits(b"a" * 16_384):
            break
        await gateway.turn()
    await upstream.expect_gone()
    answer = await client.answer()
    assert answer.status == 502 if is_envelope else not answer.is_whole
    assert (await gateway.receipt()).outcome == "upstream_failed"


HEADS = {"length": b"Content-Length: 10\r\n", "chunked": b"Transfer-Encoding: chunked\r\n"}
BAD_CHUNKS = [
    b"",
    b"5",
    b"5\r\nhello",
    b"5\r\nhello\r\n",
    b"5\r\nhello\r\n0\r\n",
    b"5\r\nhelloX",
    b"x\r\n",
    b"5\r\nhello\r\n-1\r\n",
]


@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_body_short_of_its_length_is_cut_visibly(gateway: Gateway, is_reset: bool) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["length"] + b"\r\nhello")
    await client.expect(answered(b"200 OK", framing=b"Content-Length: 10", body=b"hello"))
    if is_reset:
        upstream.reset()
    else:
        upstream.close()
    await client.expect_end()
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.error) == (200, "upstream_failed", "UPSTREAM_INVALID")
    assert receipt.response_bytes == 5


@pytest.mark.parametrize("body", BAD_CHUNKS)
async def test_a_chunked_body_without_its_end_is_cut_visibly(gateway: Gateway, body: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["chunked"] + b"\r\n" + b"3\r\nabc\r\n")
    await client.expect(answered(b"200 OK", framing=b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n"))
    await upstream.send(body)
    upstream.end()
    rest = await client.read_to_end()
    assert rest in (b"", b"5\r\nhello\r\n")
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome) == (200, "upstream_failed")
    assert receipt.response_bytes == 3 + (5 if rest else 0)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_cut_body_in_the_heads_own_segment_is_cut_visibly(gateway: Gateway, framing: str) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS[framing] + b"\r\n" + (b"5\r\nhello\r\n" if framing == "chunked" else b"hello"))
    upstream.close()
    answer = await client.answer()
    assert answer.status == 502 or not answer.is_whole
    assert (await gateway.receipt()).outcome == "upstream_failed"


async def test_an_http_1_0_client_sees_a_cut_of_a_chunked_answer(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"HTTP/1.1", b"HTTP/1.0"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["chunked"] + b"\r\n5\r\nhello\r\n")
    head = await client.read_head()
    assert b"ransfer-" not in head
    await client.expect(b"hello")
    upstream.close()
    await client.expect_reset()
    assert (await gateway.receipt()).outcome == "upstream_failed"


async def test_an_http_1_0_client_sees_the_end_of_a_whole_chunked_answer(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"HTTP/1.1", b"HTTP/1.0"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["chunked"] + b"\r\n5\r\nhello\r\n")
    await upstream.send(b"3\r\nabc\r\n0\r\n\r\n")
    answer = await client.answer()
    assert (answer.body, answer.is_whole, answer.field(b"connection")) == (b"helloabc", True, b"close")
    assert (await gateway.receipt()).outcome == "ok"


async def test_a_close_delimited_answer_ends_whole_at_its_end(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.0 200 Fine\r\n\r\nhello")
    await upstream.send(b" you")
    upstream.close()
    answer = await client.answer()
    assert (answer.status, answer.body, answer.is_whole) == (200, b"hello you", True)
    assert (await gateway.receipt()).outcome == "ok"


async def test_a_close_delimited_answer_that_is_reset_is_cut_visibly(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + b"\r\nhello")
    await client.expect(answered(b"200 OK", framing=b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n"))
    upstream.reset()
    await client.expect_end()
    assert (await gateway.receipt()).outcome == "upstream_failed"


EXTRA = {
    "an answer": b"HTTP/1.1 500 Of Somebody Else\r\nX-Leak: 1\r\nContent-Length: 4\r\n\r\nleak",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\nX-Leak: 1\r\n\r\n",
    "a continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "half an answer": b"HTTP/1.1 500 Of Somebody",
    "a head only": b"HTTP/1.1 500 Leak\r\nX-Leak: 1\r\nContent-Type: text/leak\r\nContent-Length: 4\r\n\r\n",
    "an event stream": b"HTTP/1.1 500 Leak\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a switch": b"HTTP/1.1 101 Leak\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nleak",
    "bytes": b"leak",
    "a NUL": b"\0",
}
FIRST = {
    "length": STATUS + b"X-Mine: 1\r\nContent-Length: 2\r\n\r\nok",
    "chunked": STATUS + b"X-Mine: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "no body": b"HTTP/1.1 204 No Content\r\nX-Mine: 1\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nX-Mine: 1\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("first", FIRST)
async def test_bytes_behind_an_answer_change_nothing_and_end_the_connection(
    gateway: Gateway, first: str, name: str
) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(FIRST[first] + EXTRA[name])
    answer = await client.answer()
    assert answer.status == int(FIRST[first][9:12])
    assert answer.body == (b"ok" if answer.status == 200 else b"")
    assert answer.field(b"x-mine") == b"1"
    assert answer.field(b"x-leak") is None
    assert answer.is_whole
    assert (await gateway.receipt()).status == answer.status
    await client.send(request(b"GET " + RAW + b"/y"))
    fresh = await gateway.raw.accept()
    await fresh.read_head()
    await fresh.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"301 Moved"])
async def test_head_has_no_body_but_keeps_the_length(gateway: Gateway, status: bytes) -> None:
    client = await gateway.ask(request(b"HEAD " + RAW + b"/x") + request(b"GET " + RAW + b"/y", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000\r\n\r\n")
    await client.expect(
        answered(status if status != b"301 Moved" else b"301 Moved Permanently", framing=b"Content-Length: 1000")
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nleak",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nleak\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nleak",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_a_body_sent_in_answer_to_head_is_dropped(gateway: Gateway, sent: bytes) -> None:
    client = await gateway.ask(request(b"HEAD " + RAW + b"/x") + request(b"GET " + RAW + b"/y", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(sent)
    assert (await client.answer(b"HEAD")).status == 200
    await upstream.expect_gone()
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("body", [b"", b"leak"])
async def test_204_and_304_have_no_body(gateway: Gateway, status: bytes, body: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") + request(b"GET " + RAW + b"/y", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    length = b"Content-Length: 4"
    await upstream.send(b"HTTP/1.1 " + status + b'\r\nETag: "a"\r\n' + length + b"\r\n\r\n" + body)
    await client.expect(answered(status, b'ETag: "a"', framing=b"" if status.startswith(b"204") else length))
    upstream = upstream if not body else await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("line", [b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.1 200 All is fine", b"HTTP/1.0 200 OK"])
async def test_the_reason_phrase_does_not_matter(gateway: Gateway, line: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(line + b"\r\nContent-Length: 2\r\n\r\nok")
    await client.expect(answered(b"200 OK", framing=b"Content-Length: 2", body=b"ok"))


@pytest.mark.parametrize("status", [218, 299, 451, 499, 520, 599, 999])
async def test_a_status_nobody_registered_passes(gateway: Gateway, status: int) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status)
    answer = await client.answer()
    assert (answer.status, answer.body) == (status, b"ok")


def _envelope(listener: Listener) -> bytes:
    target = b'{"protocol":"https","target_url":"http://127.0.0.1:%d/x","method":"GET"}' % listener.port
    return request(b"POST /api/v1/gpu/proxy", body=target)


@pytest.mark.parametrize("body", [b"", b"hello"])
@pytest.mark.parametrize("is_reused", [False, True])
async def test_an_envelope_tells_of_a_cut_answer_and_sends_the_call_once(
    gateway: Gateway, body: bytes, is_reused: bool
) -> None:
    client = await gateway.client()
    if is_reused:
        await client.send(_envelope(gateway.raw))
        upstream = await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).status == 200
    await client.send(_envelope(gateway.raw))
    upstream = upstream if is_reused else await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["length"] + b"\r\n" + body)
    await gateway.turn()
    upstream.close()
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_INVALID")
    assert gateway.raw.is_untouched()
    assert (await gateway.receipt(1 + is_reused)).outcome == "upstream_failed"


@pytest.mark.parametrize("how", ["lost", "first_byte"])
async def test_an_envelope_whose_answer_has_begun_is_sent_to_no_other_url(
    serve: Serve, pair: tuple[Listener, Listener], how: str
) -> None:
    gateway = await serve(raw={"urls": [each.url for each in pair]})
    client = await gateway.ask(_envelope(pair[0]))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(STATUS + HEADS["length"] + b"\r\nhello")
    await gateway.turn()
    if how == "lost":
        upstream.close()
    else:
        gateway.passes(gateway.config.timeouts.idle_s)
    assert (await client.answer()).status == (502 if how == "lost" else 504)
    assert pair[1].is_untouched()
    assert (await gateway.receipt()).attempts == 1
