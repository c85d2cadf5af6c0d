"""MCP sessions over a server with two URLs: each call of a session meets the server that began it, or none."""

import contextlib
import json
from typing import Any

import pytest

from gpuproxy.config import build
from gpuproxy.link.messages import Routing

from .conftest import Serve
from .harness import KEY, PREFIX, Gateway, request, until
from .mcp_calls import BEGUN, INITIALIZE, LIST, MCP, SERVER_ID, Pair, begin, call, refused, result, take, two
from .wire import Listener

EVENTS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\n"
    b"Mcp-Session-Id: " + SERVER_ID + b"\r\nConnection: close\r\n\r\n"
)
GONE = -32600  # "invalid request", as the official server says of a session it does not know


# -- the same server --------------------------------------------------------------------------------------------


async def test_every_call_of_a_session_goes_to_the_server_that_began_it(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    for number in range(3):
        seen = await call(gateway, pair[0], BEGUN, session, id=b"n%d" % number)
        assert seen.fields[b"mcp-session-id"] == SERVER_ID
        assert b"Mcp-Session-Id: " + (seen.answer.field(b"mcp-session-id") or b"") == session
    assert pair[1].is_untouched()


@pytest.mark.parametrize("method", [b"GET", b"DELETE"])
async def test_so_do_its_streams_and_its_end(serve: Serve, pair: Pair, method: bytes) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    seen = await call(gateway, pair[0], result(), session, b"Last-Event-ID: 7", line=method + b" " + MCP)
    assert (seen.line, seen.fields[b"mcp-session-id"]) == (method + b" /mcp", SERVER_ID)
    assert seen.fields[b"last-event-id"] == b"7"


async def test_sessions_begin_in_turn_at_all_servers(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    sessions = [await begin(gateway, each) for each in pair]
    for listener, session in reversed(list(zip(pair, sessions, strict=True))):
        assert (await call(gateway, listener, result(), session)).answer.status == 200


async def test_the_stream_of_a_session_passes_byte_for_byte(serve: Serve, pair: Pair) -> None:
    events = b"id: 1\r\ndata:\r\n\r\n: beat\n\nevent: endpoint\ndata: /elsewhere\n\nretry: 10\nid: 2\ndata: {}\n\n"
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    seen = await call(gateway, pair[0], EVENTS + events, session, line=b"GET " + MCP)
    assert seen.answer.body == events
    assert seen.answer.field(b"cache-control") == b"no-cache, no-transform"
    assert b"accept-encoding" not in seen.fields, "the client has not asked for one either"


async def test_the_path_by_upstream_serves_the_same_session(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    for line in (b"POST " + MCP, b"POST " + PREFIX + b"/upstreams/tools"):
        assert (await call(gateway, pair[0], BEGUN, session, line=line)).fields[b"mcp-session-id"] == SERVER_ID


# -- the id -----------------------------------------------------------------------------------------------------


async def test_the_clients_id_is_visible_ascii_and_tells_nothing(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    one, two_ = [(await begin(gateway, each)).partition(b": ")[2] for each in pair]
    assert one != two_
    assert all(0x21 <= character <= 0x7E for character in one)
    assert SERVER_ID not in one
    assert str(pair[0].port).encode() not in one


async def test_a_server_with_one_url_is_no_exception(gateway: Gateway) -> None:
    session = await begin(gateway, gateway.tools)
    assert SERVER_ID not in session
    assert (await call(gateway, gateway.tools, BEGUN, session)).fields[b"mcp-session-id"] == SERVER_ID


@pytest.mark.parametrize(
    ("body", "status"),
    [(INITIALIZE, b"400 Bad Request"), (INITIALIZE, b"500 No"), (LIST, b"200 OK"), (b"[]", b"200 OK")],
    ids=["refused", "failed", "another-method", "no-object"],
)
async def test_an_id_is_learnt_only_when_initialize_is_accepted(gateway: Gateway, body: bytes, status: bytes) -> None:
    answer = result(b"Mcp-Session-Id: fresh", status=status)
    seen = await call(gateway, gateway.tools, answer, body=body)
    assert seen.answer.status == int(status[:3])
    assert seen.answer.field(b"mcp-session-id") is None


async def test_within_a_session_no_other_id_is_learnt(gateway: Gateway) -> None:
    session = await begin(gateway, gateway.tools)
    answer = result(b"Mcp-Session-Id: fresh", status=b"404 Not Found")
    seen = await call(gateway, gateway.tools, answer, session)
    assert (seen.answer.status, seen.answer.field(b"mcp-session-id")) == (404, None)


# -- not here ---------------------------------------------------------------------------------------------------


async def gone(gateway: Gateway, pair: Pair, *fields: bytes, line: bytes = b"POST " + MCP, key: bytes = KEY) -> None:
    answer = await refused(gateway, *fields, line=line, key=key)
    assert answer.status == 404
    assert answer.json()["error"] == {
        "code": GONE,
        "message": "this session is unknown here; begin a new one",
        "data": {"code": "SESSION_GONE", "request_id": "t1"},
    }
    assert all(each.is_untouched() for each in pair)


@pytest.mark.parametrize("line", [b"POST " + MCP, b"GET " + MCP, b"DELETE " + MCP], ids=["post", "get", "delete"])
@pytest.mark.parametrize("text", [SERVER_ID, b"0" * 32, b"A" * 200, b"!~", b"A" * 9000], ids=range(5))
async def test_an_id_the_gateway_has_not_made_is_not_found(serve: Serve, pair: Pair, text: bytes, line: bytes) -> None:
    await gone(await two(serve, pair), pair, b"Mcp-Session-Id: " + text, line=line)


async def test_one_changed_bit_makes_an_id_unknown(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = bytearray(await begin(gateway, pair[0]))
    session[-10] = ord("A") if session[-10] != ord("A") else ord("B")
    await gone(gateway, pair, bytes(session))


async def test_a_session_is_the_accounts_that_began_it(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    same, other = gateway.keys.add(), gateway.keys.add(user_id="other")
    assert (await call(gateway, pair[0], result(), session, key=same)).answer.status == 200
    await gone(gateway, pair, session, key=other)


async def test_a_session_is_of_one_server_only(serve: Serve, pair: Pair) -> None:
    other = {"name": "other", "protocol": "mcp", "urls": [pair[0].url + "/mcp"]}
    gateway = await two(serve, pair, upstreams=[other])
    session = await begin(gateway, pair[0])
    await gone(gateway, pair, session, line=b"POST " + PREFIX + b"/mcp/other")


async def test_without_the_secrets_nobody_is_told_that_a_session_is_gone(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    await call(gateway, pair[0], BEGUN, session)
    gateway.plane.seal.take(())
    assert (await call(gateway, pair[0], BEGUN, session)).answer.status == 200, "what is known stays known"
    assert (await refused(gateway, session + b"x")).status == 503


@pytest.mark.parametrize("line", [b"POST " + MCP, b"GET " + MCP], ids=["post", "get"])
async def test_without_the_secrets_no_session_begins(serve: Serve, pair: Pair, line: bytes) -> None:
    gateway = await two(serve, pair)
    gateway.plane.seal.take(())
    client = await gateway.ask(request(line, body=INITIALIZE if line.startswith(b"POST") else None))
    assert (await client.answer()).status == 503
    assert all(each.is_untouched() for each in pair)
    seen = await call(gateway, pair[0], result(b"Mcp-Session-Id: x"))
    assert seen.answer.status == 200, "calls that begin none pass"


# -- servers that go --------------------------------------------------------------------------------------------


async def push(gateway: Gateway, *urls: str) -> None:
    config = build({"upstreams": [{"name": "tools", "protocol": "mcp", "urls": list(urls)}]})
    gateway.link_server.publish_routing(Routing(config.upstreams, config.models))
    await until(lambda: gateway.plane.router.config.upstreams == config.upstreams, "the change")


async def test_a_session_outlives_a_change_of_the_other_servers(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    await push(gateway, "http://127.0.0.1:9/mcp", "http://127.0.0.1:8/mcp", pair[0].url + "/mcp")
    assert (await call(gateway, pair[0], BEGUN, session)).fields[b"mcp-session-id"] == SERVER_ID


async def test_a_session_of_a_server_that_was_taken_out_is_not_found(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    await push(gateway, pair[1].url + "/mcp")
    await gone(gateway, pair, session)


async def test_a_server_that_is_down_keeps_its_sessions(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, routing={"failures_max": 1})
    first = pair[0].sock.getsockname()
    session = await begin(gateway, pair[0])
    pair[0].close()
    for _ in range(3):  # its breaker is open after the first
        answer = await refused(gateway, session)
        assert (answer.status, answer.json()["error"]["data"]["code"]) == (502, "UPSTREAM_UNREACHABLE")
        assert answer.field(b"x-gpuproxy-attempts") is None
    assert pair[1].is_untouched()
    (replica,) = [each for each in gateway.plane.replicas.all() if str(first[1]) in each.url]
    assert replica.state != 0, "the breaker is not closed, and still"
    with contextlib.closing(Listener(port=first[1])) as again:
        assert (await call(gateway, again, BEGUN, session)).fields[b"mcp-session-id"] == SERVER_ID


@pytest.mark.parametrize("status", [b"502 Bad Gateway", b"503 Service Unavailable", b"429 Too Many Requests"])
async def test_what_a_server_says_of_itself_is_passed_on(serve: Serve, pair: Pair, status: bytes) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    seen = await call(gateway, pair[0], result(b"Retry-After: 3", status=status), session)
    assert (seen.answer.status, pair[1].is_untouched()) == (int(status[:3]), True)


# -- without sessions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [b"2026-07-28", b"2027-01-01"])
async def test_calls_of_the_stateless_revisions_go_to_all_servers_in_turn(
    serve: Serve, pair: Pair, version: bytes
) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    field = b"MCP-Protocol-Version: " + version
    for listener in (pair[1], pair[0], pair[1]):
        seen = await call(gateway, listener, result(), field, b"Mcp-Method: tools/list", session)
        assert b"mcp-session-id" not in seen.fields
        assert seen.fields[b"mcp-protocol-version"] == version


async def test_a_legacy_call_without_a_session_goes_to_all_in_turn(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    for listener in (*pair, *pair):
        await call(gateway, listener, result(), b"MCP-Protocol-Version: 2025-11-25")


# -- envelopes ----------------------------------------------------------------------------------------------------


def enveloped(url: str, **fields: Any) -> bytes:
    body = json.dumps({"protocol": "mcp", "target_url": url + "/mcp", **fields}).encode()
    return request(b"POST " + PREFIX, body=body)


async def test_an_envelope_keeps_the_id_as_the_server_gave_it(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway.tools.url, headers={"Mcp-Session-Id": "a1"}, body={"method": "x"}))
    wire, _, fields = await take(gateway.tools)
    assert fields[b"mcp-session-id"] == b"a1"
    await wire.send(BEGUN)
    assert (await client.answer()).json()["headers"]["mcp-session-id"] == SERVER_ID.decode()


@pytest.mark.parametrize(
    ("fields", "stays"),
    [
        ({"headers": {"Mcp-Session-Id": "a1"}, "body": {"method": "tools/list"}}, True),
        ({"headers": {"Mcp-Session-Id": "a1"}, "method": "DELETE"}, True),
        ({"body": json.loads(INITIALIZE)}, True),
        ({"body": {"method": "tools/list"}}, False),
    ],
    ids=["post", "delete", "initialize", "stateless"],
)
async def test_the_session_of_an_envelope_stays_at_its_target(
    serve: Serve, pair: Pair, fields: dict[str, Any], stays: bool
) -> None:
    gateway = await two(serve, pair)
    pair[0].close()
    client = await gateway.ask(enveloped(pair[0].url, **fields))
    if not stays:
        wire, _, _ = await take(pair[1])
        await wire.send(result())
    answer = await client.answer()
    assert answer.status == (502 if stays else 200)
    assert pair[1].is_untouched()
