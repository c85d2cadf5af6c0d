"""The envelope: what goes in, what comes out spliced, what is refused, and the guard in front of its targets."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Serve
from .harness import ENVELOPE, OK, Gateway, request
from .wire import Answer, Listener


def _envelope(**says: Any) -> bytes:
    return request(b"POST " + ENVELOPE, body=json.dumps(says).encode())


def _target(gateway: Gateway, path: str = "/x") -> str:
    return f"http://127.0.0.1:{gateway.raw.port}{path}"


async def _wrapped(gateway: Gateway, answer: bytes) -> Answer:
    client = await gateway.ask(_envelope(protocol="https", target_url=_target(gateway)))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(answer)
    return await client.answer()


def _upstream_answer(body: bytes, content_type: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nX-A: 1\r\nContent-Length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


async def test_a_call_without_body_is_a_get_and_says_nothing_of_the_caller(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(
            b"POST " + ENVELOPE,
            b"X-Secret: mine",
            b"User-Agent: me",
            body=json.dumps({"protocol": "https", "target_url": _target(gateway, "/a/../b?x=%2F")}).encode(),
        )
    )
    upstream = await gateway.raw.accept()
    await upstream.expect_request(
        b"GET /a/../b?x=%%2F HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept-Encoding: identity\r\n"
        b"Via: 1.1 gpuproxy\r\nX-Request-Id: t1\r\n\r\n" % gateway.raw.port
    )
    await upstream.send(OK)
    answer = await client.answer()
    assert answer.status == 200
    assert set(answer.json()) == {"data", "encoding", "status", "status_code", "headers", "duration_ms", "request_id"}
    receipt = await gateway.receipt()
    assert (receipt.method, receipt.path, receipt.protocol) == ("POST", ENVELOPE.decode(), "https")


async def test_a_body_is_sent_as_written(gateway: Gateway) -> None:
    raw = b'{"a": 123456789012345678901234567890, "b":1.0e5,\n"c":"\\u00e9\\/"}'
    body = b'{"protocol":"https","target_url":"%b","headers":{"X-A":"1","Authorization":"Bearer theirs"},"body":%b}'
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=body % (_target(gateway).encode(), raw)))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert head.startswith(b"POST /x HTTP/1.1\r\n")
    for field in (b"X-A: 1", b"Authorization: Bearer theirs", b"Content-Type: application/json"):
        assert field + b"\r\n" in head
    assert b"Content-Length: %d\r\n" % len(raw) in head
    await upstream.expect(raw)
    await upstream.send(OK)
    await client.answer()


async def test_a_configured_upstream_gets_one_credential(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAW_KEY", "sk-upstream")
    gateway = await serve(raw={"api_key_env": "RAW_KEY"})
    await gateway.ask(
        _envelope(protocol="https", target_url=_target(gateway), headers={"authorization": "Bearer theirs", "X-A": "1"})
    )
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert head.lower().count(b"\r\nauthorization:") == 1
    assert b"\r\nAuthorization: Bearer sk-upstream\r\n" in head
    assert b"\r\nX-A: 1\r\n" in head
    await upstream.send(OK)
    await gateway.receipt()


@pytest.mark.parametrize("protocol", ["https", "openinference", "mcp"])
async def test_a_string_body_is_sent_as_text(gateway: Gateway, protocol: str) -> None:
    client = await gateway.ask(_envelope(protocol=protocol, target_url=_target(gateway), body="é {", headers={}))
    upstream = await gateway.raw.accept()
    assert b"\r\nContent-Length: 4\r\n" in await upstream.read_head()
    await upstream.expect("é {".encode())
    await upstream.send(OK)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":123456789012345678901234567890}',
        b'{ "a" : 1.0e5 ,\n\t"b":-0.0 }',
        b'"caf\\u00e9 \\/ \\ud83d\\ude00"',
        b'{"a":1,"a":2}',
        b"[]",
        b"null",
        b"0",
        '{"é":"ü"}'.encode(),
    ],
)
async def test_json_is_spliced_in_untouched(gateway: Gateway, body: bytes) -> None:
    answer = await _wrapped(gateway, _upstream_answer(body))
    assert answer.body.startswith(b'{"data":' + body + b',"status":"success","status_code":200,"headers":{')
    whole = answer.json()
    assert (whole["request_id"], whole["headers"]["x-a"], "encoding" in whole) == ("t1", "1", False)


@pytest.mark.parametrize(
    ("content_type", "body", "data", "encoding"),
    [
        (b"text/plain", b'say "hi"\n', 'say "hi"\n', None),
        (b"text/html; charset=utf-8", "é".encode(), "é", None),
        (b"application/json", b"{broken", "{broken", None),
        (b"application/problem+json", b'{"a":1}', {"a": 1}, None),
        (b"application/octet-stream", b"\0\xff", "AP8=", "base64"),
        (b"text/plain", b"\xff\xfe", "//4=", "base64"),
        (b"image/png", b"x", "eA==", "base64"),
        (b"application/json", b"", None, None),
        (b"application/json", b'{"a":1} {"b":2}', '{"a":1} {"b":2}', None),
        (b"application/json", b'{"a":NaN}', '{"a":NaN}', None),
    ],
)
async def test_other_bodies_are_text_or_base64(
    gateway: Gateway, content_type: bytes, body: bytes, data: Any, encoding: str | None
) -> None:
    whole = (await _wrapped(gateway, _upstream_answer(body, content_type))).json()
    assert (whole["data"], whole.get("encoding")) == (data, encoding)


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"404 Not Found", b"302 Found"])
async def test_the_upstreams_status_is_told_inside(gateway: Gateway, status: bytes) -> None:
    answer = await _wrapped(gateway, _upstream_answer(b'{"oops":1}', status=status))
    whole = answer.json()
    assert (answer.status, whole["status_code"], whole["data"]) == (200, int(status[:3]), {"oops": 1})


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked", b"X-None: 1"])
async def test_an_answer_to_head_is_told_and_its_body_not_waited_for(
    gateway: Gateway, framing: bytes, is_stream: bool
) -> None:
    client = await gateway.client()
    for _ in range(2):
        await client.send(_envelope(protocol="https", target_url=_target(gateway), method="HEAD", stream=is_stream))
        upstream = await gateway.raw.accept()
        assert (await upstream.read_head()).startswith(b"HEAD /x HTTP/1.1\r\n")
        await upstream.send(b"HTTP/1.1 200 OK\r\nX-A: 1\r\n" + framing + b"\r\n\r\n")
        whole = (await client.answer()).json()
        assert (whole["data"], whole["status_code"], whole["headers"]["x-a"]) == (None, 200, "1")
        assert whole["headers"].get("content-length") == ("1000" if b"Length" in framing else None)


async def test_fields_of_one_name_are_all_told(gateway: Gateway) -> None:
    answer = await _wrapped(
        gateway,
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nVary: x\r\nset-cookie: b=2\r\nContent-Length: 0\r\n\r\n",
    )
    assert answer.json()["headers"] == {"set-cookie": "a=1, b=2", "vary": "x"}


async def test_usage_is_told_and_billed(gateway: Gateway) -> None:
    usage = b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}'
    body = {"model": "m", "messages": []}
    client = await gateway.ask(
        _envelope(protocol="openinference", target_url=_target(gateway, "/v1/chat/completions"), body=body)
    )
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(_upstream_answer(usage))
    assert (await client.answer()).json()["usage"] == {"input_tokens": 5, "cached_tokens": 0, "output_tokens": 2}
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.model) == (5, 2, "m")


@pytest.mark.parametrize("says", [{"stream": True}, {"body": {"stream": True}}])
async def test_a_stream_passes_as_it_is(gateway: Gateway, says: dict[str, Any]) -> None:
    client = await gateway.ask(_envelope(protocol="https", target_url=_target(gateway), **says))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(
        b"HTTP/1.1 206 Partial\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert b"206" in (await client.read_head()).split(b"\r\n")[0]
    for _ in range(2):
        await upstream.send(b"3\r\nabc\r\n")
        await client.expect(b"3\r\nabc\r\n")
    await upstream.send(b"0\r\n\r\n")
    await client.expect(b"0\r\n\r\n")


BAD: list[tuple[bytes, str, str]] = [
    (b"", "INVALID_JSON", "JSON"),
    (b"{", "INVALID_JSON", "byte"),
    (b"[]", "INVALID_JSON", "array"),
    (b'{"protocol":"https"}', "INVALID_JSON", "target_url"),
    (b'{"protocol":"https","target_url":5}', "INVALID_JSON", "target_url"),
    (b'{"protocol":"https","target_url":"http://a","x":1}', "INVALID_JSON", "x"),
    (b'{"protocol":"https","target_url":"http://a","timeout_s":0}', "INVALID_JSON", "timeout_s"),
    (b'{"protocol":"https","target_url":"http://a","timeout_s":-1}', "INVALID_JSON", "timeout_s"),
    (b'{"protocol":"https","target_url":"http://a","timeout_s":1e9}', "INVALID_JSON", "timeout_s"),
    (b'{"protocol":"https","target_url":"http://a","method":"CONNECT"}', "BAD_REQUEST", "CONNECT"),
    (b'{"protocol":"https","target_url":"http://a","method":"GET / HTTP/1.1\\r\\nX: "}', "BAD_REQUEST", "method"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X":"a\\r\\nY: b"}}', "BAD_REQUEST", "X"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X":"a\\nb"}}', "BAD_REQUEST", "X"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X":"a\\u0000b"}}', "BAD_REQUEST", "X"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X\\r\\nY":"a"}}', "BAD_REQUEST", "Y"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X Y":"a"}}', "BAD_REQUEST", "X Y"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X_Y":"a"}}', "BAD_REQUEST", "X_Y"),
    (b'{"protocol":"https","target_url":"http://a","headers":{"":"a"}}', "BAD_REQUEST", ""),
    (b'{"protocol":"https","target_url":"http://a","headers":{"X":5}}', "INVALID_JSON", "headers"),
    (b'{"protocol":"https","target_url":"http://a/\\r\\nX: y"}', "BAD_REQUEST", "target_url"),
    (b'{"protocol":"https","target_url":"http://a/ b"}', "BAD_REQUEST", "target_url"),
    (b'{"protocol":"nope","target_url":"http://a"}', "UNKNOWN_PROTOCOL", "https, mcp, openinference"),
    (b'{"protocol":"https","target_url":"http://a","body":"\xff"}', "INVALID_JSON", "body"),
    (b"[" * 100_000, "INVALID_JSON", ""),
    (b'{"protocol":"https","target_url":"http://a","body":' + b"[" * 100_000, "INVALID_JSON", ""),
]


@pytest.mark.parametrize(("body", "code", "names"), BAD)
async def test_a_wrong_envelope_is_refused_by_name(gateway: Gateway, body: bytes, code: str, names: str) -> None:
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=body))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (400, code)
    assert names in answer.json()["error"]


@pytest.mark.parametrize(
    "name",
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "TE", "Via", "Expect", "X-Forwarded-For", "Upgrade"],
)
async def test_framing_fields_in_headers_are_not_the_callers_to_set(gateway: Gateway, name: str) -> None:
    client = await gateway.ask(
        _envelope(protocol="https", target_url=_target(gateway), headers={name: "6"}, body={"a": 1})
    )
    answered = await client.answer() if gateway.raw.is_untouched() and await _was_refused(gateway) else None
    if answered is not None:
        assert answered.status == 400
        return
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert f"\r\n{name}: 6\r\n".encode() not in head
    await upstream.expect(b'{"a": 1}')
    await upstream.send(OK)
    assert (await client.answer()).status == 200


async def _was_refused(gateway: Gateway) -> bool:
    for _ in range(20):
        await gateway.turn()
        if not gateway.raw.is_untouched():
            return False
    return bool(gateway.receipts())


# -- the guard -------------------------------------------------------------------------------------------

LOOPBACK = """
    127.0.0.1 127.1 127.0.1 127.0.0.2 127.255.255.254 0.0.0.0 0 localhost LOCALHOST localhost. ip6-localhost
    2130706433 017700000001 0x7f000001 0x7f.0.0.1 0177.0.0.1 0177.0.0.01 127.0.0.1. 127.000.000.001 0x7f.1
    0x7F.0x0.0x0.0x1 [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:1]
    [::127.0.0.1] [64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] [2001:0:7f00:1::]
    [::ffff:0:127.0.0.1] [0::1] [::0001] 00.00.00.00 0x0 4294967295 127.127.127.127 [fe80::1] [fe80::1%25lo]
    [::1%25lo] [::1]x
