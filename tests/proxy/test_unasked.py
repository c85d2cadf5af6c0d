"""An upstream that refuses to be asked for usage gets the call again without, and is not asked for an hour."""

import gzip
from typing import Any

import pytest

from gpuproxy.proxy.unasked import REFUSAL_BYTES_MAX, REMEMBERED_S

from .conftest import Serve
from .harness import CHAT, OK, OK_SENT, OK_SENT_AGAIN, Gateway, request
from .test_asked_usage import ASKING, BODY, DONE, END, STREAM, TOKEN, USAGE
from .wire import Listener, Wire

NAMED = b'{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"]}]}'


def answer(body: bytes, status: bytes = b"422 Unprocessable Entity", kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def ask(gateway: Gateway, body: bytes = BODY, id: bytes = b"t1") -> Wire:
    return await gateway.ask(request(b"POST " + CHAT, body=body, id=id))


async def take(upstream: Wire, body: bytes) -> bytes:
    head = await upstream.read_head()
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head
    await upstream.expect(body)
    return head


@pytest.fixture
async def gateway(serve: Serve) -> Gateway:
    return await serve(llm={"include_usage": True})


REFUSALS = [
    NAMED,
    b'{"error":{"message":"Unrecognized request argument supplied: stream_options"}}',
    b'{"message":"extraneous key [include_usage] is not permitted"}',
    b'{"error":"Unknown name \\"streamOptions\\": Cannot find field."}',
    b'{"message":"Extra inputs are not permitted"}',
    b"Additional properties are not allowed",
    b'{"message":"Stream options are not supported by this model"}',
]


@pytest.mark.parametrize("status", [b"400 Bad Request", b"422 Unprocessable Entity"], ids=["400", "422"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=range(len(REFUSALS)))
async def test_a_refused_question_is_taken_back_and_the_client_sees_nothing_of_it(
    gateway: Gateway, refusal: bytes, status: bytes
) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(refusal, status))
    assert await take(upstream, BODY), "on the same connection, as the client wrote it"
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.attempts, receipt.upstream) == (200, "ok", 2, "llm")
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "llm"]
    assert (replica.begun_count, replica.ended_count, replica.failure_count) == (2, 2, 0)


async def test_a_compressed_refusal_is_one_too(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(gzip.compress(NAMED), kind=b"application/json\r\nContent-Encoding: gzip"))
    await take(upstream, BODY)
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert (await gateway.receipt()).attempts == 2


@pytest.mark.parametrize("closes", [False, True])
async def test_a_refusal_that_comes_in_pieces_is_one_too(gateway: Gateway, closes: bool) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    whole = answer(NAMED)
    if closes:
        whole = b"HTTP/1.1 422 No\r\nConnection: close\r\n\r\n" + NAMED
    for at in range(0, len(whole), 40):
        await upstream.send(whole[at : at + 40])
        await gateway.turn()
    assert client.is_silent()
    if closes:
        upstream.close()
        upstream = await gateway.llm.accept()
    await take(upstream, BODY)
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)


