"""Several requests at once on one connection: D27, R27."""

import pytest

from gpuproxy.proxy.exchange_state import READ_ANSWERS

from .harness import CHAT, KEY, OK, RAW, Gateway, request, until
from .wire import Wire


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def test_answers_keep_the_order_of_the_requests(gateway: Gateway) -> None:
    client = await gateway.ask(
        b"".join(
            request(b"%b /x" % method if not body else b"%b " % method + RAW + b"/x", body=body, id=b"t%d" % number)
            if body
            else request(method + b" " + RAW + b"/%d" % number, id=b"t%d" % number)
            for number, (method, body) in enumerate([(b"GET", None), (b"POST", b"abc"), (b"GET", None), (b"PUT", b"d")])
        )
    )
    upstream = await gateway.raw.accept()
    for number in range(4):
        head = await upstream.read_head()
        assert b"X-Request-Id: t%d\r\n" % number in head
        if number % 2:
            await upstream.expect(b"abc" if number == 1 else b"d")
        await upstream.send(_answer(b"%d" % number))
        answer = await client.answer()
        assert (answer.body, answer.field(b"x-request-id")) == (b"%d" % number, b"t%d" % number)
    assert [receipt.request_id for receipt in gateway.receipts()] == ["t0", "t1", "t2", "t3"]


