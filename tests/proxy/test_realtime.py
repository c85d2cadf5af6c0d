"""Metered WebSockets: routed by the URL, their key read from the subprotocol, usage and credit by their events."""

import asyncio
import json
import time
from typing import Any

import pytest
from frames import frame
from gpuproxy_plugins.openinference_realtime import RealtimeReader
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.codec.websocket import close_frame
from gpuproxy.errors import GatewayError
from gpuproxy.pricing import Price
from gpuproxy.proxy import settled, websocket

from .conftest import Serve
from .harness import KEY, Gateway, request, until
from .test_credit import _back, _open
from .test_limits import Counter
from .wire import Listener, Wire

BROWSER = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key." + KEY + b", openai-beta.realtime-v1",
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: realtime\r\n\r\n"
)
PATH = b"GET /v1/realtime?model=m"
MASK = b"\x01\x02\x03\x04"
PRICE = Price("m", "", 10**6, 10**6, 2 * 10**6, 100)  # nanodollars: 1 a token of input, 2 of output, 100 a session
AHEAD = 100  # tokens set aside on the way
FIRST = 100 + AHEAD + 2 * AHEAD


def event(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


DELTA = frame(event("response.output_text.delta", delta="Hi"))


def done(input: int = 10, output: int = 4) -> bytes:
    return frame(event("response.done", response={"usage": {"input_tokens": input, "output_tokens": output}}))


async def opened(gateway: Gateway, line: bytes = PATH, fields: tuple[bytes, ...] = BROWSER) -> tuple[Wire, Wire]:
    """Open a connection and return both ends of it."""
    client = await gateway.ask(request(line, *fields, key=b""))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    return client, upstream


async def closed_with(client: Wire, code: int, names: str = "") -> None:
    """Expect a close frame and the end."""
    rest = await client.read_to_end()
    assert rest[:1] == b"\x88"
    assert int.from_bytes(rest[2:4], "big") == code
    assert names in rest[4:].decode()
    assert len(rest) == 2 + rest[1]
    client.close()


# -- the key --------------------------------------------------------------------------------------------------


async def test_a_browsers_key_is_read_and_goes_no_further(gateway: Gateway, capsys: Any) -> None:
    client = await gateway.ask(request(PATH, *BROWSER, key=b""))
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    assert head.startswith(b"GET /v1/realtime?model=m HTTP/1.1\r\n")
    assert b"Sec-WebSocket-Protocol: realtime, openai-beta.realtime-v1\r\n" in head
    assert KEY not in head
    assert b"insecure" not in head
    assert b"xtensions" not in head, "so that frames can be read"
    assert b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" in head
    await upstream.send(SWITCH)
    told = await client.answer()
    assert (told.status, told.field(b"sec-websocket-protocol")) == (101, b"realtime")
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.key_id, receipt.model, receipt.path) == ("key0", "m", "/v1/realtime")
    assert KEY.decode() not in repr(receipt) + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("protocols", "passed"),
    [
        (b"openai-insecure-api-key.%b", None),
        (b"OpenAI-Insecure-API-Key.%b,realtime", b"realtime"),
        (b"realtime ,a,openai-insecure-api-key.%b , b", b"realtime, a, b"),
    ],
)
async def test_what_else_is_in_the_field_stays(gateway: Gateway, protocols: bytes, passed: bytes | None) -> None:
    fields = (*BROWSER[:4], b"Sec-WebSocket-Protocol: " + protocols % KEY)
    client = await gateway.ask(request(PATH, *fields, key=b""))
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    found = [line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-protocol")]
    assert found == ([] if passed is None else [b"Sec-WebSocket-Protocol: " + passed])
    assert KEY not in head
    client.close()


async def test_subprotocols_without_a_key_pass_as_they_are(gateway: Gateway) -> None:
    fields = (*BROWSER[:4], b"Sec-WebSocket-Protocol: realtime ,x", b"Sec-WebSocket-Protocol: y")
    client = await gateway.ask(request(PATH, *fields))
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    assert b"Sec-WebSocket-Protocol: realtime ,x\r\n" in head
    assert b"Sec-WebSocket-Protocol: y\r\n" in head
    client.close()


@pytest.mark.parametrize("key", [b"", b"gp_wrong", KEY[:-1] + b"x"])
async def test_a_bad_key_is_a_401_before_the_upgrade(gateway: Gateway, key: bytes) -> None:
    fields = (*BROWSER[:4], b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key." + key)
    client = await gateway.ask(request(PATH, *fields, key=b""))
    assert (await client.answer()).json()["error"]["code"] == "invalid_api_key"
    assert gateway.llm.is_untouched()


async def test_two_different_keys_are_refused(gateway: Gateway) -> None:
    other = gateway.keys.add()
    client = await gateway.ask(request(PATH, *BROWSER, key=other))
    assert (await client.answer()).status == 400


@pytest.mark.parametrize(
    ("line", "says", "status"),
    [
        (b"GET /v1/realtime", {}, 400),
        (b"GET /v1/realtime?model=nope", {}, 404),
        (PATH, {"models": ("m2",)}, 403),
        (b"GET /v1/responses?model=m", {"scopes": ("account",)}, 403),
        (b"GET /v1/responses", {}, 400),
    ],
    ids=["no model", "unknown", "not allowed", "no scope", "no model, responses"],
)
async def test_what_may_not_be_is_refused_before_the_upgrade(
    gateway: Gateway, line: bytes, says: dict[str, Any], status: int
) -> None:
    key = gateway.keys.add(**says)
    client = await gateway.ask(request(line, *BROWSER[:4], key=key))
    told = await client.answer()
    assert (told.status, "error" in told.json()) == (status, True)
    assert gateway.llm.is_untouched()


# -- the way --------------------------------------------------------------------------------------------------


def two(pair: tuple[Listener, Listener], **model: Any) -> dict[str, Any]:
    names = zip("ab", pair, strict=True)
    upstreams = [{"name": name, "protocol": "openinference", "urls": [each.url]} for name, each in names]
    return {
        "upstreams": upstreams,
        "models": [{"name": "two", "targets": [{"upstream": "a"}, {"upstream": "b", "as": "b-two"}], **model}],
    }


@pytest.mark.parametrize("how", ["closed", "lost", "status"])
async def test_another_server_stands_in_before_the_upgrade(
    serve: Serve, pair: tuple[Listener, Listener], how: str
) -> None:
    gateway = await serve(**two(pair))
    if how == "closed":
        pair[0].close()
    early = frame(b"{}", key=MASK)
    client = await gateway.ask(request(b"GET /v1/realtime?model=two", *BROWSER, key=b"") + early)
    if how != "closed":
        upstream = await pair[0].accept()
        assert (await upstream.read_head()).startswith(b"GET /v1/realtime?model=two ")
        busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
        await upstream.send(busy) if how == "status" else upstream.close()
    second = await pair[1].accept()
    assert (await second.read_head()).startswith(b"GET /v1/realtime?model=b-two ")
    await second.send(SWITCH)
    assert (await client.answer()).status == 101
    await second.expect(early)
    await second.send(done())
    await client.expect(done())
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.upstream, receipt.status, receipt.attempts, receipt.output_tokens) == ("b", 101, 2, 4)


async def test_a_model_may_have_an_idle_time_of_its_own(serve: Serve, pair: tuple[Listener, Listener]) -> None:
    gateway = await serve(**two(pair, idle_s=3.0))
    client = await gateway.ask(request(b"GET /v1/realtime?model=two", *BROWSER, key=b""))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    gateway.passes(0.5)
    assert len(gateway.plane.tunnels) == 1
    gateway.passes(3)
    await client.expect_gone()
    assert (await gateway.receipt()).outcome == "ok"


async def test_a_model_may_have_a_bound_for_the_whole_session(serve: Serve, pair: tuple[Listener, Listener]) -> None:
    gateway = await serve(**two(pair, total_s=20.0))
    client = await gateway.ask(request(b"GET /v1/realtime?model=two", *BROWSER, key=b""))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    gateway.passes(20)
    await closed_with(client, 1013, "UPSTREAM_TIMEOUT: ")
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error) == ("cut", "UPSTREAM_TIMEOUT")
    assert not gateway.plane.bounded


