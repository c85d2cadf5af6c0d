"""What happens to the fields of a head on their way: D1 to D7, D28 and D30 of the gateway duties."""

import pytest

from .conftest import Serve
from .harness import KEY, OK, OK_SENT, PREFIX, RAW, Gateway, answered, forwarded, lines, request


async def test_a_call_is_forwarded_and_its_answer_returned(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x?a=1", b"X-Foo: bar"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x?a=1", b"X-Foo: bar", port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(OK_SENT)
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.error) == (200, "ok", "")
    assert (receipt.upstream, receipt.protocol, receipt.method) == ("raw", "https", "GET")
    assert (receipt.path, receipt.response_bytes, receipt.attempts) == (RAW.decode() + "/x", 2, 1)
    assert (receipt.user_id, receipt.key_id, receipt.request_id) == ("user", "key0", "t1")


KEPT = (
    b"x-Lower: 1",
    b"X-UPPER: 2",
    b"Accept: */*",
    b"X-Twice: b",
    b"Content-Type: text/plain",
    b"X-Twice: a",
    b"X-Empty: ",
    b"X-Latin: \xe9\xff",
    b"Range: bytes=0-1",
    b"User-Agent: me/1.0",
    b"!#$%&'*+.^`|~-09az: token",
)


async def test_unknown_fields_keep_order_spelling_and_copies(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *KEPT))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", *KEPT, port=gateway.raw.port))
    await upstream.send(b"HTTP/1.1 200 OK\r\n" + lines(*KEPT) + b"Content-Length: 0\r\n\r\n")
    await client.expect(answered(b"200 OK", *KEPT, framing=b"Content-Length: 0"))


@pytest.mark.parametrize(
    "fields",
    [
        (b"Connection: close, X-Foo", b"X-Foo: 1"),
        (b"Connection: x-foo ,  X-BAR", b"X-Foo: 1", b"x-bar: 1"),
        (b"Connection: X-Foo", b"Connection: keep-alive,,X-Bar", b"X-Foo: 1", b"X-Bar: 1", b"X-Foo: 2"),
        (b"Keep-Alive: timeout=5",),
        (b"Proxy-Connection: keep-alive",),
        (b"TE: trailers", b"Connection: TE"),
        (b"Trailer: X-Sum",),
        (b"Proxy-Authorization: Basic Zm9v",),
        (b"Proxy-Authenticate: Basic",),
        (b"Upgrade: h2c",),
        (b"Cookie: session=1",),
        (b"Idempotency-Key: 1",),
        (b"X-Rate-Limit-Override: 1000",),
        (b"X-User-Id: 7", b"x-internal-role: admin"),
        (b"X-Real-IP: 6.6.6.6", b"Forwarded: for=6.6.6.6", b"X-Forwarded-Port: 1"),
        (b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: evil"),
        (b"Connection: X-Forwarded-For, Via, Host, X-Request-Id, X-API-Key",),
    ],
)
async def test_fields_that_end_here_do_not_go_upstream(gateway: Gateway, fields: tuple[bytes, ...]) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"X-Before: 1", *fields, b"X-After: 1"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", b"X-Before: 1", b"X-After: 1", port=gateway.raw.port))
    await upstream.send(OK)
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, b"ok")