async def test_a_slow_first_call_holds_the_others_back(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/slow", id=b"t1") + request(b"POST " + CHAT, body=b'{"model":"m"}', id=b"t2")
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await gateway.turn()
    assert gateway.llm.is_untouched()
    assert client.is_silent()
    await upstream.send(_answer(b"slow"))
    assert (await client.answer()).body == b"slow"
    fast = await gateway.llm.accept()
    await fast.read_head()
    await fast.send(_answer(b"fast"))
    assert (await client.answer()).body == b"fast"


async def test_refusals_in_between_keep_their_place(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/0", id=b"t0")
        + request(b"GET " + RAW + b"/1", id=b"t1", key=b"")
        + request(b"GET /api/v1/gpu/proxy/upstreams/none/", id=b"t2")
        + request(b"POST " + CHAT, body=b"{", id=b"t3")
        + request(b"GET " + RAW + b"/4", id=b"t4")
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(_answer(b"0"))
    assert [(await client.answer()).status for _ in range(4)] == [200, 401, 404, 400]
    await upstream.read_head()
    await upstream.send(_answer(b"4"))
    answer = await client.answer()
    assert (answer.body, answer.field(b"x-request-id")) == (b"4", b"t4")
    await gateway.receipt(5)


@pytest.mark.parametrize("count", [64, 65, 66, 200, 1_000])
async def test_a_long_row_of_requests_is_answered_whole(gateway: Gateway, count: int) -> None:
    client = await gateway.ask(b"".join(request(b"GET " + RAW + b"/%d" % n, id=b"t%d" % n) for n in range(count)))
    upstream = await gateway.raw.accept()
    for number in range(count):
        assert (await upstream.read_head()).startswith(b"GET /%d HTTP" % number)
        await upstream.send(OK)
        assert (await client.answer()).field(b"x-request-id") == b"t%d" % number
    await gateway.receipt(count)


@pytest.mark.parametrize("count", [100, 1_000])
async def test_a_long_row_of_refusals_is_answered_whole(gateway: Gateway, count: int) -> None:
    client = await gateway.ask(b"".join(request(b"GET " + RAW + b"/x", id=b"t%d" % n, key=b"") for n in range(count)))
    for number in range(count):
        answer = await client.answer()
        assert (answer.status, answer.field(b"x-request-id")) == (401, b"t%d" % number)
    await gateway.receipt(count)


async def test_a_row_of_refusals_behind_a_slow_call_is_answered_whole(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/x") + b"".join(request(b"GET " + RAW + b"/x", key=b"") for _ in range(300))
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).status == 200
    for _ in range(300):
        assert (await client.answer()).status == 401


async def test_requests_behind_connection_close_are_not_executed(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/x", b"Connection: close") + request(b"GET " + RAW + b"/never", id=b"t2")
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    await client.expect_end()
    assert upstream.is_silent()
    assert gateway.raw.is_untouched()
    await gateway.receipt()


async def test_a_cut_answer_ends_what_was_queued_behind_it(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") + request(b"GET " + RAW + b"/never", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    upstream.close()
    answer = await client.answer()
    assert not answer.is_whole
    assert gateway.raw.is_untouched()
    await gateway.receipt()


async def test_an_upload_queued_behind_a_slow_call_waits_and_is_sent_whole(gateway: Gateway) -> None:
    body = bytes(range(256)) * 4_000
    client = await gateway.ask(request(b"GET " + RAW + b"/slow"))
    await client.send(request(b"POST " + RAW + b"/x", b"Content-Length: %d" % len(body), id=b"t2"))
    slow = await gateway.raw.accept()
    await slow.read_head()
    sent = client.send_what_fits(body)
    await gateway.turn()
    await slow.send(OK)
    assert (await client.answer()).body == b"ok"
    await slow.read_head()
    if sent < len(body):
        await client.send(body[sent:])
    assert await slow.read(len(body)) == body
    await slow.send(OK)
    assert (await client.answer()).body == b"ok"
    assert (await gateway.receipt(2)).request_bytes == len(body)


async def test_who_does_not_read_refusals_is_read_no_more(gateway: Gateway) -> None:
    client = await gateway.client()
    one = request(b"GET " + RAW + b"/x", key=b"", id=b"")
    await until(lambda: bool(gateway.plane.downstreams), "the connection")
    (downstream,) = gateway.plane.downstreams
    row, sent = one * 500, 0
    while not downstream.is_reading_blocked(READ_ANSWERS):
        sent += client.send_what_fits(row[sent % len(one) :])
        await gateway.turn()
        assert sent < 64 << 20, "the client is read on and on"
    assert downstream.transport.get_write_buffer_size() < 2 << 20
    left = sent // len(one)
    while left:
        assert await client.receive(), "all are answered once they are read"
        left -= client.take(max(client.held.rfind(b"HTTP/1.1 "), len(client.held) * client.held.endswith(b"}"))).count(
            b"HTTP/1.1 401 "
        )


async def _served_unread(gateway: Gateway, upstream: Wire, body: bytes) -> int:
    """Answer calls until the client, which does not read, gets no more; return how many."""
    (downstream,) = gateway.plane.downstreams
    count = 0
    while not downstream.is_write_blocked:
        await until(lambda: downstream.is_write_blocked or not upstream.is_silent(), "the next call")
        if not upstream.is_silent():
            await upstream.read_head()
            await upstream.send(_answer(body))
            count += 1
    await gateway.turn()
    assert downstream.transport.get_write_buffer_size() < 1 << 20
    assert upstream.is_silent()
    return count


async def test_who_does_not_read_answers_gets_no_more_of_them(gateway: Gateway) -> None:
    count, body = 300, b"a" * 50_000
    client = await gateway.ask(b"".join(request(b"GET " + RAW + b"/x", id=b"t%d" % n) for n in range(count)))
    upstream = await gateway.raw.accept()
    served = await _served_unread(gateway, upstream, body)
    assert served < count
    for number in range(count):
        if number >= served:
            await upstream.read_head()
            await upstream.send(_answer(body))
        answer = await client.answer()
        assert (answer.field(b"x-request-id"), len(answer.body)) == (b"t%d" % number, len(body))


async def test_who_never_reads_is_cut(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") * 300)
    await _served_unread(gateway, await gateway.raw.accept(), b"a" * 50_000)
    gateway.passes(gateway.config.timeouts.idle_s)
    await client.expect_reset()
    await until(lambda: not gateway.plane.downstreams, "the connection's end")
    assert {receipt.outcome for receipt in gateway.receipts()} <= {"ok", "client_gone"}, "no fault of the upstream's"


async def test_each_of_many_callers_on_one_connection_is_billed_to_its_own_key(gateway: Gateway) -> None:
    other = gateway.keys.add()
    await gateway.warm(other)
    client = await gateway.ask(
        b"".join(request(b"GET " + RAW + b"/x", key=key, id=b"") for key in (KEY, other, KEY, other))
    )
    upstream = await gateway.raw.accept()
    for _ in range(4):
        await upstream.read_head()
        await upstream.send(OK)
        await client.answer()
    assert [receipt.key_id for receipt in gateway.receipts()] == ["key0", "key1", "key0", "key1"]
