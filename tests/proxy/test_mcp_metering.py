"""MCP calls in a worker: what their receipts say, and what calls of tools with a price reserve and cost."""

import json

import msgspec
import pytest

from gpuproxy.ledger.batch import priced
from gpuproxy.ledger.open_calls import Notes
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.types import Receipt

from .conftest import Serve
from .harness import PREFIX, Gateway, request
from .test_credit import Bank, _back, _open

TOOLS = PREFIX + b"/mcp/tools"
MODERN = (b"MCP-Protocol-Version: 2026-07-28", b"Mcp-Method: tools/call", b"Mcp-Name: search")
CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{}}}'
OK = b'{"jsonrpc":"2.0","id":1,"result":{"content":[],"isError":false}}'
FAILED = b'{"jsonrpc":"2.0","id":1,"result":{"content":[],"isError":true}}'
SEARCH = Price("", "tools", request_nanousd=100, tool="search")
ASKING = b'{"jsonrpc":"2.0","id":1,"result":{"resultType":"input_required","inputRequests":{},"requestState":"s"}}'
UNKNOWN = b'{"jsonrpc":"2.0","id":1,"error":{"code":-32602,"message":"Unknown tool"}}'


def json_answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def exchange(gateway: Gateway, answer: bytes, *fields: bytes, body: bytes = CALL) -> tuple[bytes, Receipt]:
    """Make one call; return what the upstream got as body, and the receipt."""
    client = await gateway.ask(request(b"POST " + TOOLS, *fields, body=body))
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(answer)
    await client.answer()
    return body, await gateway.receipt()


def told(receipt: Receipt) -> tuple[str, str, str]:
    return receipt.rpc_method, receipt.rpc_name, receipt.rpc_outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(OK, "ok"), (FAILED, "tool_error"), (UNKNOWN, "jsonrpc_error:-32602")],
    ids=["ok", "tool-error", "rpc-error"],
)
@pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("fields", [(), MODERN], ids=["legacy", "modern"])
async def test_the_receipt_tells_the_tool_and_what_became_of_it(
    serve: Serve, answer: bytes, outcome: str, is_stream: bool, fields: tuple[bytes, ...]
) -> None:
    gateway = await serve()
    event = b"event: message\ndata: " + answer + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)
    _, receipt = await exchange(gateway, head + event if is_stream else json_answer(answer), *fields)
    assert told(receipt) == ("tools/call", "search", outcome)


async def test_a_modern_body_is_streamed_by_what_its_head_says(serve: Serve) -> None:
    gateway = await serve()
    half = len(CALL) // 2
    head = request(b"POST " + TOOLS, *MODERN, b"Content-Length: %d" % len(CALL))
    client = await gateway.ask(head + CALL[:half])
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.expect(CALL[:half])
    await client.send(CALL[half:])
    await upstream.expect(CALL[half:])
    await upstream.send(json_answer(OK))
    await client.answer()
    assert told(await gateway.receipt()) == ("tools/call", "search", "ok")


async def test_a_client_that_has_its_response_and_leaves_was_served(serve: Serve) -> None:
    gateway = await serve()
    client = await gateway.ask(request(b"POST " + TOOLS, body=CALL))
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.expect(CALL)
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    event = b"data: " + OK + b"\n\n"
    await upstream.send(b"%x\r\n%b\r\n" % (len(event), event))
    await client.read_head()
    await client.expect(b"%x\r\n%b\r\n" % (len(event), event))
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.rpc_outcome) == ("ok", "ok")


async def test_where_the_tool_matters_headers_that_belie_the_body_go_nowhere(serve: Serve) -> None:
    gateway, _ = await _open(serve, 1_000, SEARCH)
    body = CALL.replace(b"search", b"forbidden")
    client = await gateway.ask(request(b"POST " + TOOLS, *MODERN, body=body))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"], answer.json()["id"]) == (400, -32020, 1)
    assert await gateway.sent_to(gateway.tools) == b""
    assert (await gateway.receipt()).outcome == "refused"


