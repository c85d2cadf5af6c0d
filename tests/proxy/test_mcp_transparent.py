"""What MCP clients and servers say to each other passes as it is: statuses, bodies and the fields they go by."""

import pytest

from .conftest import Serve
from .harness import PREFIX, Gateway
from .mcp_calls import MCP, Pair, call, result, two

CALL = b'{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"add"}}'
ERROR = b'{"jsonrpc":"2.0","id":2,"error":{"code":-32022,"message":"no","data":{"supported":["2025-11-25"]}}}'


@pytest.mark.parametrize(
    ("status", "body"),
    [(b"%d X" % status, ERROR) for status in (200, 400, 401, 403, 404, 405, 406, 409, 413, 415, 421, 500, 503)]
    + [(b"202 Accepted", b""), (b"400 Bad Request", b""), (b"404 Not Found", b"<p>not here</p>")],
)
async def test_a_status_and_its_body_reach_the_client(gateway: Gateway, status: bytes, body: bytes) -> None:
    seen = await call(gateway, gateway.tools, result(status=status, body=body))
    assert (seen.answer.status, seen.answer.body) == (int(status[:3]), body)


async def test_the_fields_of_an_answer_reach_the_client_each_as_often_as_it_came(gateway: Gateway) -> None:
    fields = (
        b'WWW-Authenticate: Bearer resource_metadata="https://mcp.example.com/x", scope="a b"',
        b'WWW-Authenticate: DPoP algs="ES256"',
        b"Allow: POST, GET",
        b"Retry-After: 7",
        b"Cache-Control: no-cache, no-transform",
        b"X-Accel-Buffering: no",
    )
    seen = await call(gateway, gateway.tools, result(*fields, status=b"401 Unauthorized"))
    lines = [b"%b: %b" % field for field in seen.answer.fields]
    assert [line for line in lines if line in fields] == list(fields)


async def test_the_fields_of_a_call_reach_the_server(gateway: Gateway) -> None:
    fields = {
        b"accept": b"application/json, text/event-stream",
        b"content-type": b"application/json",
        b"mcp-protocol-version": b"2026-07-28",
        b"mcp-method": b"tools/list",
        b"mcp-param-region": b"=?base64?w6k=?=",
        b"dpop": b"eyJ.x",
        b"traceparent": b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"baggage": b"a=1",
    }
    seen = await call(gateway, gateway.tools, result(), *(b"%b: %b" % each for each in fields.items()))
    assert seen.fields.items() >= fields.items()
    assert seen.fields[b"host"] == gateway.tools.url[7:].encode()


@pytest.mark.parametrize("path", [MCP, MCP + b"/", PREFIX + b"/upstreams/tools"])
async def test_a_slash_at_the_end_is_no_other_place(gateway: Gateway, path: bytes) -> None:
    seen = await call(gateway, gateway.tools, result(), line=b"POST " + path)
    assert (seen.line, seen.answer.status) == (b"POST /mcp", 200)


async def test_a_tool_is_not_called_twice_whatever_its_server_says(serve: Serve, pair: Pair) -> None:
    gateway = await two(serve, pair)
    for listener, status in zip((*pair, *pair), (b"502 No", b"503 No", b"504 No", b"429 No"), strict=True):
        seen = await call(gateway, listener, result(status=status), body=CALL)
        assert (seen.answer.status, seen.answer.field(b"x-gpuproxy-attempts")) == (int(status[:3]), None)