# -- usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_usage_is_that_of_all_answers_however_their_bytes_come(gateway: Gateway, size: int) -> None:
    client, upstream = await opened(gateway)
    told = event("response.done", response={"usage": {"input_tokens": 7, "output_tokens": 3}})
    sent = DELTA + done() + frame(told[:9], is_last=False) + frame(b"", 9) + frame(told[9:], 0) + frame(b"\0" * 9, 2)
    for at in range(0, len(sent), size):
        await upstream.send(sent[at : at + size])
    await client.expect(sent)
    await client.send(frame(b'{"type":"response.create"}', key=MASK))
    await upstream.expect(frame(b'{"type":"response.create"}', key=MASK))
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (17, 7, "provider")
    assert (receipt.status, receipt.outcome, receipt.response_bytes) == (101, "ok", len(sent))
    assert receipt.is_stream


async def test_an_answer_that_is_left_is_billed_by_what_was_delivered(gateway: Gateway) -> None:
    client, upstream = await opened(gateway)
    await upstream.send(done() + DELTA * 3)
    await client.expect(done() + DELTA * 3)
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens, receipt.usage_source) == (10, 7, "estimated")


async def test_a_checkpoint_tells_bytes_and_usage(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "CHECKPOINT_NS", 0)
    client, upstream = await opened(gateway)
    await upstream.send(done())
    await client.expect(done())
    await client.send(frame(b"12345", key=MASK))
    await upstream.expect(frame(b"12345", key=MASK))
    gateway.plane.sweep()
    (noted,) = gateway.receipts()
    assert (noted.outcome, noted.output_tokens) == ("open", 4)
    assert (noted.request_bytes, noted.response_bytes) == (11, len(done()))
    client.close()