async def test_an_envelope_tells_the_same(serve: Serve) -> None:
    gateway = await serve()
    envelope = {"protocol": "mcp", "target_url": f"http://127.0.0.1:{gateway.tools.port}/mcp", "body": json.loads(CALL)}
    client = await gateway.ask(request(b"POST " + PREFIX, body=json.dumps(envelope).encode()))
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.send(json_answer(FAILED))
    assert (await client.answer()).status == 200
    assert told(await gateway.receipt()) == ("tools/call", "search", "tool_error")


# -- prices -----------------------------------------------------------------------------------------------------


async def settled(gateway: Gateway, bank: Bank, answer: bytes, body: bytes = CALL) -> int:
    """Make one call; return what it cost, once the ledger's rule says the same."""
    before = bank.rest
    _, receipt = await exchange(gateway, answer, body=body)
    catalogue = Catalogue(gateway.link_server.prices)
    (cost,) = priced(catalogue, [("w", [msgspec.structs.astuple(receipt)])], {}, Notes()).costs
    await _back(gateway, bank, before - cost)
    return cost


@pytest.mark.parametrize(
    ("answer", "cost"),
    [(OK, 100), (FAILED, 100), (UNKNOWN, 0), (ASKING, 0)],
    ids=["ok", "tool-error", "rpc-error", "asking"],
)
async def test_a_tool_that_ran_costs_its_price_and_one_that_could_not_costs_nothing(
    serve: Serve, answer: bytes, cost: int
) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH)
    assert await settled(gateway, bank, json_answer(answer)) == cost


async def left(gateway: Gateway, bank: Bank, body: bytes = CALL, answer: bytes = b"") -> tuple[str, int]:
    """Make a call and leave when the upstream has it, or its answer's begin; return the outcome and the cost."""
    before = bank.rest
    client = await gateway.ask(request(b"POST " + TOOLS, body=body))
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.expect(body)
    if answer:
        await upstream.send(answer)
        await client.read_head()
    client.close()
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert receipt.outcome == "client_gone"
    catalogue = Catalogue(gateway.link_server.prices)
    (cost,) = priced(catalogue, [("w", [msgspec.structs.astuple(receipt)])], {}, Notes()).costs
    await _back(gateway, bank, before - cost)
    return receipt.rpc_outcome, cost


@pytest.mark.parametrize(
    ("answer", "outcome", "cost"),
    [
        (b"", "cancelled", 100),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", "", 100),
        (b"HTTP/1.1 500 No\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n", "", 0),
    ],
    ids=["no-answer", "begun", "failing"],
)
async def test_a_tool_whose_client_leaves_is_paid_whether_its_answer_has_begun_or_not(
    serve: Serve, answer: bytes, outcome: str, cost: int
) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH)
    assert await left(gateway, bank, answer=answer) == (outcome, cost)


async def test_what_calls_no_tool_is_not_paid_when_its_client_leaves_before_the_answer(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH, Price("*", request_nanousd=7))
    assert await left(gateway, bank, b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}') == ("", 0)


async def test_a_tool_that_was_not_called_yet_is_not_paid_when_its_client_leaves(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH)
    client = await gateway.ask(request(b"POST " + TOOLS, b"Content-Length: %d" % len(CALL)) + CALL[:-1])
    await gateway.turn()
    client.close()
    assert (await gateway.receipt()).rpc_outcome == ""
    assert gateway.tools.is_untouched()
    assert bank.rest == 1_000


async def test_other_tools_and_methods_are_free(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH)
    assert await settled(gateway, bank, json_answer(OK), CALL.replace(b"search", b"fetch")) == 0


async def test_without_credit_a_tool_is_not_called(serve: Serve) -> None:
    gateway, _ = await _open(serve, 99, SEARCH)
    client = await gateway.ask(request(b"POST " + TOOLS, body=CALL))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["data"]["code"]) == (402, "INSUFFICIENT_CREDITS")
    assert answer.json()["error"]["message"].endswith("; add credit"), "a tool knows no max_tokens"
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()