async def test_a_nominated_framing_field_still_frames_the_body(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Connection: Content-Length", body=b"abc"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"POST /x", port=gateway.raw.port, framing=b"Content-Length: 3", body=b"abc")
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize(
    "credential",
    [b"X-API-Key: ", b"Authorization: Bearer ", b"authorization: bEARER  ", b"api-key: ", b"X-Goog-Api-Key: "],
)
async def test_the_callers_credential_stays_here(gateway: Gateway, credential: bytes) -> None:
    await gateway.ask(request(b"GET " + RAW + b"/x", credential + KEY, key=b""))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert KEY not in head
    assert b"authorization" not in head.lower()
    assert b"api-key" not in head.lower()
    await upstream.send(OK)
    await gateway.receipt()


@pytest.mark.parametrize("name", [b"api-key", b"X-Goog-Api-Key"])
async def test_a_vendors_key_beside_the_callers_goes_to_the_vendor(gateway: Gateway, name: bytes) -> None:
    await gateway.ask(request(b"GET " + RAW + b"/x", name + b": theirs"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", name + b": theirs", port=gateway.raw.port))
    await upstream.send(OK)
    await gateway.receipt()


@pytest.mark.parametrize("held", ["sk-upstream", "sk-upstream\n", " sk-upstream\r\n"])
async def test_the_upstreams_own_credential_replaces_the_callers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    monkeypatch.setenv("RAW_KEY", held)  # a file may have left a newline
    gateway = await serve(raw={"api_key_env": "RAW_KEY", "headers": {"X-Team": "blue"}})
    client = await gateway.ask(
        request(b"GET " + RAW + b"/x", b"X-TEAM: red", b"Authorization: Bearer " + KEY, b"X-A: 1", key=b"")
    )
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"GET /x", b"X-Team: blue", b"Authorization: Bearer sk-upstream", b"X-A: 1", port=gateway.raw.port)
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_hop_by_hop_fields_of_an_answer_end_here(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(
        b"HTTP/1.1 200 OK\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Proxy-Authenticate: Basic\r\nTE: x\r\nTrailer: X-Sum\r\nX-Kept: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
        b"Server: up\r\nDate: now\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\nok"
    )
    await client.expect(
        answered(
            b"200 OK",
            b"X-Kept: 1",
            b"Set-Cookie: a=1",
            b"Set-Cookie: b=2",
            b"Server: up",
            b"Date: now",
            framing=b"Content-Length: 2",
            body=b"ok",
        )
    )


async def test_via_is_appended_to_what_the_way_was(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"Via: 1.0 fred", b"Via: 1.1 p.example (Apache)"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"GET /x", port=gateway.raw.port, via=b"1.0 fred, 1.1 p.example (Apache), 1.1 gpuproxy")
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_one_pass_through_this_gateway_is_no_loop(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"Via: 1.1 gpuproxy"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", port=gateway.raw.port, via=b"1.1 gpuproxy, 1.1 gpuproxy"))
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize(
    "via", [(b"Via: 1.1 gpuproxy, 1.1 x, 1.1 gpuproxy",), (b"Via: 1.1 gpuproxy", b"Via: 1.1 gpuproxy")]
)
async def test_a_request_that_goes_round_in_a_loop_is_stopped(gateway: Gateway, via: tuple[bytes, ...]) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *via))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (508, "LOOP_DETECTED")
    assert gateway.raw.is_untouched()


async def test_a_trusted_proxy_may_say_who_the_client_is(serve: Serve) -> None:
    gateway = await serve(server={"trusted_proxies": ["127.0.0.0/8"]})
    client = await gateway.ask(
        request(
            b"GET " + RAW + b"/x", b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-Proto: https", b"X-User-Id: 7", b"A: b"
        )
    )
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    fields = head.split(b"\r\n")[1:-2]
    assert b"X-Forwarded-For: 6.6.6.6, 127.0.0.1" in fields
    assert b"X-Forwarded-Proto: https" in fields
    assert b"X-Forwarded-Host: gw" in fields
    assert b"A: b" in fields
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_two_forwarded_for_lines_of_a_trusted_proxy_are_both_kept(serve: Serve) -> None:
    gateway = await serve(server={"trusted_proxies": ["127.0.0.1/32"]})
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"X-Forwarded-For: 6.6.6.6", b"x-forwarded-for: 7.7.7.7"))
    upstream = await gateway.raw.accept()
    assert b"X-Forwarded-For: 6.6.6.6, 7.7.7.7, 127.0.0.1\r\n" in await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize("host", [b"gw", b"gw:8080", b"a.example.com:1", b"[::1]:80", b"127.0.0.1"])
async def test_a_valid_host_is_replaced_by_the_upstreams(gateway: Gateway, host: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"Host: gw", b"Host: " + host))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"GET /x", port=gateway.raw.port).replace(b"Forwarded-Host: gw", b"Forwarded-Host: " + host)
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_preserve_host_sends_the_clients_host_on(serve: Serve) -> None:
    gateway = await serve(raw={"preserve_host": True})
    await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    assert (await upstream.read_head()).startswith(b"GET /x HTTP/1.1\r\nHost: gw\r\n")
    await upstream.send(OK)
    await gateway.receipt()


@pytest.mark.parametrize(
    "host",
    [
        b"a/b@c",
        b"a b",
        b"",
        b"a:b",
        b"a:",
        b"a@b",
        b"[::1",
        b"a,b",
        b"a\x80",
        b"http://a",
        b"a:123456",
        b"*",
        b"[v1.x]",
    ],
)
async def test_an_invalid_host_is_refused(gateway: Gateway, host: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"Host: gw", b"Host: " + host))
    answer = await client.answer()
    assert (answer.status, answer.field(b"connection")) == (400, b"close")
    await client.expect_end()
    assert gateway.raw.is_untouched()


