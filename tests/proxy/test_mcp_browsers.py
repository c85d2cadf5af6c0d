"""MCP calls of web pages: who may call, what browsers are told, and where clients without a key are sent."""

from typing import Any

import pytest

from .conftest import Serve
from .harness import PREFIX, Gateway, request
from .mcp_calls import BEGUN, INITIALIZE, MCP, Pair, begin, call, refused, result, two
from .wire import Answer

PAGE = b"https://app.example.com"
LISTED = {"mcp": {"allowed_origins": [PAGE.decode()]}}
ASKS = (b"Access-Control-Request-Method: POST", b"Access-Control-Request-Headers: x-api-key,mcp-session-id")


def listed(answer: Answer, name: bytes) -> set[bytes]:
    values = [value for field, value in answer.fields if field.lower() == name]
    return {item.strip().lower() for value in values for item in value.split(b",")}


async def preflight(gateway: Gateway, origin: bytes, target: bytes = MCP) -> Answer:
    client = await gateway.ask(request(b"OPTIONS " + target, b"Origin: " + origin, *ASKS, key=b""))
    return await client.answer()


# -- who may call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "tree", "passes"),
    [
        (PAGE, LISTED, True),
        (PAGE, {}, False),
        (PAGE + b":8443", LISTED, False),
        (b"http://app.example.com", LISTED, False),
        (b"https://app.example.com.evil.org", LISTED, False),
        (b"http://gw", {}, False),
        (b"null", LISTED, False),
        (b"null", {"mcp": {"allowed_origins": ["null"]}}, True),
        (b"https://any.org", {"mcp": {"allowed_origins": ["*"]}}, True),
        (b"http://localhost:6274", {}, True),
        (b"http://127.0.0.1", {}, True),
        (b"https://[::1]:1", {}, True),
        (b"http://localhost.evil.org", {}, False),
        (b"http://localhost:6274", {"server": {"host": "0.0.0.0"}}, False),
        (b"https://gw.example.com", {"server": {"public_url": "https://gw.example.com:443/sub"}}, True),
        (b"https://gw.example.com:8443", {"server": {"public_url": "https://gw.example.com"}}, False),
    ],
    ids=range(16),
)
async def test_pages_call_only_if_they_may(
    serve: Serve, pair: Pair, origin: bytes, tree: dict[str, Any], passes: bool
) -> None:
    gateway = await two(serve, pair, **tree)
    field = b"Origin: " + origin
    if passes:
        seen = await call(gateway, pair[0], result(), field)
        assert (seen.fields[b"origin"], seen.answer.status) == (origin, 200)
        return
    answer = await refused(gateway, field)
    assert (answer.status, answer.json()["error"]["data"]["code"]) == (403, "FORBIDDEN")
    assert answer.field(b"access-control-allow-origin") is None
    assert all(each.is_untouched() for each in pair)


@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"POST"])
async def test_that_holds_for_every_method_and_path_of_it(serve: Serve, pair: Pair, method: bytes) -> None:
    gateway = await two(serve, pair)
    for target in (MCP, PREFIX + b"/upstreams/tools/x"):
        assert (await refused(gateway, b"Origin: " + PAGE, line=method + b" " + target)).status == 403


async def test_other_protocols_do_not_ask_for_the_origin(gateway: Gateway) -> None:
    seen = await call(gateway, gateway.raw, result(), b"Origin: " + PAGE, line=b"GET " + PREFIX + b"/upstreams/raw/x")
    assert seen.answer.status == 200


# -- what browsers are told ---------------------------------------------------------------------------------------


async def test_a_browser_is_told_without_a_key_that_it_may_call(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, **LISTED)
    answer = await preflight(gateway, PAGE)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.field(b"access-control-allow-origin") == PAGE
    assert {b"get", b"post", b"delete"} <= listed(answer, b"access-control-allow-methods")
    assert listed(answer, b"access-control-allow-headers") == {b"x-api-key", b"mcp-session-id"}
    assert b"origin" in listed(answer, b"vary")
    assert answer.field(b"x-request-id") == b"t1"
    assert all(each.is_untouched() for each in pair)
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.user_id) == (204, "ok", "")


async def test_the_connection_of_a_preflight_takes_the_call_that_follows(gateway: Gateway) -> None:
    page = b"Origin: http://localhost:1"
    client = await gateway.ask(request(b"OPTIONS " + MCP, page, *ASKS, key=b"", id=b"t0"))
    assert (await client.answer()).status == 204
    await client.send(request(b"POST " + MCP, page, body=INITIALIZE))
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.expect(INITIALIZE)
    await upstream.send(BEGUN)
    assert (await client.answer()).status == 200


async def test_a_browser_is_told_that_it_may_not(gateway: Gateway) -> None:
    answer = await preflight(gateway, PAGE)
    assert (answer.status, answer.field(b"access-control-allow-origin")) == (403, None)


@pytest.mark.parametrize("fields", [(), (b"Origin: http://localhost",), ASKS], ids=["bare", "origin", "asks"])
async def test_an_options_call_that_is_no_preflight_needs_a_key(gateway: Gateway, fields: tuple[bytes, ...]) -> None:
    assert (await refused(gateway, *fields, line=b"OPTIONS " + MCP, key=b"")).status == 401
    seen = await call(gateway, gateway.tools, result(), b"Origin: http://localhost", line=b"OPTIONS " + MCP)
    assert seen.line == b"OPTIONS /mcp"


