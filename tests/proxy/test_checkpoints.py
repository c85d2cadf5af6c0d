"""A call that lasts notes in the journal what it has used, under the id its receipt will have."""

import json
import time

import pytest

from gpuproxy.proxy import exchange_state, settled, worker

from .harness import CHAT, RAW, Gateway, request, until
from .test_tunnels import SWITCH, UPGRADE

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"model":"m","stream":true}'
DELTA = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_a_stream_that_lasts_notes_what_it_has_used(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "CHECKPOINT_NS", 0)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    await upstream.send(STREAM)
    await client.read_head()
    for _ in range(3):
        await upstream.send(_chunk(DELTA))
        await client.expect(_chunk(DELTA))
    gateway.plane.sweep()
    (noted,) = gateway.receipts()
    assert (noted.outcome, noted.status, noted.output_tokens, noted.model) == ("open", 200, 2, "m")
    gateway.plane.wall_offset_ns += 1_000  # the clock was set; by id and start the store knows a receipt
    usage = b"data: " + json.dumps({"usage": {"prompt_tokens": 5, "completion_tokens": 9}}).encode() + b"\n\n"
    await upstream.send(_chunk(usage) + b"0\r\n\r\n")
    await client.expect(_chunk(usage))
    await until(lambda: len(gateway.receipts()) == 2, "the receipt")
    last = gateway.receipts()[-1]
    assert (last.id, last.started_ns) == (noted.id, noted.started_ns)
    assert (last.outcome, last.output_tokens) == ("ok", 9)


async def test_a_tunnel_notes_itself_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "CHECKPOINT_NS", 0)
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    gateway.plane.sweep()
    (noted,) = gateway.receipts()
    assert (noted.outcome, noted.status) == ("open", 101)
    client.close()
    await until(lambda: len(gateway.receipts()) == 2, "the receipt")


async def test_a_sweep_notes_only_what_is_due_and_only_so_many(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [await gateway.ask(request(b"GET " + RAW + b"/x", id=b"t%d" % number)) for number in range(3)]
    await until(lambda: sum(each.state == exchange_state.SENT for each in gateway.started) == 3, "the calls")
    gateway.plane.sweep()
    assert gateway.receipts() == []
    monkeypatch.setattr(settled, "CHECKPOINT_NS", 10**12)
    monkeypatch.setattr(worker, "CHECKPOINTS_AT_ONCE", 2)
    for exchange in gateway.started:
        exchange._started_ns = time.monotonic_ns() - 10**12
    gateway.plane.sweep()
    assert len(gateway.receipts()) == 2
    gateway.plane.sweep()
    gateway.plane.sweep()
    assert sorted(each.request_id for each in gateway.receipts()) == ["t0", "t1", "t2"]
    for client in clients:
        client.close()