"""
PRIVATE = """
    10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 0xa9fea9fe 2852039166
    0251.0376.0251.0376 169.254.43518 [::ffff:169.254.169.254] [fd00:ec2::254] [fc00::1] 100.64.0.1
    100.100.100.200 192.0.0.192 198.18.0.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 192.0.2.1
    198.51.100.1 203.0.113.1 192.88.99.1 [ff02::1] [2001:db8::1] [fec0::1] [2002:a9fe:a9fe::]
    [64:ff9b::a9fe:a9fe] [64:ff9b:1::1] [100::1] [3fff::1] [5f00::1] 10.1 0xa.1
"""
ODD = [
    "user@{h}",
    "user:pw@{h}",
    "{h}@example.com",
    "example.com@{h}",
    "{h}\\@example.com",
    "example.com\\@{h}",
    "@{h}",
    "{h}#@a",
    "{h}%2e",
    "%31%32%37.0.0.1",
    "127。0。0。1",
    "①②⑦.0.0.1",
    "loc\u0430lhost",
    "ⓛocalhost",
    " {h}",
    "{h} ",
    "{h}\t",
    "\r\n{h}",
    "{h}\0",
    "[{h}]",
    "[::1",
    "::1",
    "",
    ".",
    "-{h}",
    "{h},a",
    "{h};a",
    "{h}&a",
    "{h}|a",
    "[::1]:x",
    "{h}:-1",
    "{h}:99999",
    "a:b:c",
]


def _hosts() -> Iterator[str]:
    yield from LOOPBACK.split()
    yield from PRIVATE.split()
    yield from (text.replace("{h}", "127.0.0.1") for text in ODD)


async def test_no_spelling_of_an_inner_address_is_reached(serve: Serve) -> None:
    gateway = await serve(timeouts={"dns_s": 0.5, "connect_s": 0.5})
    canary = Listener()
    spellings = [f"{scheme}://{host}" for host in _hosts() for scheme in ("http", "HtTpS")]
    spellings = [url if url.endswith("a:b:c") else f"{url}:{canary.port}/x" for url in spellings]
    more = [
        "file:///etc/passwd",
        "gopher://127.0.0.1:70/_x",
        "//127.0.0.1/x",
        "http:/127.0.0.1/x",
        "http:127.0.0.1",
        "127.0.0.1",
    ]
    try:
        client = await gateway.client()
        for url in [*spellings, *more]:
            await client.send(_envelope(protocol="https", target_url=url))
            answer = await client.answer()
            assert answer.status in (400, 403, 502, 504), (url, answer)
            assert canary.is_untouched(), url
            if answer.status == 403:
                assert answer.json()["code"] == "TARGET_FORBIDDEN"
    finally:
        canary.close()
    assert len(spellings) > 200


@pytest.mark.parametrize("url", ["http\u017f://{h}", "http://localho\u017ft", "http://{h}/\u017f", "http://{h}?\u212a"])
async def test_only_ascii_is_a_target(gateway: Gateway, url: str) -> None:
    client = await gateway.ask(_envelope(protocol="https", target_url=url.format(h=f"127.0.0.1:{gateway.raw.port}")))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (400, "BAD_REQUEST")
    assert gateway.raw.is_untouched()


async def test_the_operator_may_allow_a_network(serve: Serve) -> None:
    gateway = await serve(egress={"allow": ["127.0.0.0/8"]})
    canary = Listener()
    try:
        client = await gateway.ask(_envelope(protocol="https", target_url=f"http://127.0.0.1:{canary.port}/x"))
        upstream = await canary.accept()
        assert (await upstream.read_head()).startswith(b"GET /x HTTP/1.1\r\n")
        await upstream.send(OK)
        assert (await client.answer()).json()["status_code"] == 200
    finally:
        canary.close()


@pytest.mark.parametrize("port", [22, 25, 53, 445])
async def test_ports_of_other_protocols_are_refused(serve: Serve, port: int) -> None:
    gateway = await serve(egress={"allow": ["127.0.0.0/8"]})
    client = await gateway.ask(_envelope(protocol="https", target_url=f"http://127.0.0.1:{port}/x"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (403, "TARGET_FORBIDDEN")


async def test_another_port_of_a_configured_host_is_still_guarded(gateway: Gateway) -> None:
    client = await gateway.ask(_envelope(protocol="https", target_url=f"http://127.0.0.1:{gateway.port}/x"))
    assert (await client.answer()).status == 403


async def test_connect_to_changes_the_address_and_nothing_else(serve: Serve) -> None:
    canary = Listener()
    gateway = await serve(egress={"connect_to": {"api.example.com:80": f"127.0.0.1:{canary.port}"}})
    try:
        client = await gateway.ask(_envelope(protocol="https", target_url="http://API.example.com/x"))
        upstream = await canary.accept()
        assert b"\r\nHost: api.example.com\r\n" in await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).json()["status_code"] == 200
    finally:
        canary.close()
