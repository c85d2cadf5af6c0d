"""What holds for any split and any damage of a request: the upstream sees what an oracle sees, or nothing."""

import h11
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Serve
from .harness import KEY, OK, RAW, Gateway, request, until
from .wire import Wire

PLAIN = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

THREE = (
    request(b"POST " + RAW + b"/1", b"X-A: 1", body=b"hello", id=b"t1")
    + request(b"PUT " + RAW + b"/2?q=%20", b"Transfer-Encoding: chunked", id=b"t2")
    + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\n"
    + request(b"GET " + RAW + b"/3", b"x-b:  2 ", id=b"t3")
)
SEEN = [(b"POST", b"/1", b"hello"), (b"PUT", b"/2?q=%20", b"abc0123456789"), (b"GET", b"/3", b"")]


async def _take(upstream: Wire) -> tuple[bytes, bytes, bytes]:
    """Read one request strictly, answer it, return method, target and body."""
    oracle = h11.Connection(h11.SERVER)
    head, body = None, b""
    while True:
        event = oracle.next_event()
        if event is h11.NEED_DATA:
            if not upstream.held:
                assert await upstream.receive(), "the upstream saw half a request"
            oracle.receive_data(upstream.take(len(upstream.held)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
    upstream.held = oracle.trailing_data[0] + upstream.held
    await upstream.send(OK)
    assert head is not None
    return bytes(head.method), bytes(head.target), body


@settings(PLAIN, max_examples=60)
@given(cuts=st.lists(st.integers(1, len(THREE) - 1), max_size=20))
async def test_any_split_of_pipelined_requests_gives_the_same_requests(serve: Serve, cuts: list[int]) -> None:
    gateway = serve.last or await serve()
    client = await gateway.client()
    start = 0
    for end in [*sorted(set(cuts)), len(THREE)]:
        await client.send(THREE[start:end])
        await gateway.turn()
        start = end
    upstream = await _upstream(gateway)
    for expected in SEEN:
        assert await _take(upstream) == expected
        assert (await client.answer()).body == b"ok"
    client.close()


async def _upstream(gateway: Gateway) -> Wire:
    return gateway.raw.wires[-1] if gateway.raw.wires else await gateway.raw.accept()


ONE = b"POST " + RAW + b"/x HTTP/1.1\r\nHost: gw\r\nX-API-Key: " + KEY + b"\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"
CHUNKED = ONE.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked").replace(b"hello", b"5\r\nhello\r\n0\r\n\r\n")
BITS = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"0", b"9", b"\x80", b"\xff", b"Content-Length: 3\r\n"]
BITS += [
    b"Transfer-Encoding: chunked\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"HTTP/1.1",
    b";",
    b"x",
    b"Host: b\r\n",
]
DAMAGE = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.sampled_from(BITS)), min_size=1, max_size=4)


@settings(PLAIN, max_examples=150)
@given(damage=DAMAGE, is_chunked=st.booleans())
async def test_a_damaged_request_is_answered_and_is_never_more_than_an_oracle_sees(
    serve: Serve, damage: list[tuple[int, int, bytes]], is_chunked: bool
) -> None:
    gateway = serve.last or await serve(timeouts={"linger_s": 0.5})
    sent = CHUNKED if is_chunked else ONE
    for at, drop, put in damage:
        at %= len(sent)
        sent = sent[:at] + put + sent[at + drop :]
    client = await gateway.ask(sent)
    for _ in range(3):
        await gateway.turn()
        await until(lambda: not gateway.plane._tasks, "connections to be made")
    allowed = _oracle(sent)
    upstreams = [await gateway.raw.accept() for _ in range(100) if not gateway.raw.is_untouched()]
    gateway.passes(200)  # whatever waits now is refused, cut or closed
    gateway.passes(200)
    seen = b"".join([await wire.read_to_end() for wire in upstreams])
    assert seen.count(b" HTTP/1.1\r\nHost: 127.0.0.1") <= len(allowed), (sent, seen)
    client.end()
    said = await client.read_to_end()
    assert not said or said.startswith(b"HTTP/1.1 "), said
    for wire in [client, *upstreams]:
        wire.close()
    gateway.raw.wires.clear()


def _oracle(sent: bytes) -> list[bytes]:
    """Return the targets of the requests that a strict parser finds at the start of `sent`, whole or not."""
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(sent.lstrip(b"\r\n"))  # empty lines before a request are skipped, RFC 9112 §2.2
    found = []
    try:
        while not isinstance(event := oracle.next_event(), type(h11.NEED_DATA)) and event is not h11.PAUSED:
            if isinstance(event, h11.Request):
                found.append(bytes(event.target))
            if isinstance(event, h11.EndOfMessage):
                oracle.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                oracle.send(h11.EndOfMessage())
                oracle.start_next_cycle()
    except h11.ProtocolError:
        pass
    return found