async def test_the_upstream_is_not_asked_again_for_an_hour(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(NAMED))
    for number in range(3):
        await take(upstream, BODY)
        await upstream.send(STREAM + chunk(TOKEN) + chunk(TOKEN) + chunk(END) + chunk(DONE) + b"0\r\n\r\n")
        told = await client.answer()
        assert told.body == TOKEN + TOKEN + END + DONE
        assert told.field(b"x-gpuproxy-attempts") == (b"2" if number == 0 else None)
        await client.send(request(b"POST " + CHAT, body=BODY, id=b"n%d" % number))
    assert {(each.usage_source, each.output_tokens) for each in gateway.receipts()} == {("estimated", 1)}
    await take(upstream, BODY)
    await upstream.send(OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
    assert (await client.answer()).status == 200
    gateway.plane.take_router(gateway.plane.build_router(gateway.config))
    assert not gateway.plane.router.models["m"].may_ask_usage, "new routes do not forget it"
    gateway.passes(REMEMBERED_S)
    client = await ask(gateway, id=b"t2")
    await take(await gateway.llm.accept(), ASKING)
    client.close()


OTHERS: dict[str, bytes] = {
    "another fault": answer(b'{"error":"max_tokens must be positive"}', b"400 Bad Request"),
    "named with another status": answer(NAMED, b"404 Not Found"),
    "named by an error of the server": answer(NAMED, b"500 No"),
    "encoded": b"HTTP/1.1 422 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(NAMED), NAMED),
    "empty": answer(b"", b"400 Bad Request"),
}


@pytest.mark.parametrize("told", OTHERS.values(), ids=OTHERS)
async def test_any_other_refusal_passes_as_it_is(gateway: Gateway, told: bytes) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(told)
    found = await client.answer()
    head, _, body = told.partition(b"\r\n\r\n")
    assert (found.status, found.body) == (int(head[9:12]), body)
    assert found.field(b"x-gpuproxy-attempts") is None
    await gateway.turn()
    assert upstream.is_silent()
    assert (await gateway.receipt()).attempts == 1


async def test_a_long_refusal_is_passed_on_as_it_comes(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    size = REFUSAL_BYTES_MAX + 1
    await upstream.send(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\nabc" % size)
    assert (await client.read_head()).startswith(b"HTTP/1.1 400 ")
    await client.expect(b"abc")
    await upstream.send(b"x" * (size - 3))
    assert await client.read(size - 3) == b"x" * (size - 3)


async def test_what_has_grown_too_long_without_saying_so_is_passed_on_whole(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"a" * 40_000))
    await gateway.turn()
    assert client.is_silent()
    await upstream.send(chunk(b"b" * 40_000) + b"0\r\n\r\n")
    assert (await client.answer()).body == b"a" * 40_000 + b"b" * 40_000


async def test_a_call_that_is_bad_anyway_teaches_nothing(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(b'{"detail":"no messages","input":' + ASKING + b"}"))
    await take(upstream, BODY)
    second = answer(b'{"detail":"no messages","input":' + BODY + b"}")
    await upstream.send(second)
    assert (await client.answer()).body == second.partition(b"\r\n\r\n")[2]
    assert gateway.plane.router.models["m"].may_ask_usage
    assert (await gateway.receipt()).status == 422


async def test_a_question_of_the_clients_own_is_refused_to_its_face(gateway: Gateway) -> None:
    client = await ask(gateway, ASKING)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(NAMED))
    assert (await client.answer()).body == NAMED
    assert (await gateway.receipt()).attempts == 1


async def test_a_client_that_leaves_meanwhile_is_one_receipt(gateway: Gateway) -> None:
    client = await ask(gateway)
    upstream = await gateway.llm.accept()
    await take(upstream, ASKING)
    await upstream.send(answer(NAMED))
    await take(upstream, BODY)
    client.close()
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.attempts) == ("client_gone", 2)


async def test_of_two_upstreams_only_the_one_that_refuses_is_spared(
    serve: Serve, pair: tuple[Listener, Listener]
) -> None:
    blocks: list[Any] = [
        {"name": name, "protocol": "openinference", "urls": [each.url], "models": ["two"]}
        for name, each in zip("ab", pair, strict=True)
    ]
    gateway = await serve(upstreams=blocks)
    body, asking = BODY.replace(b'"m"', b'"two"'), ASKING.replace(b'"m"', b'"two"')
    client = await ask(gateway, body)
    first, second = await pair[0].accept(), None
    await take(first, asking)
    await first.send(answer(NAMED))
    await take(first, body)
    await first.send(OK)
    await client.expect(OK_SENT_AGAIN)
    for number in range(4):
        await client.send(request(b"POST " + CHAT, body=body, id=b"t1"))
        if number % 2 == 0:
            second = second or await pair[1].accept()
            await take(second, asking)
            await second.send(STREAM + chunk(END) + chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n")
            assert (await client.answer()).body == END + DONE
        else:
            await take(first, body)
            await first.send(OK)
            await client.expect(OK_SENT)


async def test_one_that_must_not_be_asked_stands_beside_one_that_may(
    serve: Serve, pair: tuple[Listener, Listener]
) -> None:
    blocks: list[Any] = [
        {"name": name, "protocol": "openinference", "urls": [each.url], "models": ["two"], "include_usage": name == "b"}
        for name, each in zip("ab", pair, strict=True)
    ]
    gateway = await serve(upstreams=blocks)
    body, asking = BODY.replace(b'"m"', b'"two"'), ASKING.replace(b'"m"', b'"two"')
    client = await ask(gateway, body)
    upstream = await pair[0].accept()
    await take(upstream, body)
    await upstream.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
    upstream = await pair[1].accept()
    await take(upstream, asking)
    await upstream.send(STREAM + chunk(END) + chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n")
    assert (await client.answer()).body == END + DONE
    assert (await gateway.receipt()).output_tokens == 2


async def test_a_model_with_another_name_there_keeps_it(serve: Serve, pair: tuple[Listener, Listener]) -> None:
    upstream_block = {"name": "a", "protocol": "openinference", "urls": [pair[0].url]}
    model = {"name": "m1", "targets": [{"upstream": "a", "as": "there", "concurrency_max": 2}]}
    gateway = await serve(upstreams=[upstream_block], models=[model])
    client = await ask(gateway, BODY.replace(b'"m"', b'"m1"'))
    upstream = await pair[0].accept()
    await take(upstream, ASKING.replace(b'"m"', b'"there"'))
    await upstream.send(answer(NAMED))
    await take(upstream, BODY.replace(b'"m"', b'"there"'))
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert gateway.plane.router.models["m1"].endpoints[0].replica.open_count == 0  # type: ignore[union-attr]