async def test_the_price_of_a_tool_beats_that_of_every_model(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH, Price("*", request_nanousd=7))
    assert await settled(gateway, bank, json_answer(OK)) == 100


async def test_every_call_that_is_no_tool_costs_what_every_model_costs(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH, Price("*", request_nanousd=7))
    listing = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
    assert await settled(gateway, bank, json_answer(OK), listing) == 7


@pytest.mark.parametrize("others", [b"", b"," + CALL.replace(b"search", b"x")], ids=["of-one", "of-two"])
async def test_a_batch_with_a_priced_tool_is_refused(serve: Serve, others: bytes) -> None:
    gateway, _ = await _open(serve, 1_000, SEARCH)
    client = await gateway.ask(request(b"POST " + TOOLS, body=b"[%b%b]" % (CALL, others)))
    assert (await client.answer()).status == 400
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()


@pytest.mark.parametrize("limit", [{"tpm": 100_000}, {"rpm": 100}], ids=["tokens", "requests"])
async def test_it_is_refused_too_when_control_was_asked_about_a_limit_before(
    serve: Serve, limit: dict[str, int]
) -> None:
    gateway, _ = await _open(serve, 1_000_000, SEARCH)
    key = gateway.keys.add(**limit)
    client = await gateway.ask(request(b"POST " + TOOLS, body=b"[%b]" % CALL, key=key))
    assert (await client.answer()).status == 400
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()


async def test_while_tools_have_prices_no_head_is_believed_about_the_tool(serve: Serve) -> None:
    gateway, _ = await _open(serve, 1_000, SEARCH)
    head = request(b"POST " + TOOLS, *MODERN, b"Content-Length: %d" % len(CALL))
    client = await gateway.ask(head + CALL[:20])
    await gateway.turn()
    assert gateway.tools.is_untouched()
    await client.send(CALL[20:])
    upstream = await gateway.tools.accept()
    await upstream.read_head()
    await upstream.send(json_answer(OK))
    await client.answer()
    await gateway.receipt()


@pytest.mark.parametrize(
    "body",
    [
        CALL.replace(b'"name":"search"', b'"name":"search","name":"free"'),
        CALL.replace(b'"name":"search"', b'"name":"free","Name":"search"'),
        CALL.replace(b'"method":"tools/call"', b'"method":"ping","Method":"tools/call"'),
        CALL.replace(b'"method":"tools/call"', b'"method":"tools/call","method":"ping"'),
        CALL.replace(b'"params":{', b'"param\xc5\xbf":{"name":"search"},"params":{').replace(
            b'"search","arg', b'"free","arg'
        ),
        CALL.decode().encode("utf-16"),
        b"\xff" + CALL,
    ],
    ids=["twice", "letters", "method", "other-method", "folded", "utf-16", "no-json"],
)
async def test_a_message_that_may_call_a_priced_tool_in_one_way_of_reading_is_refused(
    serve: Serve, body: bytes
) -> None:
    gateway, _ = await _open(serve, 1_000, SEARCH)
    client = await gateway.ask(request(b"POST " + TOOLS, body=body))
    assert (await client.answer()).status == 400
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()


async def test_arguments_may_have_any_names(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, SEARCH)
    body = CALL.replace(b'"arguments":{}', b'"arguments":{"name":"a","Name":"b","method":"c"}')
    assert await settled(gateway, bank, json_answer(OK), body) == 100


async def test_an_upstream_with_prices_is_called_in_its_own_protocol_only(serve: Serve) -> None:
    gateway, _ = await _open(serve, 1_000, SEARCH)
    target = f"http://127.0.0.1:{gateway.tools.port}/mcp"
    envelope = {"protocol": "https", "target_url": target, "method": "POST", "body": json.loads(CALL)}
    client = await gateway.ask(request(b"POST " + PREFIX, body=json.dumps(envelope).encode()))
    assert (await client.answer()).status == 400
    assert await gateway.sent_to(gateway.tools) == b""
    await gateway.receipt()
