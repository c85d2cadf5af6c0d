"""Endpoints as MCP 2024-11-05 names them, and redirects: what a server names leads to it through the gateway."""

import pytest

from .conftest import Serve
from .harness import PREFIX, Gateway, request
from .mcp_calls import BEGUN, LIST, MCP, Pair, begin, call, refused, result, take, two

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 8\r\nConnection: close\r\n\r\nAccepted"
REST = b"event: message\r\ndata: {}\r\n\r\n: beat\n\n"


async def address_of(gateway: Gateway, pair: Pair, data: bytes, path: bytes = b"/sse", at: int = 0) -> bytes:
    """Open a stream whose first event names `data`; return the address the client is given."""
    events = b"event: endpoint\r\ndata: %b\r\n\r\n" % data
    seen = await call(gateway, pair[at], STREAM + events + REST, line=b"GET " + MCP + path)
    first, _, rest = seen.answer.body.partition(b"\r\n\r\n")
    assert rest == REST, "every other byte passes as it came"
    assert first.startswith(b"event: endpoint\r\ndata: " + PREFIX + b"/mcp/tools/")
    assert seen.fields[b"accept-encoding"] == b"identity"
    return first.partition(b"data: ")[2]


@pytest.mark.parametrize(
    ("base", "named", "target"),
    [
        ("", b"/messages/?session_id=a1", b"/messages/?session_id=a1"),
        ("/base", b"/base/messages?id=%2F&x", b"/base/messages?id=%2F&x"),
        ("/base", b"/outside", b"/outside"),
        ("/base", b"messages?id=1", b"/base/messages?id=1"),
        ("/base", b"?id=1", b"/base/sse?id=1"),
        ("", b"http://ORIGIN/messages?id=1", b"/messages?id=1"),
        ("", b"http://ORIGIN?id=1", b"/?id=1"),
    ],
    ids=["root", "below", "outside", "relative", "query", "absolute", "no-path"],
)
async def test_the_server_gets_the_address_it_has_named(
    serve: Serve, pair: Pair, base: str, named: bytes, target: bytes
) -> None:
    gateway = await two(serve, pair, base)
    address = await address_of(gateway, pair, named.replace(b"ORIGIN", pair[0].url[7:].encode()))
    for _ in range(2):
        seen = await call(gateway, pair[0], ACCEPTED, line=b"POST " + address)
        assert seen.line == b"POST " + target
        assert (seen.answer.status, seen.answer.body) == (202, b"Accepted")
    assert pair[1].is_untouched()


