"""Names of targets: looked up for each connection, judged whole, and nobody waits for the names of others: R4, R6."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from gpuproxy import resolver

from .conftest import Serve
from .harness import ENVELOPE, OK, RAW, Gateway, request
from .wire import Listener, Wire


def _envelope(host: str, port: int) -> bytes:
    body = b'{"protocol":"https","target_url":"http://%b:%d/x"}' % (host.encode(), port)
    return request(b"POST " + ENVELOPE, body=body, id=b"")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What the name server says next of each name; of others what it says anyway."""
    said: dict[str, list[list[str]]] = {}
    ask = resolver.look_up

    def look_up(host: str) -> list[str]:
        return said[host].pop(0) if host in said else ask(host)

    monkeypatch.setattr(resolver, "look_up", look_up)
    return said


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Name servers of *.silent that do not answer."""
    ask, end = resolver.look_up, threading.Event()

    def look_up(host: str) -> list[str]:
        if host.endswith(".silent"):
            end.wait()
        return ask(host)

    monkeypatch.setattr(resolver, "look_up", look_up)
    yield
    end.set()


async def test_a_name_is_judged_whole_each_time_it_is_dialled(
    serve: Serve, answers: dict[str, list[list[str]]]
) -> None:
    """One that was public, and leads inside or also inside later, is not dialled; what is dialled was judged."""
    gateway = await serve(egress={"allow": ["127.0.0.1/32"]})
    open_to_all = Listener()
    inside = socket.create_server(("127.0.0.2", open_to_all.port))
    canary = Listener.__new__(Listener)
    canary.sock, canary.wires = inside, []
    good, bad = ["127.0.0.1"], ["127.0.0.2"]
    answers["flips.example"] = [good, bad, good + bad, bad + good, good]
    client = await gateway.client()
    try:
        for expected in (200, 403, 403, 403, 200):
            await client.send(_envelope("flips.example", open_to_all.port))
            if expected == 200:
                upstream = await open_to_all.accept()
                assert b"\r\nHost: flips.example:%d\r\n" % open_to_all.port in await upstream.read_head()
                await upstream.send(OK)
            answer = await client.answer()
            assert answer.status == expected
            assert expected == 200 or answer.json()["code"] == "TARGET_FORBIDDEN"
            assert canary.is_untouched()
            gateway.passes(gateway.config.timeouts.upstream_keepalive_s)
    finally:
        canary.close()
        open_to_all.close()


async def test_an_address_that_is_silent_leaves_time_for_the_next(
    serve: Serve, answers: dict[str, list[list[str]]]
) -> None:
    upstream = Listener()
    silent = socket.create_server(("127.0.0.2", upstream.port), backlog=0)
    full = [socket.socket() for _ in range(4)]  # a listener whose queue is full takes no connection
    for sock in full:
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.2", upstream.port))
    answers["two.example"] = [["127.0.0.2", "127.0.0.1"]]
    gateway = await serve(timeouts={"connect_s": 0.4}, egress={"allow": ["127.0.0.0/8"]})
    client = await gateway.ask(_envelope("two.example", upstream.port))
    await gateway.answer_one(upstream)
    assert (await client.answer()).status == 200
    for each in (*full, silent, upstream):
        each.close()


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "a" * 253, "nowhere.invalid"])
async def test_what_is_no_name_is_a_502(gateway: Gateway, host: str) -> None:
    client = await gateway.ask(_envelope(host, 80))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (502, "UPSTREAM_UNREACHABLE")
    assert "does not resolve" in answer.json()["error"]


async def test_names_that_hang_make_no_configured_upstream_wait(serve: Serve, silence: None) -> None:
    upstream = Listener()
    url = f"http://localhost:{upstream.port}"
    gateway = await serve(timeouts={"dns_s": 0.3}, upstreams=[{"name": "named", "protocol": "https", "urls": [url]}])
    hanging: list[Wire] = [await gateway.ask(_envelope(f"n{n}.silent", 80)) for n in range(resolver.THREADS_MAX + 2)]
    client = await gateway.ask(request(b"GET " + RAW.replace(b"raw", b"named") + b"/x"))
    assert (await gateway.answer_one(upstream)).startswith(b"GET /x ")
    assert (await client.answer()).body == b"ok"
    for wire in hanging:
        answer = await wire.answer()
        assert (answer.status, answer.json()["code"]) == (504, "UPSTREAM_TIMEOUT")
        assert "not resolved in time" in answer.json()["error"]
    upstream.close()


async def test_names_nobody_waits_for_any_more_take_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were: else who names a thousand that hang lets the names of others wait for minutes."""
    asked, may_go = list[str](), threading.Event()

    def look_up(host: str) -> list[str]:
        asked.append(host)
        may_go.wait(10)
        return ["192.0.2.1"]

    monkeypatch.setattr(resolver, "look_up", look_up)
    resolving = resolver.Resolver("test", threads_max=1)
    first = asyncio.ensure_future(resolving.resolve("first", 10))
    late = await asyncio.gather(*(resolving.resolve(f"n{n}", 0.01) for n in range(50)), return_exceptions=True)
    assert {type(each) for each in late} == {TimeoutError}
    may_go.set()
    assert await first == await resolving.resolve("last", 10) == ["192.0.2.1"]
    assert asked == ["first", "last"]
    resolving.close()


def test_a_lost_question_is_asked_again_in_time() -> None:
    assert resolver.resolv_options(2.0) == "timeout:1 attempts:2"
    assert resolver.resolv_options(0.1) == "timeout:1 attempts:2"
    assert resolver.resolv_options(10.0) == "timeout:5 attempts:2"