async def test_an_upstream_by_its_name_is_metered_too(gateway: Gateway) -> None:
    client, upstream = await opened(gateway, b"GET /api/v1/gpu/proxy/upstreams/llm/v1/realtime?model=other")
    await upstream.send(done())
    await client.expect(done())
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.model, receipt.upstream, receipt.output_tokens) == ("other", "llm", 4)


# -- the model ------------------------------------------------------------------------------------------------

CREATE = b'{"type":"response.create","model":"%b","input":"Hi"}'


@pytest.mark.parametrize("size", [1, 10_000])
async def test_events_of_the_client_stay_with_the_model_of_the_url(gateway: Gateway, size: int) -> None:
    client, upstream = await opened(gateway, b"GET /v1/responses?model=m")
    for kind, model in ((1, b"m"), (2, b"m")):
        good = frame(CREATE % model, kind, key=MASK)
        await client.send(good)
        await upstream.expect(good)
    bad = frame(CREATE % b"m2", key=MASK)
    for at in range(0, len(bad), size):
        await client.send(bad[at : at + size])
        await gateway.turn()
    await closed_with(client, 1008, "FORBIDDEN: this connection is for model 'm', not 'm2'")
    assert len(await upstream.read_to_end()) < len(bad), "the event never became whole"
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error) == ("cut", "FORBIDDEN")


async def test_a_model_with_another_name_there_cannot_be_named_in_events(
    serve: Serve, pair: tuple[Listener, Listener]
) -> None:
    gateway = await serve(**two(pair, targets=[{"upstream": "a", "as": "there"}]))
    client = await gateway.ask(request(b"GET /v1/responses?model=two", *BROWSER, key=b""))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["param"]) == (400, "model")
    assert "call /v1/responses by POST" in answer.json()["error"]["message"]
    assert pair[0].is_untouched()
    assert (await gateway.receipt()).outcome == "refused"


