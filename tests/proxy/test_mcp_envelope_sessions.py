"""Envelopes to MCP servers that know sessions only: the gateway begins one for the call, and ends it."""

import json
from typing import Any

import pytest

from gpuproxy.proxy.route import ENVELOPE

from .conftest import Serve
from .harness import PREFIX, Gateway, request
from .wire import Listener, Wire

CALL = {"method": "tools/call", "params": {"name": "search", "arguments": {"q": 1}}, "id": 7}
RESULT = {"jsonrpc": "2.0", "id": 7, "result": {"content": [], "isError": False}}
NO_SESSION = {"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": "Mcp-Session-Id header is required"}}
AGREED = {"jsonrpc": "2.0", "id": 0, "result": {"protocolVersion": "2025-06-18", "capabilities": {}}}
SESSION = b"Mcp-Session-Id: s1\r\n"
STEPS = (NO_SESSION, b"400 No"), (AGREED, b"200 OK"), (None, b"202 Accepted"), (RESULT, b"200 OK")


def enveloped(gateway: Gateway, body: object = CALL, **says: Any) -> bytes:
    envelope = {"protocol": "mcp", "target_url": f"http://127.0.0.1:{gateway.tools.port}/mcp", "body": body, **says}
    return request(b"POST " + PREFIX, body=json.dumps(envelope).encode())


async def got(wire: Wire) -> tuple[bytes, dict[bytes, bytes], Any]:
    """Return the next request's line, its fields by lower-case name, and its message."""
    line, *lines = (await wire.read_head())[:-4].split(b"\r\n")
    fields = {name.lower(): value for name, _, value in (each.partition(b": ") for each in lines)}
    size = int(fields.get(b"content-length", b"0"))
    while len(wire.held) < size:
        assert await wire.receive()
    body, wire.held = bytes(wire.held[:size]), wire.held[size:]
    return line.partition(b" HTTP")[0], fields, json.loads(body) if body else None


async def say(
    wire: Wire, message: object, status: bytes = b"200 OK", fields: bytes = b"", is_stream: bool = False
) -> None:
    body = json.dumps(message).encode() if message else b""
    kind = b"application/json"
    if is_stream:
        kind, body = b"text/event-stream", b"id: 1\ndata:\n\nevent: message\ndata: %b\n\n" % body
    head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n" % (status, kind, fields, len(body))
    await wire.send(head + body)


@pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
async def test_a_server_of_sessions_is_called_within_one(gateway: Gateway, is_stream: bool) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    _, fields, _ = await got(wire)
    assert fields[b"mcp-protocol-version"] == b"2026-07-28"
    await say(wire, NO_SESSION, b"400 Bad Request")

    line, fields, message = await got(wire)
    assert (line, message["method"], message["params"]["protocolVersion"]) == (b"POST /mcp", "initialize", "2025-11-25")
    assert not fields.keys() & {b"mcp-protocol-version", b"mcp-method", b"mcp-name", b"mcp-session-id"}
    assert fields[b"accept"] == b"application/json, text/event-stream"
    await say(wire, AGREED, fields=SESSION, is_stream=is_stream)

    _, fields, message = await got(wire)
    assert message == {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert (fields[b"mcp-session-id"], fields[b"mcp-protocol-version"]) == (b"s1", b"2025-06-18")
    await say(wire, None, b"202 Accepted")

    _, fields, message = await got(wire)
    assert message == {"jsonrpc": "2.0", **CALL}
    assert (fields[b"mcp-session-id"], fields[b"mcp-protocol-version"]) == (b"s1", b"2025-06-18")
    assert b"mcp-name" not in fields
    await say(wire, RESULT, is_stream=is_stream)

    answer = (await client.answer()).json()
    assert (answer["status_code"], answer["data"]) == (200, RESULT)
    line, fields, message = await got(wire)
    assert (line, message, fields[b"connection"]) == (b"DELETE /mcp", None, b"close")
    assert (fields[b"mcp-session-id"], fields[b"mcp-protocol-version"]) == (b"s1", b"2025-06-18")
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.attempts, receipt.rpc_name, receipt.rpc_outcome) == ("ok", 1, "search", "ok")


async def test_the_next_call_is_not_mixed_with_the_farewell(gateway: Gateway) -> None:
    for number in (1, 2):
        client = await gateway.ask(enveloped(gateway))
        wire = await gateway.tools.accept()
        for answer, status in (
            (NO_SESSION, b"400 No"),
            (AGREED, b"200 OK"),
            (None, b"202 Accepted"),
            (RESULT, b"200 OK"),
        ):
            await got(wire)
            await say(wire, answer, status, SESSION if answer is AGREED else b"")
        assert (await client.answer()).json()["data"] == RESULT
        assert (await got(wire))[0] == b"DELETE /mcp"
        await gateway.receipt(number)


async def test_each_step_may_come_by_a_connection_of_its_own(serve: Serve, pair: tuple[Listener, Listener]) -> None:
    gateway = await serve(tools={"urls": [each.url + "/mcp" for each in pair]})
    envelope = {"protocol": "mcp", "target_url": pair[0].url + "/mcp", "body": CALL}
    client = await gateway.ask(request(b"POST " + PREFIX, body=json.dumps(envelope).encode()))
    for answer, status in STEPS:
        wire = await pair[0].accept()
        await got(wire)
        await say(wire, answer, status, b"Connection: close\r\n" + (SESSION if answer is AGREED else b""))
        wire.close()
    assert (await client.answer()).json()["data"] == RESULT
    assert pair[1].is_untouched()


