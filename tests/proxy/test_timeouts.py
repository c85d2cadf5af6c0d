"""Every wait has an end: heads, bodies, first bytes, silence, stalled readers, idle connections."""

import socket

import pytest

from .conftest import Serve
from .harness import CHAT, ENVELOPE, OK, OK_SENT, RAW, Gateway, request, until

BODY = b'{"model":"m"}'


async def test_a_client_that_says_nothing_is_closed(gateway: Gateway) -> None:
    client = await gateway.client()
    await gateway.turn()
    gateway.passes(gateway.config.timeouts.head_s)
    await client.expect_end()


async def test_a_head_that_drips_is_a_408(gateway: Gateway) -> None:
    client = await gateway.client()
    for byte in b"GET /x HTTP/1.1\r\n":
        await client.send(bytes([byte]))
        await gateway.turn()
    gateway.passes(gateway.config.timeouts.head_s)
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (408, "REQUEST_TIMEOUT")
    client.end()
    await client.expect_end()


async def test_a_second_head_that_drips_is_a_408(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)
    await client.send(b"GET /x HTTP/1.1\r\nHost:")
    await gateway.turn()
    gateway.passes(gateway.config.timeouts.head_s)
    assert (await client.answer()).status == 408


@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_a_collected_body_that_stops_is_a_408(gateway: Gateway, framing: bytes) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, framing))
    await gateway.turn()
    gateway.passes(gateway.config.timeouts.body_idle_s)
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (408, "REQUEST_TIMEOUT")
    assert gateway.llm.is_untouched()
    assert (await gateway.receipt()).outcome == "refused"


async def test_a_body_that_drips_within_its_time_is_taken(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, b"Content-Length: %d" % len(BODY)))
    for byte in BODY:
        await gateway.turn()
        gateway.passes(gateway.config.timeouts.body_idle_s / 2)
        await client.send(bytes([byte]))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_a_streamed_upload_that_stops_is_a_408_and_stops_the_upstream(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 10") + b"abc")
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(b"abc")
    gateway.passes(gateway.config.timeouts.body_idle_s)
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (408, "REQUEST_TIMEOUT")
    await upstream.expect_gone()


async def test_an_upstream_that_hangs_is_a_504_after_the_first_byte_time(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    gateway.passes(gateway.config.timeouts.first_byte_s - 3)
    await gateway.turn()
    assert client.is_silent()
    gateway.passes(3)
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "UPSTREAM_TIMEOUT")
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.error) == ("upstream_failed", 504, "UPSTREAM_TIMEOUT")


async def test_an_upstream_may_have_a_first_byte_time_of_its_own(serve: Serve) -> None:
    gateway = await serve(raw={"first_byte_s": 5.0})
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    await (await gateway.raw.accept()).read_head()
    gateway.passes(5)
    assert (await client.answer()).status == 504


async def test_a_head_that_stops_half_way_is_a_504(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nX-")
    await gateway.turn()
    gateway.passes(gateway.config.timeouts.first_byte_s)
    assert (await client.answer()).status == 504


async def test_a_stream_that_falls_silent_is_cut_visibly(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    await client.read_head()
    await client.expect(b"3\r\nabc\r\n")
    gateway.passes(gateway.config.timeouts.idle_s)
    await client.expect_end()
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, receipt.response_bytes) == ("upstream_failed", "UPSTREAM_TIMEOUT", 3)


async def test_a_stream_that_keeps_talking_lasts_as_long_as_it_likes(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await client.read_head()
    for _ in range(20):
        gateway.passes(gateway.config.timeouts.idle_s - 3)
        await upstream.send(b"1\r\n:\r\n")
        await client.expect(b"1\r\n:\r\n")
    await upstream.send(b"0\r\n\r\n")
    await client.expect(b"0\r\n\r\n")
    assert (await gateway.receipt()).outcome == "ok"


async def test_a_client_that_stops_reading_is_cut(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    idle_count = 0
    while idle_count < 20:
        idle_count = 0 if upstream.send_what_fits(b"a" * 1_048_576) else idle_count + 1
        await gateway.turn()
    gateway.passes(gateway.config.timeouts.idle_s)
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status) == ("client_gone", 200)
    await upstream.expect_gone()
    client.close()


async def test_an_idle_connection_is_kept_for_a_while_and_then_closed(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)
    gateway.passes(gateway.config.timeouts.keepalive_s - 3)
    await gateway.turn()
    assert client.is_silent()
    gateway.passes(3)
    await client.expect_end()


async def test_a_client_that_lingers_is_cut_off(gateway: Gateway) -> None:
    client = await gateway.ask(b"BAD\r\n\r\n")
    assert (await client.answer()).status == 400
    gateway.passes(gateway.config.timeouts.linger_s)
    await until(lambda: not gateway.plane.downstreams, "the connection's end")


async def test_a_connection_that_cannot_be_made_in_time_is_a_504(serve: Serve) -> None:
    gateway = await serve(timeouts={"connect_s": 0.05})
    full = []  # a listener whose queue is full takes no connection
    gateway.raw.sock.listen(0)
    for _ in range(4):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", gateway.raw.port))
        full.append(sock)
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (504, "UPSTREAM_TIMEOUT")
    assert (await gateway.receipt()).outcome == "upstream_failed"
    for sock in full:
        sock.close()


async def test_too_many_upstream_connections_are_a_503(serve: Serve) -> None:
    gateway = await serve(limits={"upstream_connections_max": 1})
    first = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    second = await gateway.ask(request(b"GET " + RAW + b"/y", id=b"t2"))
    answer = await second.answer()
    assert (answer.status, answer.json()["code"], answer.field(b"retry-after")) == (503, "UPSTREAM_BUSY", b"1")
    await upstream.send(OK)
    await first.expect(OK_SENT)


async def test_an_envelope_may_say_how_long_to_wait(gateway: Gateway) -> None:
    target = b"http://127.0.0.1:%d/x" % gateway.raw.port
    body = b'{"protocol":"https","target_url":"' + target + b'","timeout_s":3}'
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=body))
    await (await gateway.raw.accept()).read_head()
    gateway.passes(3)
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (504, "UPSTREAM_TIMEOUT")