@pytest.mark.parametrize("reserved", [0, 0x40], ids=["too long", "compressed"])
async def test_what_cannot_be_checked_does_not_pass(serve: Serve, reserved: int) -> None:
    gateway = await serve(limits={"buffered_body_bytes_max": 1_048_576})
    client, upstream = await opened(gateway, b"GET /v1/responses?model=m")
    size = 100 if reserved else 1_048_577
    await client.send(frame(b" " * size, key=MASK, reserved=reserved)[:1_000])
    await closed_with(client, 1008, "cannot be checked")
    await upstream.expect_gone()


# -- credit ---------------------------------------------------------------------------------------------------


async def paid(serve: Serve, nanousd: int, **price: int) -> tuple[Gateway, Any]:
    prices = [Price("m", "", request_nanousd=2, **price)] if price else [PRICE]
    return await _open(serve, nanousd, *prices, credit={"output_tokens_default": AHEAD, "reserved_s": 0.001})


async def test_without_credit_there_is_no_upgrade(serve: Serve) -> None:
    gateway, _ = await paid(serve, FIRST - 1)
    client = await gateway.ask(request(PATH, *BROWSER, key=b""))
    assert (await client.answer()).status == 402
    assert gateway.llm.is_untouched()


async def test_as_much_is_set_aside_for_a_key_that_is_not_known_yet(serve: Serve) -> None:
    gateway, _ = await paid(serve, FIRST - 1)
    client = await gateway.ask(request(PATH, *BROWSER[:4], key=gateway.keys.add()))
    assert (await client.answer()).status == 402


async def test_a_session_sets_aside_as_it_goes_and_pays_for_what_it_used(serve: Serve) -> None:
    gateway, bank = await paid(serve, 100_000)
    client, upstream = await opened(gateway)
    for number in range(1, 6):
        await upstream.send(DELTA * 3 + done(40 * number, 30))
        await client.expect(DELTA * 3 + done(40 * number, 30))
        await until(lambda: bank.asked[-1] is not None, "the lease")
        (wallet,) = gateway.plane.credit._wallets.values()
        bill = next(iter(gateway.plane.tunnels))._bill
        assert bill is not None
        used = sum(40 * each for each in range(1, number + 1))
        assert bill.input_max >= used + 40 * number + 30, "what the next answer takes in"
        assert bill.output_max >= 30 * number + AHEAD // 2
        assert wallet.reserved == bill.reserved == 100 + bill.input_max + 2 * bill.output_max
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.input_tokens, receipt.output_tokens) == (600, 150)
    await _back(gateway, bank, 100_000 - 100 - 600 - 300)


async def test_a_session_is_cut_with_a_word_when_credit_ends(serve: Serve) -> None:
    gateway, bank = await paid(serve, FIRST + 50)
    client, upstream = await opened(gateway)
    await upstream.send(done(60, 40))
    await client.expect(done(60, 40))
    await closed_with(client, 1008, "INSUFFICIENT_CREDITS: ")
    await upstream.expect_reset()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, receipt.output_tokens) == ("cut", "INSUFFICIENT_CREDITS", 40)
    assert receipt.response_bytes == len(done(60, 40))
    await _back(gateway, bank, FIRST + 50 - 100 - 60 - 80)


def said(count: int) -> bytes:
    """Return what a client says, of so many bytes; as much is set aside for it."""
    begun = event("conversation.item.create", text="")
    return frame(begun.replace(b'""', b'"%b"' % (b"x" * (count - len(begun)))), key=MASK)


