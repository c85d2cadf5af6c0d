"""Uploads, interim answers and answers that come early: D12, D13, D15."""

import pytest

from .conftest import Serve
from .harness import CHAT, KEY, OK, OK_SENT, RAW, Gateway, answered, forwarded, request

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = b"Expect: 100-continue"


def _chunked_head(*fields: bytes, target: bytes = RAW + b"/x", key: bytes = KEY) -> bytes:
    return request(b"POST " + target, b"Transfer-Encoding: chunked", *fields, key=key)


async def test_an_upload_streams_chunk_by_chunk(gateway: Gateway) -> None:
    client = await gateway.ask(_chunked_head())
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"POST /x", port=gateway.raw.port, framing=b"Transfer-Encoding: chunked"))
    await client.send(b"3\r\nabc\r\n")
    await upstream.expect(b"3\r\nabc\r\n")
    await client.send(b"2\r\nde\r\n")
    await upstream.expect(b"2\r\nde\r\n")
    await client.send(b"0\r\n\r\n")
    await upstream.expect(b"0\r\n\r\n")
    await upstream.send(OK)
    await client.expect(OK_SENT)
    assert (await gateway.receipt()).request_bytes == 5


async def test_an_upload_of_known_length_keeps_it(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"PUT " + RAW + b"/x", b"Content-Length: 5"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"PUT /x", port=gateway.raw.port, framing=b"Content-Length: 5"))
    await client.send(b"abc")
    await upstream.expect(b"abc")
    await client.send(b"de")
    await upstream.expect(b"de")
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_empty_post_says_so_upstream(gateway: Gateway, is_known: bool) -> None:
    key = KEY if is_known else gateway.keys.add()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=b"", key=key))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"POST /x", port=gateway.raw.port, framing=b"Content-Length: 0"))
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_a_get_without_body_gets_no_framing(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"DELETE " + RAW + b"/x", key=gateway.keys.add()))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"DELETE /x", port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_a_body_that_arrives_while_the_key_is_asked_is_sent_whole(gateway: Gateway) -> None:
    gateway.keys.gate.clear()
    key = gateway.keys.add()
    body = b"a" * 50_000
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=body, key=key))
    await client.send(request(b"GET " + RAW + b"/y", key=key, id=b"t2"))
    gateway.keys.gate.set()
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"POST /x", port=gateway.raw.port, framing=b"Content-Length: 50000", body=body)
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_a_long_upload_while_the_key_is_asked_waits_outside(gateway: Gateway) -> None:
    gateway.keys.gate.clear()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 33554432", key=gateway.keys.add()))
    sent = 0
    for _ in range(100):
        sent += client.send_what_fits(b"a" * 1_048_576)
        await gateway.turn()
    assert sent < 33_554_432, "all of it was taken in"
    gateway.keys.gate.set()
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    taken = 0
    while taken < sent:
        taken += len(await upstream.read(min(262_144, sent - taken)))
    client.reset()
    await upstream.expect_gone()


@pytest.mark.parametrize("is_known", [True, False])
async def test_continue_is_said_once_the_caller_is_admitted(gateway: Gateway, is_known: bool) -> None:
    key = KEY if is_known else gateway.keys.add()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", EXPECT, b"Content-Length: 3", key=key))
    await client.expect(CONTINUE)
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"POST /x", port=gateway.raw.port, framing=b"Content-Length: 3"))
    await client.send(b"abc")
    await upstream.expect(b"abc")
    await upstream.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
    await client.expect(OK_SENT)


async def test_continue_is_said_for_a_body_that_routing_needs(gateway: Gateway) -> None:
    body = b'{"model":"m"}'
    client = await gateway.ask(request(b"POST " + CHAT, EXPECT, b"Content-Length: %d" % len(body)))
    await client.expect(CONTINUE)
    await client.send(body)
    upstream = await gateway.llm.accept()
    assert (await upstream.read_head()).endswith(b"Content-Length: 13\r\n\r\n")
    await upstream.expect(body)
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_continue_is_not_said_when_the_body_comes_unasked(gateway: Gateway) -> None:
    gateway.keys.gate.clear()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", EXPECT, body=b"abc", key=gateway.keys.add()))
    await gateway.turn()
    gateway.keys.gate.set()
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"abc")
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize(
    ("fields", "key", "status"),
    [
        ((b"Content-Length: 3",), b"", 401),
        ((b"Content-Length: 3",), b"gp_nonsense", 401),
        ((b"Content-Length: 99999999999",), KEY, 413),
        ((b"Transfer-Encoding: chunked",), b"", 401),
        ((b"Content-Length: 3", b"Via: 1.1 gpuproxy, 1.1 gpuproxy"), KEY, 508),
    ],
)
async def test_a_refusal_decided_by_the_head_says_no_continue(
    gateway: Gateway, fields: tuple[bytes, ...], key: bytes, status: int
) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", EXPECT, *fields, key=key))
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (status, b"close")
    client.end()
    await client.expect_end()
    assert gateway.raw.is_untouched()
    assert (await gateway.receipt()).outcome == "refused"


