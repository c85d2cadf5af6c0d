"""Active probes: what is asked, how often, and what its answer means."""

from typing import Any

from .conftest import Serve
from .harness import CHAT, OK, Gateway, request, until
from .wire import Listener, Wire

Pair = tuple[Listener, Listener]
BAD = b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"


def tree(pair: Pair) -> dict[str, Any]:
    upstream = {"name": "a", "protocol": "openinference", "urls": [pair[0].url + "/base"], "models": ["one"]}
    return {"upstreams": [{**upstream, "probe_path": "/health?x"}], "routing": {"failures_max": 2, "probe_s": 5}}


async def probe(gateway: Gateway, listener: Listener) -> Wire:
    """Let the next probe come."""
    gateway.passes(5)
    upstream = await listener.accept()
    head = await upstream.read_head()
    assert head.startswith(b"GET /base/health?x HTTP/1.1\r\nHost: 127.0.0.1:")
    return upstream


def state(gateway: Gateway) -> int:
    return next(replica.state for replica in gateway.plane.replicas.all() if replica.upstream == "a")


async def idle(gateway: Gateway) -> None:
    await until(lambda: not gateway.plane._tasks, "the probe's end")


async def test_an_endpoint_that_fails_its_probes_is_left_alone_until_one_is_good(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**tree(pair))
    for answer in (BAD, b""):
        upstream = await probe(gateway, pair[0])
        await upstream.send(answer)
        upstream.close()
        await idle(gateway)
    assert state(gateway) == 1
    upstream = await probe(gateway, pair[0])
    await upstream.send(OK)
    await idle(gateway)
    assert state(gateway) == 0
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"one"}'))
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).body == b"ok", "calls may use the probe's connection"
    assert (await gateway.receipt()).attempts == 1, "a probe is nobody's call"


async def test_calls_that_go_well_are_no_answer_to_a_probe(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**tree(pair))
    for expected in (0, 1, 1):
        upstream = await probe(gateway, pair[0])
        await upstream.send(BAD)
        await idle(gateway)
        assert state(gateway) == expected
        client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"one"}'))  # it is the last one
        await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).status == 200
        assert state(gateway) == expected
        upstream.close()
        gateway.passes(0)
        gateway.plane.probes._asked_s.clear()


async def test_there_is_one_probe_at_a_time(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**tree(pair))
    upstream = await probe(gateway, pair[0])
    gateway.passes(20)
    await gateway.turn()
    assert pair[0].is_untouched()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await idle(gateway)
    await upstream.expect_gone()
    assert state(gateway) == 0


async def test_an_endpoint_without_a_probe_path_is_not_asked(serve: Serve, pair: Pair) -> None:
    configured = tree(pair)
    del configured["upstreams"][0]["probe_path"]
    gateway = await serve(**configured)
    gateway.passes(5)
    await gateway.turn()
    assert pair[0].is_untouched()
