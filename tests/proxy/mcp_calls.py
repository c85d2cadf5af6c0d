"""Calls of MCP clients and servers for transcripts: one server of two URLs, one connection upstream for each call."""

from typing import Any, NamedTuple

from .conftest import Serve
from .harness import KEY, PREFIX, Gateway, request
from .wire import Answer, Listener, Wire

Pair = tuple[Listener, Listener]
MCP = PREFIX + b"/mcp/tools"
INITIALIZE = b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25"}}'
LIST = b'{"jsonrpc":"2.0","id":2,"method":"tools/list"}'
SERVER_ID = b"5f2c-the-server's-own"


def result(*fields: bytes, status: bytes = b"200 OK", body: bytes = b'{"jsonrpc":"2.0","id":1,"result":{}}') -> bytes:
    """Return a server's answer, after which its connection ends."""
    head = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *fields, b"Connection: close"]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


BEGUN = result(b"Mcp-Session-Id: " + SERVER_ID)


class Seen(NamedTuple):
    """What a server and the client got."""

    line: bytes
    fields: dict[bytes, bytes]
    answer: Answer


async def two(serve: Serve, pair: Pair, path: str = "/mcp", **tree: Any) -> Gateway:
    """Start a gateway whose MCP server "tools" has two URLs."""
    return await serve(tools={"urls": [each.url + path for each in pair]}, **tree)


async def take(listener: Listener, body: bytes | None = None) -> tuple[Wire, bytes, dict[bytes, bytes]]:
    """Let a server get the next call; return its connection, the call's first line, its fields by lower-case name."""
    wire = await listener.accept()
    line, *lines = (await wire.read_head())[:-4].split(b"\r\n")
    if body:
        await wire.expect(body)
    pairs = [text.partition(b": ") for text in lines]
    return wire, line.removesuffix(b" HTTP/1.1"), {name.lower(): value for name, _, value in pairs}


async def call(
    gateway: Gateway,
    listener: Listener,
    answer: bytes,
    *fields: bytes,
    line: bytes = b"POST " + MCP,
    body: bytes | None = LIST,
    key: bytes = KEY,
    id: bytes = b"t1",
) -> Seen:
    """Let a client call, and this server answer."""
    body = None if line[:4] != b"POST" else body
    client = await gateway.ask(request(line, *fields, body=body, key=key, id=id))
    wire, got, seen = await take(listener, body)
    await wire.send(answer)
    wire.close()
    return Seen(got, seen, await client.answer(line.partition(b" ")[0]))


async def refused(gateway: Gateway, *fields: bytes, line: bytes = b"POST " + MCP, key: bytes = KEY) -> Answer:
    """Let a client call, and the gateway answer by itself."""
    client = await gateway.ask(request(line, *fields, body=LIST if line[:4] == b"POST" else None, key=key))
    return await client.answer(line.partition(b" ")[0])


async def begin(gateway: Gateway, listener: Listener, key: bytes = KEY) -> bytes:
    """Begin a session at this server and return the client's field that names it."""
    seen = await call(gateway, listener, BEGUN, body=INITIALIZE, key=key)
    text = seen.answer.field(b"mcp-session-id")
    assert text is not None
    return b"Mcp-Session-Id: " + text