async def test_each_stream_has_its_own_server(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    addresses = [await address_of(gateway, pair, b"/m?id=1", at=at) for at in (0, 1)]
    for listener, address in reversed(list(zip(pair, addresses, strict=True))):
        await call(gateway, listener, ACCEPTED, line=b"POST " + address)


async def test_an_address_is_the_accounts_that_was_given_it(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    address = await address_of(gateway, pair, b"/m?id=1")
    answer = await refused(gateway, line=b"POST " + address, key=gateway.keys.add(user_id="other"))
    assert (answer.status, answer.json()["error"]["data"]["code"]) == (404, "SESSION_GONE")


@pytest.mark.parametrize("wrong", ["changed", "session", "server", "empty"])
async def test_an_address_the_gateway_has_not_made_is_not_found(serve: Serve, pair: Pair, wrong: str) -> None:
    gateway = await two(serve, pair)
    path, mark, text = (await address_of(gateway, pair, b"/m?id=1")).partition(b"=")
    session = (await begin(gateway, pair[1])).partition(b": ")[2]
    forged = {"changed": text[:-3] + b"AAA", "session": session, "server": text, "empty": b""}[wrong]
    path = path.replace(b"/tools/", b"/raw/") if wrong == "server" else path
    answer = await refused(gateway, line=b"POST " + path + mark + forged)
    assert (answer.status, answer.json()["error"]["data"]["code"]) == (404, "SESSION_GONE")


async def test_an_address_and_a_session_of_different_servers_do_not_go_together(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    address = await address_of(gateway, pair, b"/m?id=1")
    other = await begin(gateway, pair[1])
    assert (await refused(gateway, other, line=b"POST " + address)).status == 404


async def test_the_receipt_does_not_tell_the_address(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    address = await address_of(gateway, pair, b"/m?id=1")
    await call(gateway, pair[0], ACCEPTED, line=b"POST " + address, id=b"t2")
    receipt = await gateway.receipt(2)
    assert (receipt.path, receipt.upstream, receipt.status) == (address.decode().partition("?")[0], "tools", 202)


@pytest.mark.parametrize("status", [b"404 Not Found", b"503 Service Unavailable"])
async def test_an_answer_that_opens_no_stream_is_not_looked_at(serve: Serve, pair: Pair, status: bytes) -> None:
    gateway = await two(serve, pair, routing={"attempts_max": 1})
    body = b"event: endpoint\ndata: /m\n\n"
    seen = await call(gateway, pair[0], result(status=status, body=body), line=b"GET " + MCP + b"/sse")
    assert seen.answer.body == body


async def test_a_stream_that_is_compressed_all_the_same_passes_as_it_is(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    head = STREAM.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection")
    seen = await call(gateway, pair[0], head + b"event: endpoint\ndata: /m\n\n", line=b"GET " + MCP + b"/sse")
    assert seen.answer.body == b"event: endpoint\ndata: /m\n\n"


async def test_the_address_reaches_the_client_while_the_stream_goes_on(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    client = await gateway.ask(request(b"GET " + MCP + b"/sse"))
    wire, _, _ = await take(pair[0])
    await wire.send(STREAM + b"event: endpoint\ndata: /m\n")
    await gateway.turn()
    await wire.send(b"\n")
    await client.read_head()
    while b"sessionId=" not in client.held:
        assert await client.receive()


async def test_what_is_no_address_is_left_to_the_client(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    events = b"event: endpoint\ndata: http://[::1/m\n\n"
    seen = await call(gateway, pair[0], STREAM + events, line=b"GET " + MCP + b"/sse")
    assert seen.answer.body == events


# -- redirects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "seen_as"),
    [
        (b"http://ORIGIN/mcp/", b"/api/v1/gpu/proxy/mcp/tools/"),
        (b"http://ORIGIN/mcp", b"/api/v1/gpu/proxy/mcp/tools"),
        (b"http://ORIGIN/mcp/sub?x=1", b"/api/v1/gpu/proxy/mcp/tools/sub?x=1"),
        (b"/mcp/?x", b"/api/v1/gpu/proxy/mcp/tools/?x"),
        (b"//ORIGIN/mcp?x", b"/api/v1/gpu/proxy/mcp/tools?x"),
        (b"https://login.example.com/mcp", b"https://login.example.com/mcp"),
        (b"https://ORIGIN/mcp", b"https://ORIGIN/mcp"),
        (b"sub", b"sub"),
        (b"?x=1", b"?x=1"),
        (b"http://[::1/mcp", b"http://[::1/mcp"),
    ],
    ids=range(10),
)
async def test_a_redirect_leads_through_the_gateway(serve: Serve, pair: Pair, location: bytes, seen_as: bytes) -> None:
    gateway = await two(serve, pair)
    origin = pair[0].url[7:].encode()
    answer = result(b"Location: " + location.replace(b"ORIGIN", origin), status=b"307 Temporary Redirect")
    seen = await call(gateway, pair[0], answer)
    assert (seen.answer.status, seen.answer.field(b"location")) == (307, seen_as.replace(b"ORIGIN", origin))


@pytest.mark.parametrize("target", [b"/other", b"/mcpx"])
async def test_a_redirect_out_of_the_base_url_is_followed_by_a_sealed_address(
    serve: Serve, pair: Pair, target: bytes
) -> None:
    gateway = await two(serve, pair)
    session = await begin(gateway, pair[0])
    answer = result(b"Location: " + pair[0].url.encode() + target, status=b"308 Permanent Redirect")
    location = (await call(gateway, pair[0], answer, session)).answer.field(b"location")
    assert location is not None
    seen = await call(gateway, pair[0], BEGUN, session, line=b"POST " + location, body=LIST)
    assert seen.line == b"POST " + target


async def test_a_location_that_is_no_redirect_stays(gateway: Gateway) -> None:
    answer = result(b"Location: " + gateway.tools.url.encode() + b"/mcp/1", status=b"201 Created")
    seen = await call(gateway, gateway.tools, answer)
    assert seen.answer.field(b"location") == gateway.tools.url.encode() + b"/mcp/1"