@pytest.mark.parametrize("piece", [100, 100_000])
async def test_what_a_client_says_is_paid_for_before_it_passes(serve: Serve, piece: int) -> None:
    gateway, bank = await paid(serve, FIRST + 900)
    client, upstream = await opened(gateway)
    first = said(1_000)
    for at in range(0, len(first), piece):
        await client.send(first[at : at + piece])
        await gateway.turn()
    await upstream.expect(first)
    bill = next(iter(gateway.plane.tunnels))._bill
    assert bill is not None
    assert (bill.input_max, bill.reserved) == (1_000, FIRST + 900)
    await client.send(said(300))
    await closed_with(client, 1008, "INSUFFICIENT_CREDITS: ")
    assert not await upstream.read_to_end(), "it was not passed on"
    await gateway.receipt()
    await _back(gateway, bank, FIRST + 900 - 100)


async def test_what_a_client_says_waits_while_credit_is_asked_for(serve: Serve) -> None:
    gateway, bank = await paid(serve, 100_000)
    client, upstream = await opened(gateway)
    (wallet,) = gateway.plane.credit._wallets.values()
    wallet.recall(0)
    bank.gate.clear()
    await client.send(said(1_000))
    await until(lambda: bool(gateway.link._leases), "the question")
    await client.send(b"more")
    await gateway.turn()
    assert upstream.is_silent()
    bank.gate.set()
    await upstream.expect(said(1_000) + b"more")
    await upstream.send(done(250, 10))
    await client.expect(done(250, 10))
    client.close()
    assert (await gateway.receipt()).request_bytes == len(said(1_000)) + 4


async def test_nothing_is_read_while_credit_is_asked_for(serve: Serve) -> None:
    gateway, bank = await paid(serve, 100_000)
    client, upstream = await opened(gateway)
    (wallet,) = gateway.plane.credit._wallets.values()
    wallet.recall(0)
    bank.gate.clear()
    await upstream.send(done(60, 40))
    await client.expect(done(60, 40))
    await until(lambda: bool(gateway.link._leases), "the question")
    await upstream.send(DELTA)
    await client.send(b"more")
    await gateway.turn()
    assert client.is_silent()
    assert upstream.is_silent()
    bank.gate.set()
    await client.expect(DELTA)
    await upstream.expect(b"more")
    client.close()


async def test_while_credit_cannot_be_checked_the_client_is_told_to_come_back(serve: Serve) -> None:
    gateway, _ = await paid(serve, 100_000)
    client, upstream = await opened(gateway)
    (wallet,) = gateway.plane.credit._wallets.values()
    wallet.recall(0)
    await gateway.cut_link()
    await upstream.send(done(60, 40))
    await client.expect(done(60, 40))
    await closed_with(client, 1013, "UNAVAILABLE: ")


async def test_a_session_whose_time_runs_out_is_told_so_too(serve: Serve) -> None:
    gateway, _ = await paid(serve, 3, second_nanousd=1_000)
    client, _upstream = await opened(gateway)
    gateway.plane.sweep()
    await closed_with(client, 1008, "INSUFFICIENT_CREDITS: ")


async def test_the_word_waits_for_the_end_of_the_frame_that_passes(serve: Serve) -> None:
    gateway, _ = await paid(serve, 3, second_nanousd=1_000)
    client, upstream = await opened(gateway)
    await upstream.send(DELTA + DELTA[:9])
    await client.expect(DELTA + DELTA[:9])
    gateway.plane.sweep()
    await gateway.turn()
    assert client.is_silent()
    await upstream.send(DELTA[9:] + DELTA)
    await client.expect(DELTA[9:])
    await closed_with(client, 1008)
    assert (await gateway.receipt()).response_bytes == 2 * len(DELTA)


async def test_a_frame_that_never_ends_does_not_hold_up_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "GOODBYE_S", 0.05)
    gateway, _ = await paid(serve, 3, second_nanousd=1_000)
    client, upstream = await opened(gateway)
    await upstream.send(DELTA[:1])
    await client.expect(DELTA[:1])
    gateway.plane.sweep()
    await client.expect_gone()
    assert (await gateway.receipt()).error == "INSUFFICIENT_CREDITS"


