"""Connections that are used again: D19, D20, D21, and heads that are remembered from call to call."""

import threading

import pytest

from gpuproxy import resolver

from .conftest import Serve
from .harness import CHAT, KEY, OK, OK_SENT, OK_SENT_AGAIN, RAW, Gateway, answered, forwarded, request, until
from .wire import Listener, Wire

LEAK = b"HTTP/1.1 200 OK\r\nX-Leak: 1\r\nContent-Length: 4\r\n\r\nleak"


async def _idle_connection(gateway: Gateway, client: Wire) -> Wire:
    """Let one call pass, so that its upstream connection is idle."""
    await client.send(request(b"GET " + RAW + b"/first", id=b"t0"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    return upstream


async def test_a_connection_is_used_again(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    for number in range(3):
        await client.send(request(b"GET " + RAW + b"/%d" % number))
        await upstream.expect_request(forwarded(b"GET /%d" % number, port=gateway.raw.port))
        await upstream.send(OK)
        await client.expect(OK_SENT)
    assert gateway.raw.is_untouched()


async def test_an_idle_connection_is_closed_after_its_time(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    gateway.passes(gateway.config.timeouts.upstream_keepalive_s)
    await upstream.expect_gone()
    await client.send(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nConnection: close\r\n", b"HTTP/1.0 200 OK\r\n"])
async def test_an_upstream_that_will_close_is_not_used_again(gateway: Gateway, said: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(said + b"Content-Length: 2\r\n\r\nok")
    assert (await client.answer()).body == b"ok"
    await client.send(request(b"GET " + RAW + b"/y"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize("is_reset", [False, True])
async def test_an_idle_connection_the_upstream_closed_is_passed_over(gateway: Gateway, is_reset: bool) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    if is_reset:
        upstream.reset()
    else:
        upstream.close()
    await client.send(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(OK_SENT)
    assert (await gateway.receipt(2)).outcome == "ok"


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("method", [b"GET", b"POST", b"PUT", b"DELETE"])
async def test_a_connection_that_closes_under_a_request_is_replaced_once(
    gateway: Gateway, method: bytes, is_reset: bool
) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    body = b"abc" if method in (b"POST", b"PUT") else None
    await client.send(request(method + b" " + RAW + b"/x", body=body))
    expected = forwarded(
        method + b" /x", port=gateway.raw.port, framing=b"Content-Length: 3" if body else b"", body=body or b""
    )
    await upstream.expect_request(expected)
    if is_reset:
        upstream.reset()
    else:
        upstream.close()
    upstream = await gateway.raw.accept()
    await upstream.expect_request(expected)
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    receipt = await gateway.receipt(2)
    assert (receipt.outcome, receipt.attempts) == ("ok", 2)


async def test_a_model_call_on_a_stale_connection_is_sent_again_whole(gateway: Gateway) -> None:
    body = b'{"model":"m","stream":false,"pad":"' + b"a" * 40_000 + b'"}'
    client = await gateway.ask(request(b"POST " + CHAT, body=body))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    await client.send(request(b"POST " + CHAT, body=body, id=b"t2"))
    await upstream.read_head()
    await upstream.expect(body)
    upstream.close()
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    assert (await gateway.receipt(2)).attempts == 2


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"POST", b"PATCH"])
async def test_control_that_dies_is_asked_again_only_for_what_it_has_not_read_or_may_do_twice(
    gateway: Gateway, method: bytes, is_read: bool
) -> None:
    client = await gateway.ask(request(b"GET /api/v1/user/credits"))
    control = await gateway.control.accept()
    await control.read_head()
    await control.send(OK)
    assert (await client.answer()).body == b"ok"
    is_change = method in (b"POST", b"PATCH")
    if not is_read:
        control.close()
    await client.send(request(method + b" /api/v1/gpu/instances/vast.ai/1"))
    if is_read:
        control = await gateway.control.accept() if is_change else control
        await control.read_head()
        control.close()
    if not is_change or not is_read:
        control = await gateway.control.accept()
        await control.read_head()
        await control.send(OK)
        assert (await client.answer()).body == b"ok"
    else:
        assert (await client.answer()).status == 502
        assert gateway.control.is_untouched()


async def test_a_fresh_connection_that_closes_is_not_tried_again(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    await client.send(request(b"GET " + RAW + b"/x"))
    await upstream.read_head()
    upstream.close()
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    upstream.close()
    assert (await client.answer()).status == 502
    assert gateway.raw.is_untouched()
    assert (await gateway.receipt(2)).attempts == 2


async def test_a_stale_connection_that_sent_part_of_a_head_is_a_502(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    await client.send(request(b"GET " + RAW + b"/x"))
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 2")
    upstream.close()
    assert (await client.answer()).status == 502
    assert gateway.raw.is_untouched()
    await gateway.receipt(2)


async def test_a_stale_connection_under_a_streamed_upload_is_a_502(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    await client.send(request(b"POST " + RAW + b"/x", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
    await upstream.read_head()
    await upstream.expect(b"3\r\nabc\r\n")
    upstream.reset()
    assert (await client.answer()).status == 502
    assert gateway.raw.is_untouched()
    await gateway.receipt(2)


async def test_a_connection_its_caller_did_not_wait_for_may_be_stale_too(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, may_go = resolver.look_up, threading.Event()

    def look_up(host: str) -> list[str]:
        may_go.wait()
        return ask(host)

    monkeypatch.setattr(resolver, "look_up", look_up)
    listener = Listener()
    url = f"http://localhost:{listener.port}"
    gateway = await serve(upstreams=[{"name": "named", "protocol": "https", "urls": [url]}])
    call = request(b"POST " + RAW.replace(b"raw", b"named") + b"/x", body=b"abc")
    leaving = await gateway.ask(call)
    await until(lambda: bool(gateway.plane._tasks), "the look-up")
    leaving.close()
    await gateway.receipt()
    may_go.set()
    unused = await listener.accept()
    await until(lambda: not gateway.plane._tasks, "the connection")
    client = await gateway.ask(call)
    await unused.read_head()
    unused.close()
    assert (await gateway.answer_one(listener)).startswith(b"POST /x ")
    assert (await client.answer()).body == b"ok"
    listener.close()


@pytest.mark.parametrize("unasked", [LEAK, b"HTTP/1.1 408 Timeout\r\nContent-Length: 0\r\n\r\n", b"x", LEAK[:20]])
async def test_an_answer_nobody_asked_for_never_reaches_the_next_caller(gateway: Gateway, unasked: bytes) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    await upstream.send(unasked)
    await gateway.turn()
    await client.send(request(b"GET " + RAW + b"/x"))
    fresh = await gateway.raw.accept()
    await fresh.read_head()
    await fresh.send(OK)
    await client.expect(OK_SENT)
    await upstream.expect_gone()
    await gateway.receipt(2)


@pytest.mark.parametrize("part", [len(LEAK), 1, 30])
async def test_an_unasked_answer_in_the_turn_of_the_next_request_reaches_nobody(gateway: Gateway, part: int) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    wanted = request(b"GET " + RAW + b"/x")
    assert upstream.send_what_fits(LEAK[:part]) == part  # both before the loop runs again
    assert client.send_what_fits(wanted) == len(wanted)
    fresh = await gateway.raw.accept()
    upstream.send_what_fits(LEAK[part:])
    await fresh.read_head()
    await fresh.send(OK)
    await client.expect(OK_SENT)
    await gateway.receipt(2)


@pytest.mark.parametrize("part", [len(LEAK), 1, 30])
async def test_an_unasked_answer_just_after_the_next_request_reaches_nobody(gateway: Gateway, part: int) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    wanted = request(b"GET " + RAW + b"/x")
    assert client.send_what_fits(wanted) == len(wanted)  # both before the loop runs again
    assert upstream.send_what_fits(LEAK[:part]) == part
    fresh = await gateway.raw.accept()
    upstream.send_what_fits(LEAK[part:])
    await fresh.read_head()
    await fresh.send(OK)
    await client.expect(OK_SENT_AGAIN)
    await gateway.receipt(2)


async def test_an_unasked_answer_in_the_answers_own_segment_reaches_nobody(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") + request(b"GET " + RAW + b"/y", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK + LEAK)
    await client.expect(OK_SENT)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).field(b"x-leak") is None
    await gateway.receipt(2)


async def test_an_unasked_answer_split_over_the_first_ones_end_reaches_nobody(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x") + request(b"GET " + RAW + b"/y", id=b"t2"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK + LEAK[:10])
    upstream.send_what_fits(LEAK[10:])
    await client.expect(OK_SENT)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).field(b"x-leak") is None
    await gateway.receipt(2)


async def test_callers_share_connections_but_nothing_else(serve: Serve) -> None:
    gateway = await serve()
    other_key = gateway.keys.add()
    first, second = await gateway.client(), await gateway.client()
    upstream = await _idle_connection(gateway, first)
    await gateway.warm(other_key)
    await second.send(request(b"GET " + RAW + b"/x", b"X-Mine: 2", key=other_key))
    await upstream.expect_request(forwarded(b"GET /x", b"X-Mine: 2", port=gateway.raw.port))
    await upstream.send(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nContent-Length: 0\r\n\r\n")
    assert (await second.answer()).field(b"set-cookie") == b"a=1"
    await first.send(request(b"GET " + RAW + b"/x"))
    head = await upstream.read_head()
    assert b"X-Mine" not in head
    assert b"ookie" not in head
    await upstream.send(OK)
    await first.expect(OK_SENT)
    assert [receipt.key_id for receipt in gateway.receipts()] == ["key0", "key1", "key0"]


# -- heads remembered ------------------------------------------------------------------------------------


def _post(body: bytes, *fields: bytes, path: bytes = b"/x", length: bytes | None = None) -> bytes:
    head = b"POST " + RAW + path + b" HTTP/1.1\r\nHost: gw\r\nX-API-Key: " + KEY + b"\r\n"
    framing = b"Content-Length: %b\r\n" % (b"%d" % len(body) if length is None else length)
    return head + framing + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


async def _exchange(gateway: Gateway, client: Wire, upstream: Wire | None, sent: bytes) -> tuple[Wire, bytes]:
    await client.send(sent)
    upstream = upstream or await gateway.raw.accept()
    head = await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    return upstream, head


async def test_repeated_heads_are_forwarded_the_same_each_time(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream, ids = None, set()
    for size in (1, 3, 3, 10, 0, 3):
        body = b"a" * size
        upstream, head = await _exchange(gateway, client, upstream, _post(body, b"X-A: 1"))
        assert b"\r\nX-A: 1\r\n" in head
        assert b"\r\nContent-Length: %d\r\n" % size in head
        await upstream.expect(body)
        ids.add(head[head.index(b"X-Request-Id: ") :].split(b"\r\n")[0])
    assert len(ids) == 6, "each call has an id of its own"
    assert [receipt.request_bytes for receipt in gateway.receipts()] == [1, 3, 3, 10, 0, 3]


@pytest.mark.parametrize(
    "changed",
    [
        _post(b"abc", b"X-A: 2"),
        _post(b"abc"),
        _post(b"abc", b"X-A: 1", b"X-B: 1"),
        _post(b"abc", b"X-A: 1", path=b"/y"),
        _post(b"abcd", b"X-A: 1"),
        _post(b"abc", b"X-A: 1").replace(b"POST", b"PATCH"),
        _post(b"abc", b"X-A: 1").replace(b"Host: gw", b"Host: gx"),
    ],
)
async def test_a_changed_head_is_not_taken_for_the_remembered_one(gateway: Gateway, changed: bytes) -> None:
    client = await gateway.client()
    upstream = None
    for sent in (_post(b"abc", b"X-A: 1"), _post(b"abc", b"X-A: 1"), changed, _post(b"abc", b"X-A: 1"), changed):
        upstream, head = await _exchange(gateway, client, upstream, sent)
        given = sent.split(b"\r\n")
        assert head.split(b" ")[0] == given[0].split(b" ")[0]
        assert head.split(b" ")[1] == given[0].split(b" ")[1].removeprefix(RAW)
        assert (b"X-A: 1\r\n" in head) == (b"X-A: 1\r\n" in sent)
        assert (b"X-A: 2\r\n" in head) == (b"X-A: 2\r\n" in sent)
        assert (b"X-B: 1\r\n" in head) == (b"X-B: 1\r\n" in sent)
        assert b"X-Forwarded-Host: " + given[1][6:] + b"\r\n" in head
        await upstream.expect(sent.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "bad",
    [
        _post(b"abc", b"X-A: 1", length=b"+3"),
        _post(b"abc", b"X-A: 1", length=b"3,3"),
        _post(b"abc", b"X-A: 1", length=b"0x3"),
        _post(b"abc", b"X-A: 1", length=b""),
        _post(b"abc", b"X-A: 1", length="٣".encode()),
        _post(b"abc", b"X-A: 1", length="³".encode("latin-1")),
        _post(b"abc", b"X-A: 1", length=b"9" * 30),
        _post(b"abc", b"X-A: 1", b"Transfer-Encoding: chunked"),
        _post(b"abc", b"X-A: 1", b"Content-Length: 3"),
        _post(b"abc", b"X-A: 1", b"Host: b"),
        _post(b"abc", b"X-A: 1\0"),
    ],
)
async def test_a_bad_head_behind_a_remembered_one_is_refused(gateway: Gateway, bad: bytes) -> None:
    client = await gateway.client()
    upstream = None
    for _ in range(3):
        upstream, _head = await _exchange(gateway, client, upstream, _post(b"abc", b"X-A: 1"))
        await upstream.expect(b"abc")
    await client.send(bad)
    assert (await client.answer()).status == 400
    await client.expect_end()
    assert upstream is not None
    assert upstream.is_silent()


async def test_a_remembered_head_cut_anywhere_is_read_as_usual(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream: Wire | None = None
    sent = _post(b"abcdef")
    for at in [len(sent), *range(1, len(sent), 7)]:
        await client.send(sent[:at])
        await gateway.turn()
        await client.send(sent[at:])
        upstream = upstream or await gateway.raw.accept()
        assert b"Content-Length: 6\r\n" in await upstream.read_head()
        await upstream.expect(b"abcdef")
        await upstream.send(OK)
        assert (await client.answer()).body == b"ok"


async def test_a_remembered_head_followed_by_another_request_serves_both(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = None
    for _ in range(2):
        upstream, _head = await _exchange(gateway, client, upstream, _post(b"abc"))
        await upstream.expect(b"abc")
    assert upstream is not None
    await client.send(_post(b"def") + _post(b"ghi"))
    for body in (b"def", b"ghi"):
        await upstream.read_head()
        await upstream.expect(body)
        await upstream.send(OK)
        assert (await client.answer()).body == b"ok"


async def test_a_remembered_head_inside_another_head_is_no_request(gateway: Gateway) -> None:
    remembered = request(b"GET " + RAW + b"/a", id=b"")
    begun = b"GET " + RAW + b"/b HTTP/1.1\r\nX-Value: "
    client = await gateway.ask(remembered + begun)
    upstream = await gateway.raw.accept()
    assert (await upstream.read_head()).startswith(b"GET /a ")
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    await client.send(remembered)
    head = await upstream.read_head()
    assert head.startswith(b"GET /b ")
    assert b"\r\nX-Value: GET " + RAW + b"/a HTTP/1.1\r\n" in head
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_empty_lines_are_not_taken_for_a_remembered_head(gateway: Gateway) -> None:
    client = await gateway.ask(b"\r\n\r\n" + request(b"GET " + RAW + b"/a", id=b""))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"
    await client.send(b"\r\n\r\n")
    await gateway.turn()
    await client.send(request(b"GET " + RAW + b"/b"))
    assert (await upstream.read_head()).startswith(b"GET /b ")
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_a_remembered_head_is_authorized_anew_each_time(gateway: Gateway) -> None:
    key = gateway.keys.add(key_id="short")
    sent = _post(b"abc").replace(KEY, key)
    client = await gateway.client()
    upstream = None
    for _ in range(3):
        upstream, _head = await _exchange(gateway, client, upstream, sent)
        await upstream.expect(b"abc")
    gateway.keys.grants.clear()
    gateway.link_server.revoke(["short"])
    await gateway.turn()
    await client.send(sent)
    assert (await client.answer()).status == 401


@pytest.mark.parametrize(
    "last",
    [
        b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX-A: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 201 Created\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 2\r\nX-B: 1\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_remembered_answer_head_is_no_other(gateway: Gateway, last: bytes) -> None:
    client, upstream = await gateway.client(), None
    repeated = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok"
    for sent in (repeated, repeated, repeated, last, repeated):
        await client.send(request(b"GET " + RAW + b"/x"))
        upstream = upstream or await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(sent)
        head, _, body = sent.partition(b"\r\n\r\n")
        fields = head.split(b"\r\n")[1:]
        ends = [field for field in fields if not field.startswith(b"Content-Length")]
        await client.expect(
            answered(head[9:].split(b"\r\n")[0], *ends, framing=b"Content-Length: %d" % len(body), body=body)
        )


@pytest.mark.parametrize("extra", [b"x", LEAK, b"\r\n"])
async def test_bytes_behind_a_remembered_answer_end_the_connection(gateway: Gateway, extra: bytes) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    for sent in (OK, OK, OK + extra):
        await client.send(request(b"GET " + RAW + b"/x"))
        await upstream.read_head()
        await upstream.send(sent)
        await client.expect(OK_SENT)
    if extra != b"\r\n":
        await upstream.expect_gone()
        upstream = await gateway.raw.accept() if not gateway.raw.is_untouched() else upstream


async def test_a_remembered_answer_to_head_has_no_body(gateway: Gateway) -> None:
    client = await gateway.client()
    upstream = await _idle_connection(gateway, client)
    for _ in range(3):
        await client.send(request(b"GET " + RAW + b"/x"))
        await upstream.read_head()
        await upstream.send(OK)
        await client.expect(OK_SENT)
    await client.send(request(b"HEAD " + RAW + b"/x"))
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(answered(b"200 OK", framing=b"Content-Length: 2"))
    await client.send(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)
