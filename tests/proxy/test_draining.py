"""A worker that drains: no call is lost on a connection that is kept alive, and none stays long."""

import pytest

from .harness import OK, RAW, Gateway, request
from .wire import Wire

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _called(gateway: Gateway) -> tuple[Wire, Wire]:
    """Return a client whose first call has been answered, and the upstream's end."""
    client = await gateway.ask(request(b"GET " + RAW + b"/first"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).field(b"connection") is None
    return client, upstream


async def _is_answered_and_closed(client: Wire, upstream: Wire) -> None:
    await upstream.read_head()
    await upstream.send(OK)
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (200, b"close")
    await client.expect_end()


async def test_a_call_on_its_way_while_a_successor_takes_over_is_answered(gateway: Gateway) -> None:
    client, upstream = await _called(gateway)
    gateway.plane.parting_s = 3.0
    gateway.plane.begin_drain()
    await client.send(request(b"GET " + RAW + b"/second"))
    await _is_answered_and_closed(client, upstream)


async def test_a_call_behind_an_answer_that_could_not_say_it_was_the_last_is_answered(gateway: Gateway) -> None:
    client, upstream = await _called(gateway)
    await client.send(request(b"GET " + RAW + b"/stream"))
    await upstream.read_head()
    await upstream.send(HEAD)
    await client.read_head()
    gateway.plane.parting_s = 3.0
    gateway.plane.begin_drain()
    await upstream.send(b"0\r\n\r\n")
    await client.expect(b"0\r\n\r\n")
    await client.send(request(b"GET " + RAW + b"/third"))
    await _is_answered_and_closed(client, upstream)


async def test_who_has_been_idle_for_longer_is_let_go(gateway: Gateway) -> None:
    client, _ = await _called(gateway)
    gateway.passes(4)
    gateway.plane.parting_s = 3.0
    gateway.plane.begin_drain()
    gateway.plane.sweep()
    await client.expect_end()


async def test_without_a_successor_who_is_idle_is_let_go_at_once(gateway: Gateway) -> None:
    client, _ = await _called(gateway)
    gateway.plane.begin_drain()
    await client.expect_end()


@pytest.mark.parametrize("parting_s", [0.0, 3.0])
async def test_a_call_whose_head_is_half_here_is_answered(gateway: Gateway, parting_s: float) -> None:
    client, upstream = await _called(gateway)
    asked = request(b"GET " + RAW + b"/second")
    await client.send(asked[:30])
    await gateway.turn()
    gateway.plane.parting_s = parting_s
    gateway.plane.begin_drain()
    await client.send(asked[30:])
    await _is_answered_and_closed(client, upstream)