async def test_a_client_that_goes_on_sending_still_reads_the_word(serve: Serve) -> None:
    gateway, _ = await paid(serve, 3, second_nanousd=1_000)
    client, upstream = await opened(gateway)
    gateway.plane.sweep()
    for _ in range(20):
        client.send_what_fits(b"x" * 1_000)
        await gateway.turn()
    await upstream.expect_gone()
    head = await client.read(4)
    assert (head[0], head[2:]) == (0x88, b"\x03\xf0")
    client.close()


async def test_a_slow_client_stops_the_upstream_here_too(gateway: Gateway) -> None:
    client, upstream = await opened(gateway)
    data, total, idle_count = frame(b"a" * 100_000), 0, 0
    while idle_count < 20:
        sent = upstream.send_what_fits(data)
        total += sent
        idle_count = 0 if sent else idle_count + 1
        await gateway.turn()
    assert total < 64 * 1_048_576
    received = 0
    while received < total:
        received += len(await client.read(min(1_048_576, total - received)))
    client.close()


async def test_a_worker_that_stops_says_so(serve: Serve) -> None:
    gateway = await serve(server={"drain_s": 0.05})
    first, _ = await opened(gateway)
    second, upstream = await opened(gateway)
    await upstream.send(DELTA[:5])
    await second.expect(DELTA[:5])
    await gateway.plane.drain()
    await closed_with(first, 1013, "UNAVAILABLE: the gateway is stopping")
    await second.expect_end()
    assert [(receipt.status, receipt.outcome) for receipt in gateway.receipts()] == [(101, "ok")] * 2


# -- limits ---------------------------------------------------------------------------------------------------


async def limited(serve: Serve, tokens: int) -> tuple[Gateway, Counter, Wire, Wire]:
    gateway = await serve(credit={"output_tokens_default": AHEAD})
    counter = Counter(gateway, tokens=tokens)
    key = gateway.keys.add(tpm=tokens)
    client = await gateway.ask(request(PATH, *BROWSER[:4], key=key))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    return gateway, counter, client, upstream


@pytest.mark.parametrize("piece", [1, 10_000])
async def test_each_answer_counts_against_a_limit_when_it_is_over(serve: Serve, piece: int) -> None:
    gateway, counter, client, upstream = await limited(serve, 1_000)
    (window,) = counter.windows.values()
    (purse,) = gateway.plane.limits_by_key._purses.values()

    def counted() -> int:
        return 1_000 - window.left(1_000, 1) - purse.wallet.rest

    assert counted() == 2 * AHEAD, "what the first answers may use"
    for output, total in ((50, 200), (100, 350), (200, 650)):
        sent = DELTA * 3 + done(100, output)
        for at in range(0, len(sent), piece):
            await upstream.send(sent[at : at + piece])
        await client.expect(sent)
        await until(lambda: counted() == total, f"{total} tokens")  # noqa: B023
    client.close()
    receipt = await gateway.receipt()
    assert receipt.input_tokens + receipt.output_tokens == 650
    assert counted() == 650


async def test_the_answer_that_goes_beyond_a_limit_is_the_last(serve: Serve) -> None:
    gateway, counter, client, upstream = await limited(serve, 300)
    await upstream.send(done(300, 50))
    await client.expect(done(300, 50))
    await closed_with(client, 1013, "RATE_LIMITED: over 300 tokens a minute with this key")
    await upstream.expect_reset()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, receipt.input_tokens) == ("cut", "RATE_LIMITED", 300)
    (window,) = counter.windows.values()
    await until(lambda: window.left(300, 1) == 0, "what was used beyond")


