"""A client that leaves stops the upstream within 100 ms and is billed for what it got: D16, D17."""

import asyncio
import time

import pytest

from .conftest import Serve
from .harness import CHAT, ENVELOPE, OK, RAW, Gateway, request
from .wire import Wire

LEFT_S = 1.0  # far below any time the gateway waits; what it does takes under a millisecond
HELD_BYTES_MAX = 1_048_576  # one read is up to 262,144 bytes, the write buffer 65,536
BODY = b'{"model":"m","stream":true}'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _leave(client: Wire, how: str) -> None:
    {"closes": client.close, "resets": client.reset, "ends": client.end}[how]()


HOWS = pytest.mark.parametrize("how", ["closes", "resets", "ends"])


@HOWS
async def test_before_the_first_byte(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    _leave(client, how)
    await upstream.expect_gone(LEFT_S)
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.response_bytes) == ("client_gone", 0, 0)
    assert (receipt.model, receipt.is_stream, receipt.first_byte_us) == ("m", True, -1)


@HOWS
async def test_mid_stream_it_is_billed_for_what_it_got(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    event = b'data: {"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
    await upstream.send(STREAM + b"%x\r\n%b\r\n" % (len(event), event))
    await client.read_head()
    await client.expect(b"%x\r\n%b\r\n" % (len(event), event))
    _leave(client, how)
    await upstream.expect_gone(LEFT_S)
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.response_bytes) == ("client_gone", 200, len(event))
    assert (receipt.input_tokens, receipt.output_tokens) == (5, 2)


@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_while_writing_to_it_is_blocked(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    await _fill(upstream, gateway)
    _leave(client, how)
    began_s = time.monotonic()
    receipt = await gateway.receipt()
    assert time.monotonic() - began_s < LEFT_S
    assert (receipt.outcome, receipt.status) == ("client_gone", 200)
    await upstream.expect_gone(LEFT_S)


@HOWS
async def test_during_its_upload(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 1000000"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await client.send(b"abc")
    await upstream.expect(b"abc")
    _leave(client, how)
    await upstream.expect_gone(LEFT_S)
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.request_bytes) == ("client_gone", 3)


@HOWS
async def test_during_a_chunked_upload_the_upstream_never_sees_its_end(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Transfer-Encoding: chunked"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await client.send(b"3\r\nabc\r\n")
    await upstream.expect(b"3\r\nabc\r\n")
    _leave(client, how)
    assert await upstream.read_to_end() == b""
    assert (await gateway.receipt()).outcome == "client_gone"


@HOWS
async def test_while_its_upload_is_blocked_by_the_upstream(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 60000000"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    while not gateway.plane.unread:  # no further: an end behind bytes the kernel cannot deliver is never seen
        client.send_what_fits(b"a" * 65_536)
        await gateway.turn()
    _leave(client, how)
    began_s = time.monotonic()
    receipt = await gateway.receipt()
    assert time.monotonic() - began_s < LEFT_S
    assert receipt.outcome == "client_gone"
    await upstream.expect_gone()


@HOWS
async def test_while_its_body_is_collected(gateway: Gateway, how: str) -> None:
    client = await gateway.ask(request(b"POST " + CHAT, b"Content-Length: 1000") + b"{")
    await gateway.turn()
    _leave(client, how)
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status) == ("client_gone", 0)
    assert gateway.llm.is_untouched()


@HOWS
async def test_while_its_key_is_asked(gateway: Gateway, how: str) -> None:
    gateway.keys.gate.clear()
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=gateway.keys.add()))
    await gateway.turn()
    _leave(client, how)
    assert (await gateway.receipt()).outcome == "client_gone"
    gateway.keys.gate.set()
    await gateway.turn()
    assert gateway.raw.is_untouched()