async def test_a_page_may_read_answers_and_their_session_id(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, **LISTED)
    answer = BEGUN.replace(
        b"Connection",
        b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\n"
        b"Access-Control-Expose-Headers: X-Own\r\nVary: Accept\r\nConnection",
    )
    seen = await call(gateway, pair[0], answer, b"Origin: " + PAGE, body=INITIALIZE)
    assert seen.answer.field(b"access-control-allow-origin") == PAGE
    assert seen.answer.field(b"access-control-allow-credentials") is None
    assert {b"mcp-session-id", b"x-own"} <= listed(seen.answer, b"access-control-expose-headers")
    assert listed(seen.answer, b"vary") == {b"accept", b"origin"}
    assert seen.answer.field(b"mcp-session-id")


async def test_programs_get_the_servers_own_fields(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, **LISTED)
    seen = await call(gateway, pair[0], result(b"Access-Control-Allow-Origin: *"))
    assert listed(seen.answer, b"access-control-allow-origin") == {b"*"}
    assert seen.answer.field(b"access-control-expose-headers") is None


@pytest.mark.parametrize("session", [b"X: y", b"Mcp-Session-Id: forged"], ids=["key", "session"])
async def test_a_page_may_read_refusals(serve: Serve, pair: Pair, session: bytes) -> None:
    gateway = await two(serve, pair, **LISTED)
    answer = await refused(gateway, b"Origin: " + PAGE, session, key=b"" if session == b"X: y" else gateway.keys.add())
    assert answer.status == (401 if session == b"X: y" else 404)
    assert answer.field(b"access-control-allow-origin") == PAGE
    assert b"www-authenticate" in listed(answer, b"access-control-expose-headers")


async def test_a_page_gets_its_stream(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, **LISTED)
    session = await begin(gateway, pair[0])
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\nid: 1\ndata:\n\n"
    seen = await call(gateway, pair[0], stream, session, b"Origin: " + PAGE, line=b"GET " + MCP)
    assert (seen.answer.body, seen.answer.field(b"access-control-allow-origin")) == (b"id: 1\ndata:\n\n", PAGE)


# -- who has no key -----------------------------------------------------------------------------------------------

ISSUED = {"mcp": {"authorization_servers": ["https://login.example.com"]}}
WELL_KNOWN = b"/.well-known/oauth-protected-resource"


async def challenge(gateway: Gateway, *fields: bytes, target: bytes = MCP) -> bytes | None:
    answer = await refused(gateway, *fields, line=b"POST " + target, key=b"")
    assert answer.status == 401
    return answer.field(b"www-authenticate")


@pytest.mark.parametrize(
    ("tree", "target", "url"),
    [
        ({}, MCP, b"http://gw" + WELL_KNOWN + MCP),
        ({}, MCP + b"/sse?x=1", b"http://gw" + WELL_KNOWN + MCP),
        ({}, MCP + b"?x=1", b"http://gw" + WELL_KNOWN + MCP),
        ({}, PREFIX + b"/upstreams/tools", b"http://gw" + WELL_KNOWN),
        ({"server": {"public_url": "https://pub.example/gpu/"}}, MCP, b"https://pub.example/gpu" + WELL_KNOWN + MCP),
    ],
    ids=range(5),
)
async def test_a_client_without_a_key_is_told_where_to_get_one(
    serve: Serve, tree: dict[str, Any], target: bytes, url: bytes
) -> None:
    gateway = await serve(**ISSUED, **tree)
    assert await challenge(gateway, target=target) == b'Bearer resource_metadata="' + url + b'"'


async def test_a_trusted_proxy_says_how_the_client_calls(serve: Serve) -> None:
    told = b"X-Forwarded-Proto: https, http", b"X-Forwarded-Host: pub.example:8443"
    gateway = await serve(**ISSUED, server={"trusted_proxies": ["127.0.0.1"]})
    expected = b'Bearer resource_metadata="https://pub.example:8443' + WELL_KNOWN + MCP + b'"'
    assert await challenge(gateway, *told) == expected
    assert await challenge(gateway, told[0], b'X-Forwarded-Host: a"b') == expected.replace(b"pub.example:8443", b"gw")


async def test_anybody_else_cannot_say_that(serve: Serve) -> None:
    gateway = await serve(**ISSUED)
    told = b"X-Forwarded-Proto: https", b"X-Forwarded-Host: evil.org"
    assert b"evil" not in (await challenge(gateway, *told) or b"")


async def test_without_authorization_servers_nobody_is_sent_looking(gateway: Gateway) -> None:
    assert await challenge(gateway) == b"Bearer"


async def test_other_protocols_name_no_metadata(serve: Serve) -> None:
    gateway = await serve(**ISSUED)
    assert await challenge(gateway, target=PREFIX + b"/v1/embeddings") == b"Bearer"
    assert await challenge(gateway, target=PREFIX + b"/upstreams/raw") == b"Bearer"


async def test_addresses_and_redirects_keep_the_path_before_the_gateway(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair, server={"public_url": "https://pub.example/gpu"})
    answer = result(b"Location: /mcp/", status=b"307 Temporary Redirect")
    assert (await call(gateway, pair[0], answer)).answer.field(b"location") == b"/gpu" + MCP + b"/"
