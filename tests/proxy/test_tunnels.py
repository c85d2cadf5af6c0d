"""WebSocket and what else switches protocols: D25."""

import hashlib
import time

import pytest

from gpuproxy.proxy import tunnel

from .conftest import Serve
from .harness import KEY, OK, OK_SENT, RAW, Gateway, request, until
from .wire import Wire

UPGRADE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Protocol: chat, superchat",
    b"Sec-WebSocket-Extensions: permessage-deflate",
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
)


async def _switched(gateway: Gateway, client: Wire) -> Wire:
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    for field in UPGRADE:
        assert head.count(field + b"\r\n") == 1, field
    assert head.startswith(b"GET /ws?x=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % gateway.raw.port)
    assert KEY not in head
    await upstream.send(SWITCH)
    answer = await client.answer()
    assert answer.status == 101
    assert answer.field(b"upgrade") == b"websocket"
    assert answer.field(b"connection") == b"Upgrade"
    assert answer.field(b"sec-websocket-accept") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert answer.field(b"sec-websocket-protocol") == b"chat"
    return upstream


async def test_after_a_101_bytes_pass_both_ways(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await _switched(gateway, client)
    for data in (b"\x81\x85abcd", b"\0" * 70_000, b"GET / HTTP/1.1\r\n\r\n"):
        await client.send(data)
        await upstream.expect(data)
        await upstream.send(data[::-1])
        await client.expect(data[::-1])
    client.close()
    await upstream.expect_end()
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.upstream) == (101, "ok", "raw")
    assert receipt.request_bytes == receipt.response_bytes == 6 + 70_000 + 18


@pytest.mark.parametrize("side", ["client", "upstream"])
@pytest.mark.parametrize("how", ["closes", "resets", "ends"])
async def test_when_either_side_goes_the_other_does_too(gateway: Gateway, side: str, how: str) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await _switched(gateway, client)
    leaving, staying = (client, upstream) if side == "client" else (upstream, client)
    await leaving.send(b"last words")
    if how == "resets":
        await staying.expect(b"last words")
        leaving.reset()
    elif how == "closes":
        leaving.close()
        await staying.expect(b"last words")
    else:
        leaving.end()
        await staying.expect(b"last words")
    await staying.expect_gone()
    assert (await gateway.receipt()).status == 101


async def test_bytes_sent_right_behind_the_upgrade_wait_for_the_101(gateway: Gateway) -> None:
    early = b"\x81\x80early" * 100
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE) + early)
    await client.send(b"more")
    upstream = await _switched(gateway, client)
    await upstream.expect(early + b"more")
    await upstream.send(b"hi")
    await client.expect(b"hi")