@pytest.mark.parametrize("fields", [b"", b"Host: a\r\nHost: b\r\n", b"Host: a\r\nhost: a\r\n", b"Host:\r\nHost: a\r\n"])
async def test_none_or_two_hosts_are_refused(gateway: Gateway, fields: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x").replace(b"Host: gw\r\n", fields))
    assert (await client.answer()).status == 400
    await client.expect_end()
    assert gateway.raw.is_untouched()


@pytest.mark.parametrize(
    "path",
    [
        b"/a/../b/%2e%2e/c%2Fd?x=%2F",
        b"/?",
        b"/%00%ff?a&&=&;=+%20",
        b"//double//slash/",
        b"/x?y=http://z/?a#",
        b"/a;b=c,d:e@f!$&'()*+~",
        b'/[]{}|\\^`"<>',
        b"",
        b"?q=1",
    ],
)
async def test_path_and_query_stay_as_they_are(gateway: Gateway, path: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + path))
    upstream = await gateway.raw.accept()
    line = b"GET " + (path if path.startswith(b"/") else b"/" + path)
    await upstream.expect_request(forwarded(line, port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize("scheme", [b"http", b"HTTPS"])
async def test_the_authority_of_an_absolute_target_replaces_host(gateway: Gateway, scheme: bytes) -> None:
    client = await gateway.ask(request(b"GET " + scheme + b"://other:81" + RAW + b"/x?y=/"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        forwarded(b"GET /x?y=/", port=gateway.raw.port).replace(b"Host: gw", b"Host: other:81")
    )
    await upstream.send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize(
    "target",
    [
        b"ftp://gw" + RAW + b"/x",
        b"http://u:p@gw" + RAW + b"/x",
        b"http://" + RAW + b"/x",
        b"http:/x",
        b"*",
        b"x",
        b"gw:80",
        b"http://a b/",
        b"http://gw\\@evil/",
    ],
)
async def test_other_forms_of_target_are_refused(gateway: Gateway, target: bytes) -> None:
    client = await gateway.ask(request(b"OPTIONS " + target))
    assert (await client.answer()).status == 400
    await client.expect_end()
    assert gateway.raw.is_untouched()
    assert gateway.control.is_untouched()


@pytest.mark.parametrize("target", [b"http://gw", b"http://gw?x=/y", b"http://gw:80/"])
async def test_an_absolute_target_without_path_means_the_root(gateway: Gateway, target: bytes) -> None:
    client = await gateway.ask(request(b"GET " + target, key=b""))
    control = await gateway.control.accept()
    line = (await control.read_head()).split(b"\r\n")[0]
    assert line == b"GET /" + (b"?x=/y" if b"?" in target else b"") + b" HTTP/1.1"
    await control.send(OK)
    assert (await client.answer()).body == b"ok"


async def test_connection_close_ends_the_connection_after_the_answer(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"Connection: close"))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(answered(b"200 OK", framing=b"Content-Length: 2", last=b"Connection: close", body=b"ok"))
    await client.expect_end()


@pytest.mark.parametrize("asks", [b"", b"Connection: keep-alive\r\n"])
async def test_http_1_0_is_kept_alive_only_if_it_asks(gateway: Gateway, asks: bytes) -> None:
    head = (
        request(b"GET " + RAW + b"/x").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"\r\n\r\n", b"\r\n" + asks + b"\r\n")
    )
    client = await gateway.ask(head)
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", port=gateway.raw.port))
    await upstream.send(OK)
    answer = await client.answer()
    assert (answer.field(b"connection"), answer.body) == (b"keep-alive" if asks else b"close", b"ok")
    if asks:
        await client.send(head)
        await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).body == b"ok"
    else:
        await client.expect_end()


@pytest.mark.parametrize("given", [b"a" * 129, b"a b", b"caf\xe9", b""])
async def test_a_request_id_unfit_to_be_passed_on_is_replaced(gateway: Gateway, given: bytes) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"X-Request-Id: " + given, id=b""))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    await upstream.send(OK)
    own = (await client.answer()).field(b"x-request-id")
    assert own is not None
    assert own.startswith(b"req_")
    assert b"X-Request-Id: " + own + b"\r\n" in head


async def test_a_call_of_the_management_api_reaches_control_with_its_credentials(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"POST /api/v1/user/x?y", b"Cookie: s=1", b"Idempotency-Key: k", b"Expect: 100-continue", body=b"abc")
    )
    await client.expect(b"HTTP/1.1 100 Continue\r\n\r\n")
    control = await gateway.control.accept()
    head = await control.read_head()
    assert head.startswith(b"POST /api/v1/user/x?y HTTP/1.1\r\nHost: gw\r\n")
    for field in (b"Cookie: s=1", b"Idempotency-Key: k", b"X-API-Key: " + KEY, b"X-Forwarded-For: 127.0.0.1"):
        assert field + b"\r\n" in head
    await control.expect(b"abc")
    await control.send(OK)
    await client.expect(OK_SENT)
    assert gateway.receipts() == []


async def test_an_unknown_route_below_the_prefix_names_the_known_ones(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + PREFIX + b"/v7/x"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (404, "NOT_FOUND")
    assert "mcp, upstreams, v1, v2" in answer.json()["error"]
