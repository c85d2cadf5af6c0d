"""A key bound to tools, byte by byte: nothing it may not call goes upstream, by whatever way."""

import json
from collections.abc import Callable

import pytest

from .conftest import Serve
from .harness import PREFIX, Gateway, request
from .wire import Wire

TOOLS = PREFIX + b"/mcp/tools"
MODERN = (b"MCP-Protocol-Version: 2026-07-28", b"Mcp-Method: tools/call", b"Mcp-Name: search")
ALLOWED = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"}}'
FORBIDDEN = ALLOWED.replace(b"search", b"delete")
LISTING = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
LIST = b'{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"search"},{"name":"delete"}]}}'
LEFT = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "search"}]}}


async def bound(serve: Serve, *rules: str) -> tuple[Gateway, bytes]:
    gateway = await serve()
    key = gateway.keys.add(tools=rules or ("tools/search",))
    await gateway.warm(key)
    return gateway, key


def enveloped(body: bytes, **fields: object) -> Callable[[Gateway], tuple[bytes, tuple[bytes, ...], bytes]]:
    def made(gateway: Gateway) -> tuple[bytes, tuple[bytes, ...], bytes]:
        target = f"http://127.0.0.1:{gateway.tools.port}/mcp"
        envelope = {"protocol": "mcp", "target_url": target, "body": json.loads(body), "method": "POST", **fields}
        return PREFIX, (), json.dumps(envelope).encode()

    return made


def plain(path: bytes, body: bytes, *fields: bytes) -> Callable[[Gateway], tuple[bytes, tuple[bytes, ...], bytes]]:
    return lambda _: (path, fields, body)


@pytest.mark.parametrize(
    "made",
    [
        plain(TOOLS, FORBIDDEN),
        plain(TOOLS, b"[%b,%b]" % (ALLOWED, FORBIDDEN)),
        plain(TOOLS, FORBIDDEN, *MODERN),
        plain(PREFIX + b"/upstreams/tools", FORBIDDEN),
        plain(TOOLS + b"/below", FORBIDDEN),
        enveloped(FORBIDDEN),
        enveloped(ALLOWED, protocol="https"),
    ],
    ids=["legacy", "batch", "modern", "upstreams", "below", "envelope", "as-https"],
)
async def test_a_forbidden_call_goes_nowhere(
    serve: Serve, made: Callable[[Gateway], tuple[bytes, tuple[bytes, ...], bytes]]
) -> None:
    gateway, key = await bound(serve)
    path, fields, body = made(gateway)
    client = await gateway.ask(request(b"POST " + path, *fields, body=body, key=key))
    assert (await client.answer()).status in (400, 403)
    assert await gateway.sent_to(gateway.tools) == b""
    assert (await gateway.receipt()).outcome == "refused"


async def test_the_refusal_is_json_rpc(serve: Serve) -> None:
    gateway, key = await bound(serve)
    client = await gateway.ask(request(b"POST " + TOOLS, body=FORBIDDEN, key=key))
    answer = await client.answer()
    told = answer.json()
    assert (answer.status, told["id"], told["error"]["data"]["code"]) == (403, 1, "FORBIDDEN")
    receipt = await gateway.receipt()
    assert (receipt.rpc_method, receipt.rpc_name, receipt.rpc_outcome) == ("tools/call", "delete", "")


async def test_no_tunnel_leads_past_the_rules(serve: Serve) -> None:
    gateway, key = await bound(serve)
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x")
    client = await gateway.ask(request(b"GET " + TOOLS, *upgrade, key=key))
    assert (await client.answer()).status == 403
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()


async def served(gateway: Gateway, client: Wire, kind: bytes, body: bytes) -> bytes:
    upstream = await gateway.tools.accept()
    head = await upstream.read_head()
    told = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)
    await upstream.send(told)
    return head


async def test_an_allowed_call_passes_unchanged(serve: Serve) -> None:
    gateway, key = await bound(serve)
    client = await gateway.ask(request(b"POST " + TOOLS, body=ALLOWED, key=key))
    await served(gateway, client, b"application/json", b'{"jsonrpc":"2.0","id":1,"result":{}}')
    assert (await client.answer()).body == b'{"jsonrpc":"2.0","id":1,"result":{}}'
    assert (await gateway.receipt()).rpc_outcome == "ok"


async def test_a_list_in_json_shows_what_the_key_may_use(serve: Serve) -> None:
    gateway, key = await bound(serve)
    client = await gateway.ask(request(b"POST " + TOOLS, b"Accept-Encoding: gzip", body=LISTING, key=key))
    head = await served(gateway, client, b"application/json", LIST)
    assert b"\r\nAccept-Encoding: identity\r\n" in head
    assert (await client.answer()).json() == LEFT
    await gateway.receipt()


@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_a_list_in_a_stream_shows_what_the_key_may_use(serve: Serve, method: bytes) -> None:
    gateway, key = await bound(serve)
    body = LISTING if method == b"POST" else None
    client = await gateway.ask(request(method + b" " + TOOLS, body=body, key=key))
    await served(gateway, client, b"text/event-stream", b"id: 1\ndata: " + LIST + b"\n\n")
    answer = await client.answer()
    assert answer.body.startswith(b"id: 1\ndata: {")
    assert json.loads(answer.body[12:]) == LEFT
    await gateway.receipt()


async def test_other_keys_see_the_list_as_it_is(serve: Serve) -> None:
    gateway, _ = await bound(serve)
    client = await gateway.ask(request(b"POST " + TOOLS, body=LISTING))
    await served(gateway, client, b"application/json", LIST)
    assert (await client.answer()).body == LIST
    await gateway.receipt()


async def test_an_envelopes_list_shows_what_the_key_may_use(serve: Serve) -> None:
    gateway, key = await bound(serve)
    _, _, body = enveloped(LISTING)(gateway)
    client = await gateway.ask(request(b"POST " + PREFIX, body=body, key=key))
    await served(gateway, client, b"application/json", LIST)
    assert (await client.answer()).json()["data"] == LEFT
    await gateway.receipt()


async def test_calls_of_other_protocols_are_not_concerned(serve: Serve) -> None:
    gateway, key = await bound(serve)
    client = await gateway.ask(request(b"POST " + PREFIX + b"/upstreams/raw/x", body=b"any", key=key))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200
    await gateway.receipt()


async def test_an_enveloped_stream_shows_what_the_key_may_use(serve: Serve) -> None:
    gateway, key = await bound(serve)
    _, _, body = enveloped(LISTING, stream=True)(gateway)
    client = await gateway.ask(request(b"POST " + PREFIX, body=body, key=key))
    await served(gateway, client, b"text/event-stream", b"data: " + LIST + b"\n\n")
    assert json.loads((await client.answer()).body[6:]) == LEFT
    await gateway.receipt()


async def test_a_key_bound_to_models_calls_tools_only_if_it_is_bound_to_tools_too(serve: Serve) -> None:
    gateway = await serve()
    for rules, status in ((None, 403), (("tools/search",), 200)):
        key = gateway.keys.add(models=("m",), tools=rules)
        await gateway.warm(key)
        client = await gateway.ask(request(b"POST " + TOOLS, body=ALLOWED, key=key))
        if status == 200:
            await served(gateway, client, b"application/json", b"{}")
        assert (await client.answer()).status == status
    await gateway.receipt(2)