async def test_a_server_without_sessions_is_called_at_once(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    for answer, status in ((NO_SESSION, b"404 Not Found"), (AGREED, b"200 OK"), (RESULT, b"200 OK")):
        _, _, message = await got(wire)
        await say(wire, answer, status)
    assert message == {"jsonrpc": "2.0", **CALL}
    assert (await client.answer()).json()["data"] == RESULT
    assert await gateway.sent_to(gateway.tools) == b"", "there is no session to end"


@pytest.mark.parametrize(
    ("code", "status"),
    [(-32601, b"404 Not Found"), (-32602, b"400 Bad Request"), (-32022, b"400 Bad Request"), (-32000, b"401 No")],
)
async def test_a_server_that_has_understood_is_not_asked_again(gateway: Gateway, code: int, status: bytes) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    await got(wire)
    await say(wire, {"jsonrpc": "2.0", "id": 7, "error": {"code": code, "message": "no"}}, status)
    answer = (await client.answer()).json()
    assert (answer["status_code"], answer["data"]["error"]["code"]) == (int(status[:3]), code)


@pytest.mark.parametrize(
    "says",
    [
        {"headers": {"MCP-Protocol-Version": "2025-11-25"}},
        {"headers": {"Mcp-Session-Id": "x"}},
        {"body": {"method": "notifications/cancelled"}},
        {"body": {"method": "tools/list", "id": None}},
        {"body": {"id": 1, "method": "initialize", "params": {}}},
        {"stream": True},
    ],
    ids=["version", "session", "notification", "no-id", "initialize", "stream"],
)
async def test_who_knows_what_to_say_is_not_helped(gateway: Gateway, says: dict[str, Any]) -> None:
    client = await gateway.ask(enveloped(gateway, **says))
    wire = await gateway.tools.accept()
    await got(wire)
    await say(wire, NO_SESSION, b"400 Bad Request")
    answer = await client.answer()
    assert (answer.json() if says.get("stream") else answer.json()["data"]) == NO_SESSION


async def test_what_is_no_mcp_server_is_told_as_it_is(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    for _ in range(2):
        await got(wire)
        await say(wire, {"detail": "Not Found"}, b"404 Not Found")
    answer = (await client.answer()).json()
    assert (answer["status_code"], answer["data"]) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("version", [None, 5, "2025-06-18\r\nX: y", "", "new"])
async def test_what_is_no_revision_is_not_agreed_on(gateway: Gateway, version: object) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    agreed = AGREED | {"result": {"protocolVersion": version}}
    for answer, status in ((NO_SESSION, b"400 Bad Request"), (agreed, b"200 OK")):
        await got(wire)
        await say(wire, answer, status, SESSION)
    assert (await client.answer()).json()["data"] == agreed
    assert await gateway.sent_to(gateway.tools) == b""


async def test_a_key_bound_to_tools_sees_its_own_there_too(gateway: Gateway) -> None:
    key = gateway.keys.add(tools=("tools/search",))
    await gateway.warm(key)
    envelope = {"protocol": "mcp", "target_url": f"http://127.0.0.1:{gateway.tools.port}/mcp"}
    body = json.dumps(envelope | {"body": {"method": "tools/list"}}).encode()
    client = await gateway.ask(request(b"POST " + PREFIX, body=body, key=key))
    wire = await gateway.tools.accept()
    tools = [{"name": "search"}, {"name": "delete"}]
    for answer, status in (*STEPS[:3], ({"jsonrpc": "2.0", "id": 7, "result": {"tools": tools}}, b"200 OK")):
        await got(wire)
        await say(wire, answer, status, SESSION if answer is AGREED else b"")
    assert (await client.answer()).json()["data"]["result"]["tools"] == tools[:1]


async def test_a_client_that_leaves_within_is_a_client_that_left(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    await got(wire)
    await say(wire, NO_SESSION, b"400 Bad Request")
    await got(wire)
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.rpc_outcome) == ("client_gone", ""), "the tool was not called yet"


async def test_a_client_that_leaves_at_the_end_has_called_the_tool(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway))
    wire = await gateway.tools.accept()
    for message, status in STEPS[:3]:
        await got(wire)
        await say(wire, message, status, SESSION if message is AGREED else b"")
    await got(wire)
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.rpc_outcome) == ("client_gone", "cancelled")


async def test_the_time_of_an_envelope_is_for_all_of_it(gateway: Gateway) -> None:
    client = await gateway.ask(enveloped(gateway, timeout_s=30))
    wire = await gateway.tools.accept()
    await got(wire)
    (exchange,) = [each for each in gateway.started if each.route.kind == ENVELOPE]
    assert exchange._collected is not None
    exchange._collected._give_up_ns -= 20 * 10**9  # so much later is it
    await say(wire, NO_SESSION, b"400 Bad Request")
    await got(wire)
    assert exchange.downstream.deadline_s - gateway.plane.now_s <= 10
    await say(wire, {"detail": "x"}, b"404 Not Found")
    await client.answer()