@HOWS
async def test_during_a_wrapped_answer(gateway: Gateway, how: str) -> None:
    target = b"http://127.0.0.1:%d/x" % gateway.raw.port
    client = await gateway.ask(
        request(b"POST " + ENVELOPE, body=b'{"protocol":"https","target_url":"' + target + b'"}')
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    await gateway.turn()
    _leave(client, how)
    await upstream.expect_gone(LEFT_S)
    assert (await gateway.receipt()).outcome == "client_gone"


async def test_with_calls_still_queued_only_the_started_one_is_billed(gateway: Gateway) -> None:
    client = await gateway.ask(b"".join(request(b"GET " + RAW + b"/x", id=b"t%d" % n) for n in range(5)))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    client.close()
    await upstream.expect_gone(LEFT_S)
    receipt = await gateway.receipt()
    assert (receipt.request_id, receipt.outcome) == ("t0", "client_gone")


@pytest.mark.parametrize("count", [65, 200])
async def test_with_a_full_queue_it_is_noticed_too(gateway: Gateway, count: int) -> None:
    client = await gateway.ask(b"".join(request(b"GET " + RAW + b"/x") for _ in range(count)))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    client.close()
    await upstream.expect_gone(2 * LEFT_S)
    assert (await gateway.receipt()).outcome == "client_gone"


async def test_after_the_whole_answer_the_call_is_ok(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    client.reset()
    assert (await gateway.receipt()).outcome == "ok"


async def _fill(wire: Wire, gateway: Gateway) -> int:
    """Send until nothing moves any more; return the bytes sent."""
    data = b"a" * 1_048_576
    total, idle_count = 0, 0
    while idle_count < 20:
        sent = wire.send_what_fits(data)
        total += sent
        idle_count = 0 if sent else idle_count + 1
        await gateway.turn()
    return total


async def test_a_slow_reader_stops_the_upstream_and_gets_everything(gateway: Gateway) -> None:
    size = 64 * 1_048_576
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    sent = await _fill(upstream, gateway)
    held = sum(downstream.transport.get_write_buffer_size() for downstream in gateway.plane.downstreams)
    assert held < HELD_BYTES_MAX, "the gateway holds what the client does not take"
    assert sent < size
    async with asyncio.TaskGroup() as group:
        group.create_task(_send_all(upstream, size - sent))
        await client.read_head()
        received = 0
        while received < size:
            received += len(await client.read(min(1_048_576, size - received)))
            held = sum(downstream.transport.get_write_buffer_size() for downstream in gateway.plane.downstreams)
            assert held < HELD_BYTES_MAX
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.response_bytes) == ("ok", size)


async def test_a_slow_upstream_stops_the_upload_and_gets_everything(gateway: Gateway) -> None:
    size = 64 * 1_048_576
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: %d" % size))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    sent = await _fill(client, gateway)
    assert sent < size
    assert gateway.unsent_upstream_bytes() < HELD_BYTES_MAX
    async with asyncio.TaskGroup() as group:
        group.create_task(_send_all(client, size - sent))
        received = 0
        while received < size:
            received += len(await upstream.read(min(1_048_576, size - received)))
            assert gateway.unsent_upstream_bytes() < HELD_BYTES_MAX
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    assert (await gateway.receipt()).request_bytes == size


async def _send_all(wire: Wire, size: int) -> None:
    data = b"a" * 1_048_576
    while size > 0:
        part = data[:size]
        await wire.send(part)
        size -= len(part)


async def test_a_body_over_the_envelopes_limit_asks_for_a_stream(serve: Serve) -> None:
    gateway = await serve(limits={"envelope_answer_bytes_max": 1_000})
    target = b"http://127.0.0.1:%d/x" % gateway.raw.port
    client = await gateway.ask(
        request(b"POST " + ENVELOPE, body=b'{"protocol":"https","target_url":"' + target + b'"}')
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"a" * 1_001)
    answer = await client.answer()
    assert answer.status == 502
    assert '"stream": true' in answer.json()["error"]
    await upstream.expect_gone(LEFT_S)