async def test_bytes_right_behind_the_101_reach_the_client(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(SWITCH + b"first frame")
    assert (await client.answer()).status == 101
    await client.expect(b"first frame")


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"403 Forbidden", b"426 Upgrade Required", b"200 OK"])
async def test_a_refused_upgrade_is_an_ordinary_answer(gateway: Gateway, status: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 " + status + b"\r\nSec-WebSocket-Version: 13\r\nContent-Length: 2\r\n\r\nno")
    answer = await client.answer()
    assert (answer.status, answer.body) == (int(status[:3]), b"no")
    assert answer.field(b"sec-websocket-version") == b"13"
    await client.expect_gone()
    assert (await gateway.receipt()).outcome == "ok"


async def test_early_bytes_behind_a_refused_upgrade_are_no_request(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/ws?x=1", *UPGRADE) + request(b"GET " + RAW + b"/smuggled", id=b"t2")
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
    assert (await client.answer()).status == 403
    await client.expect_gone()
    assert gateway.raw.is_untouched()
    assert upstream.is_silent() or b"smuggled" not in await upstream.read_to_end()
    await gateway.receipt()


async def test_an_upgrade_without_credential_is_a_401(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws", *UPGRADE, key=b"") + b"early")
    assert (await client.answer()).status == 401
    await client.expect_gone()
    assert gateway.raw.is_untouched()
    await gateway.receipt()


@pytest.mark.parametrize(
    "fields",
    [
        (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        (b"Connection: Upgrade", b"Upgrade: TLS/1.0"),
        (b"Upgrade: websocket",),
    ],
)
async def test_another_upgrade_is_ignored(gateway: Gateway, fields: tuple[bytes, ...]) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *fields))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert b"pgrade" not in head
    assert b"HTTP2-Settings" not in head
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("token", [b"websocket", b"h2c"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_upgrade_with_a_body_is_an_ordinary_call(gateway: Gateway, token: bytes, framing: str) -> None:
    fields = [b"Connection: Upgrade", b"Upgrade: " + token]
    if framing == "length":
        sent, expected = request(b"POST " + RAW + b"/x", *fields, body=b"abc"), b"abc"
    else:
        expected = b"3\r\nabc\r\n0\r\n\r\n"
        sent = request(b"POST " + RAW + b"/x", *fields, b"Transfer-Encoding: chunked") + expected
    client = await gateway.ask(sent)
    upstream = await gateway.raw.accept()
    assert b"pgrade" not in await upstream.read_head()
    await upstream.expect(expected)
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_an_upgrade_whose_key_must_be_asked_switches(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE, key=gateway.keys.add()) + b"early")
    upstream = await _switched(gateway, client)
    await upstream.expect(b"early")


async def test_a_slow_side_of_a_tunnel_stops_the_other(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await _switched(gateway, client)
    data, total, idle_count = b"a" * 1_048_576, 0, 0
    while idle_count < 20:
        sent = upstream.send_what_fits(data)
        total += sent
        idle_count = 0 if sent else idle_count + 1
        await gateway.turn()
    assert total < 64 * 1_048_576
    ends = next(iter(gateway.plane.tunnels.values()))
    assert ends[0].transport.get_write_buffer_size() < 1_048_576
    received = 0
    while received < total:
        received += len(await client.read(min(1_048_576, total - received)))
    assert received == total


async def test_a_side_that_does_not_read_holds_no_closed_tunnel(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "FLUSH_S", 0.05)
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await _switched(gateway, client)
    transport = next(iter(gateway.plane.tunnels.values()))[0].transport
    while not transport.get_write_buffer_size():
        upstream.send_what_fits(b"a" * 1_048_576)
        await gateway.turn()
    gateway.passes(gateway.config.timeouts.idle_s)
    await upstream.expect_gone()
    await gateway.receipt()
    await until(lambda: not transport.get_write_buffer_size(), "the end of the connection")


async def test_a_client_that_took_no_more_before_it_was_a_tunnel_gets_nothing_yet(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    await until(lambda: bool(gateway.plane.downstreams), "the connection")
    (downstream,) = gateway.plane.downstreams
    downstream.is_write_blocked = True  # so its transport has said, of an answer before; it says so once
    upstream = await _switched(gateway, client)
    await upstream.send(b"a frame")
    await gateway.turn()
    assert client.is_silent()
    next(iter(gateway.plane.tunnels.values()))[0].resume_writing()
    await client.expect(b"a frame")


async def test_a_silent_tunnel_ends_after_the_idle_time(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await _switched(gateway, client)
    gateway.passes(gateway.config.timeouts.idle_s)
    await client.expect_gone()
    await upstream.expect_gone()
    assert (await gateway.receipt()).status == 101


async def test_tunnels_are_client_connections_too(serve: Serve) -> None:
    gateway = await serve(limits={"connections_max": 2})
    for number in range(2):
        client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE, id=b"t%d" % number))
        await _switched(gateway, client)
    await (await gateway.client()).expect_gone()
    client.close()
    await gateway.receipt()
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    assert (await gateway.answer_one(gateway.raw)).startswith(b"GET /x ")
    assert (await client.answer()).body == b"ok"


async def test_a_tunnel_to_control_writes_no_receipt(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET /ws", *UPGRADE))
    control = await gateway.control.accept()
    await control.read_head()
    await control.send(SWITCH)
    assert (await client.answer()).status == 101
    await client.send(b"ping")
    await control.expect(b"ping")
    client.close()
    await control.expect_gone()
    await until(lambda: not gateway.plane.tunnels, "the tunnel's end")
    assert gateway.receipts() == []


async def test_a_call_before_an_upgrade_is_answered_first(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"GET " + RAW + b"/x") + request(b"GET " + RAW + b"/ws?x=1", *UPGRADE, id=b"t2") + b"early"
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)
    assert b"Upgrade: websocket\r\n" in await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    await upstream.expect(b"early")


@pytest.mark.parametrize("how", ["revoked", "expired", "gone when control is back"])
async def test_a_tunnel_ends_with_its_key(gateway: Gateway, how: str) -> None:
    key = gateway.keys.add(expires_ns=time.time_ns() + 10**12)
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE, key=key))
    await _switched(gateway, client)
    other = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE, id=b"t2"))
    await _switched(gateway, other)
    gateway.plane.sweep()
    assert len(gateway.plane.tunnels) == 2
    if how == "revoked":
        gateway.plane.admission.renew(("key1",))  # the grant it was opened with is not the one that is held
        await gateway.turn()
        gateway.plane.admission.revoke(("key1",))
    elif how == "expired":
        next(iter(gateway.plane.tunnels))._grant.expires_ns = 1  # type: ignore[union-attr]
    else:
        del gateway.keys.grants[hashlib.sha256(key).digest()]
        gateway.plane.admission.refresh_all()
        await until(lambda: "key1" in gateway.plane.admission._revoked, "control's word")
    gateway.plane.sweep()
    await client.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.request_id, receipt.outcome, receipt.error) == ("t1", "cut", "UNAUTHORIZED")
    assert len(gateway.plane.tunnels) == 1


async def test_a_tunnel_that_tries_an_endpoint_closes_its_breaker_at_once(gateway: Gateway) -> None:
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "raw"]
    for _ in range(gateway.config.routing.failures_max):
        replica.failed(replica.generation)
    gateway.passes(gateway.config.routing.open_s)
    assert (replica.state, replica.admits) == (2, True)
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    await _switched(gateway, client)
    assert (replica.state, replica.open_count) == (0, 1)
    client.close()
    await gateway.receipt()
    assert replica.open_count == 0