async def test_while_a_limit_cannot_be_checked_the_client_is_told_to_come_back(serve: Serve) -> None:
    gateway, _, client, upstream = await limited(serve, 1_000)
    await gateway.cut_link()
    await upstream.send(done(600, 50))
    await client.expect(done(600, 50))
    await closed_with(client, 1013, "UNAVAILABLE: limits cannot be checked")


# -- what it costs ----------------------------------------------------------------------------------------------


class _Null:
    """A transport that takes everything."""

    def write(self, data: bytes) -> None:
        """Drop it."""


async def test_reading_adds_at_most_a_few_microseconds_a_chunk(serve: Serve) -> None:
    gateway, _ = await paid(serve, 10**9)
    client, _upstream = await opened(gateway)
    ends = next(iter(gateway.plane.tunnels.values()))
    end: Any = ends[1]
    chunk = frame(event("response.output_audio.delta", event_id="e" * 20, delta="A" * 4_000))
    transport, end.peer.transport = end.peer.transport, _Null()
    plain = websocket.tunnel.TunnelEnd.data_received
    best = {}
    for name, receive in (("plain", plain), ("read", type(end).data_received)):
        times = []
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(100):
                receive(end, chunk)
            times.append((time.perf_counter() - began) / 100)
            end.watch.reader._count = 0
        best[name] = min(times) * 1e6
    end.peer.transport = transport
    added_us = best["read"] - best["plain"]
    assert added_us < 6, f"{added_us:.2f} µs; 3 on a quiet machine"
    client.close()


def test_errors_become_codes() -> None:
    assert close_frame(1008, str(GatewayError("FORBIDDEN", "x")))[2:4] == b"\x03\xf0"


# -- wherever it is cut ---------------------------------------------------------------------------------------


class _Pipe:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_reading = True

    def write(self, data: bytes) -> None:
        self.sent += data

    def write_eof(self) -> None:
        """Nothing more is written."""

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def set_protocol(self, protocol: object) -> None:
        """It is the test that reads."""

    def get_extra_info(self, name: str) -> None:
        """There is no socket."""

    def abort(self) -> None:
        """The upstream is told in another test."""

    def close(self) -> None:
        """Not within the time of this one."""


class _Told:
    """What an end needs of an exchange and its plane."""

    plane: Any = None
    has_limit = False

    def __init__(self) -> None:
        settings = type("Settings", (), {"output_tokens_default": 1, "buffered_body_bytes_max": 1_000})
        self.plane = type("Plane", (), {"limits": settings, "config": type("Config", (), {"credit": settings})})


def _frames(sizes: list[int]) -> list[bytes]:
    return [frame(b"x" * size, 1 + number % 2, number % 3 > 0) for number, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 125, 126, 300, 70_000]), min_size=1, max_size=6),
    pieces=st.lists(st.integers(1, 400), max_size=30),
    cut_at=st.integers(0, 30),
)
@settings(max_examples=200)
def test_a_client_gets_whole_frames_and_then_the_word(sizes: list[int], pieces: list[int], cut_at: int) -> None:
    frames = _frames(sizes)
    stream = b"".join(frames)
    error = GatewayError("INSUFFICIENT_CREDITS", "no more")

    async def run() -> bytes:
        client, upstream = _Pipe(), _Pipe()
        reader = RealtimeReader()
        watch = websocket.Watch(_Told(), reader, None)  # type: ignore[arg-type]
        ends: Any = watch.join(client, upstream, lambda: None)  # type: ignore[arg-type]
        at = 0
        for number, size in enumerate([*pieces, len(stream)]):
            if number == cut_at:
                ends[1].cut(error)
            ends[1].data_received(stream[at : at + size])
            at += size
        ends[1].cut(error)
        return client.sent

    sent = asyncio.run(run())
    borders = [b"".join(frames[:count]) for count in range(len(frames) + 1)]
    assert sent in [border + close_frame(1008, "INSUFFICIENT_CREDITS: no more") for border in borders]