async def test_an_unknown_key_gets_no_continue(gateway: Gateway) -> None:
    stranger = gateway.keys.add()
    gateway.keys.grants.clear()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", EXPECT, b"Content-Length: 3", key=stranger))
    assert (await client.answer()).status == 401


async def test_http_1_0_is_never_told_to_continue(gateway: Gateway) -> None:
    head = request(b"POST " + RAW + b"/x", EXPECT, b"Content-Length: 3").replace(b"HTTP/1.1", b"HTTP/1.0")
    client = await gateway.ask(head)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await client.send(b"abc")
    await upstream.expect(b"abc")
    await upstream.send(OK)
    assert (await client.answer()).status == 200


async def test_early_hints_pass_with_their_fields(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nLink: </b.css>\r\n\r\n"
    await upstream.send(hints)
    await client.expect(hints)
    await upstream.send(b"HTTP/1.1 102 Processing\r\nX-Hop: 1\r\n\r\n" + OK)
    await client.expect(b"HTTP/1.1 102 Processing\r\nX-Hop: 1\r\n\r\n" + OK_SENT)


async def test_a_continue_of_the_upstream_itself_ends_here(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=b"abc"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(CONTINUE + CONTINUE + OK)
    await client.expect(OK_SENT)


async def test_http_1_0_gets_no_interim_answer(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"HTTP/1.1", b"HTTP/1.0"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK)
    assert (await client.answer()).status == 200


async def test_hop_by_hop_fields_of_an_interim_answer_end_here(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(
        b"HTTP/1.1 103 Early Hints\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nA: b\r\n\r\n" + OK
    )
    await client.expect(b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" + OK_SENT)


async def test_fields_of_an_interim_answer_do_not_leak_into_the_final_one(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(
        b"HTTP/1.1 103 Early Hints\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: no\r\nUpgrade: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    assert (await client.answer()).status == 103
    await client.expect(answered(b"200 OK", framing=b"Transfer-Encoding: chunked", body=b"2\r\nok\r\n0\r\n\r\n"))


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 10485760"])
async def test_an_early_refusal_reaches_a_client_that_still_uploads(gateway: Gateway, framing: bytes) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", framing))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    part = b"a" * 65_536
    piece = b"10000\r\n" + part + b"\r\n" if b"chunked" in framing else part
    await client.send(piece)
    await upstream.read(65_536)
    await upstream.send(b"HTTP/1.1 413 Too Big\r\nContent-Length: 3\r\n\r\nbig")
    await upstream.expect_gone()
    for _ in range(20):  # it goes on, not having looked
        client.send_what_fits(piece)
        await gateway.turn()
    answer = await client.answer()
    assert (answer.status, answer.body, answer.field(b"connection")) == (413, b"big", b"close")
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome) == (413, "ok")


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 10485760"])
async def test_an_early_refusal_arrives_though_the_upstream_closes_at_once(gateway: Gateway, framing: bytes) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", framing))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    part = b"a" * 65_536
    client.send_what_fits(b"10000\r\n" + part + b"\r\n" if b"chunked" in framing else part)
    upstream.send_what_fits(b"HTTP/1.1 413 Too Big\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig")
    upstream.reset()  # as the kernel does when a server closes without reading: the next write to it fails
    answer = await client.answer()
    assert (answer.status, answer.body) == (413, b"big")
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome) == (413, "ok")


async def test_half_an_early_refusal_is_none(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 10485760"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    client.send_what_fits(b"a" * 65_536)
    upstream.send_what_fits(b"HTTP/1.1 413 Too Big\r\nContent-Le")
    upstream.reset()
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_INVALID")


async def test_a_refused_upload_that_ends_soon_keeps_the_connection(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST /v1/nothing", b"Content-Length: 10", key=b""))
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (401, None)
    await client.send(b"0123456789" + request(b"GET " + RAW + b"/x", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", port=gateway.raw.port, id=b"t2"))
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_the_rest_of_a_long_refused_upload_is_not_waited_for(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 1000000", key=b"") + b"a" * 1000)
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (401, b"close")
    client.end()
    await client.expect_end()


async def test_bytes_behind_a_refused_chunked_upload_are_no_request(gateway: Gateway) -> None:
    smuggled = request(b"GET " + RAW + b"/smuggled", id=b"t2")
    client = await gateway.ask(_chunked_head(key=b""))
    assert (await client.answer()).status == 401
    await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled) + smuggled)
    client.end()
    await client.expect_end()
    assert gateway.raw.is_untouched()


async def test_no_upstream_means_502_and_names_it(serve: Serve) -> None:
    gateway = await serve()
    gateway.raw.sock.close()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", body=b"abc"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_UNREACHABLE")
    assert "'raw'" in answer.json()["error"]
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.attempts) == ("upstream_failed", 502, 1)
