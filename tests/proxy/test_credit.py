"""Credit of a call: reserved before a byte goes upstream, settled with what was used, the rest free again."""

import asyncio
import hashlib
import json
import time
import zlib
from typing import Any

import pytest
from msgspec import structs

from gpuproxy.ledger.batch import priced
from gpuproxy.ledger.open_calls import Notes
from gpuproxy.link.messages import HeldCredit, HeldStreams, Lease, Leased, Return
from gpuproxy.pricing import Catalogue, Price, cost_of, marked_up, upper_bound
from gpuproxy.types import Receipt

from .conftest import Serve
from .harness import CHAT, ENVELOPE, KEY, OK, PREFIX, RAW, Gateway, request, until
from .test_tunnels import SWITCH, UPGRADE
from .wire import Wire

BODY = b'{"model":"m","max_tokens":10}'
PRICE = Price("m", "", 10**6, 10**6, 2 * 10**6, 100)  # nanodollars: 1 a token of input, 2 of output, 100 a call
MOST = len(BODY) + 20 + 100
ANSWER = b'{"usage":{"prompt_tokens":5,"completion_tokens":4}}'
USED = 5 + 8 + 100
JSON_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DELTA = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


class Bank:
    """What control leases out: gives what is asked for, never more than it has. Clear `gate` to let askers wait."""

    def __init__(self, nanousd: int) -> None:
        self.rest = nanousd
        self.asked: list[Lease] = []
        self.told: list[tuple[tuple[str, str], ...]] = []
        self.budget_ends_ns = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        self.asked.append(ask)
        await self.gate.wait()
        amount = min(self.rest, max(ask.least, ask.wanted)) if self.rest >= ask.least else 0
        self.rest -= amount
        return Leased(ask.id, amount, budget_ends_ns=0 if amount else self.budget_ends_ns)

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        if isinstance(told, HeldCredit):
            self.told.append(told.held)

    def take_back(self, epoch: str, returned: Return) -> None:
        self.rest += max(0, returned.amount)


async def _open(serve: Serve, nanousd: int, *prices: Price, **tree: Any) -> tuple[Gateway, Bank]:
    gateway = await serve(**tree)
    gateway.link_server.lessor = bank = Bank(nanousd)
    gateway.link_server.publish(prices or [PRICE])
    await until(lambda: gateway.plane.prices.is_any, "the prices")
    return gateway, bank


async def _back(gateway: Gateway, bank: Bank, nanousd: int) -> None:
    """Wait until the bank has exactly so much again, once the worker was idle."""
    gateway.plane.credit.sweep()
    gateway.plane.credit.sweep()
    assert not gateway.plane.credit._wallets
    await until(lambda: bank.rest == nanousd, f"{nanousd} nanodollars, has {bank.rest}")


async def _relink(gateway: Gateway) -> None:
    (link,) = gateway.link_server.links
    link.close()
    await until(lambda: link not in gateway.link_server.links and gateway.link.connected.is_set(), "the link")


def _cost(receipt: Receipt, price: Price = PRICE) -> int:
    return cost_of(receipt, price)


async def _stream(gateway: Gateway, body: bytes = b'{"model":"m","stream":true,"max_tokens":10}') -> tuple[Wire, Wire]:
    client = await gateway.ask(request(b"POST " + CHAT, body=body))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(STREAM)
    return client, upstream


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_the_list_of_models_costs_nothing_whatever_calls_cost(serve: Serve) -> None:
    every = Price("*", request_nanousd=7)
    gateway, _ = await _open(serve, 0, every)
    client = await gateway.ask(request(b"GET /v1/models"))
    assert (await client.answer()).status == 200
    receipt = await gateway.receipt()
    (cost,) = priced(Catalogue([every]), [("w", [structs.astuple(receipt)])], {}, Notes()).costs
    assert (receipt.attempts, cost) == (0, 0)


async def test_a_call_is_charged_what_it_used_and_the_rest_is_free_again(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(BODY)
    (wallet,) = gateway.plane.credit._wallets.values()
    assert wallet.reserved == MOST
    await upstream.send(JSON_OK)
    assert (await client.answer()).body == ANSWER
    assert _cost(await gateway.receipt()) == USED
    await _back(gateway, bank, 1_000 - USED)


@pytest.mark.parametrize(
    ("path", "kind"), [(CHAT, "insufficient_quota"), (b"/v1/messages", "billing_error"), (ENVELOPE, None)]
)
async def test_without_credit_no_byte_goes_upstream(serve: Serve, path: bytes, kind: str | None) -> None:
    gateway, bank = await _open(serve, 100)
    url = f"http://127.0.0.1:{gateway.llm.port}/v1/chat/completions"
    body = BODY
    if path == ENVELOPE:
        body = json.dumps({"protocol": "openinference", "target_url": url, "body": json.loads(BODY)}).encode()
    client = await gateway.ask(request(b"POST " + path, body=body))
    answer = await client.answer()
    assert answer.status == 402
    assert answer.field(b"x-should-retry") == b"false"
    error = answer.json()["error"]
    assert "may cost up to 0.0000001" in (error if kind is None else error["message"])
    assert kind is None or error["type"] == kind
    assert gateway.llm.is_untouched()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, _cost(receipt)) == ("refused", "INSUFFICIENT_CREDITS", 0)
    await _back(gateway, bank, 100)


async def test_a_budget_that_refuses_says_until_when(serve: Serve) -> None:
    gateway, bank = await _open(serve, 100)
    bank.budget_ends_ns = time.time_ns() + 50 * 10**9
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    answer = await client.answer()
    assert (answer.status, answer.field(b"retry-after") in (b"49", b"50")) == (402, True)
    assert "more than a budget has left; wait" in answer.json()["error"]["message"]
    assert gateway.llm.is_untouched()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, _cost(receipt)) == ("refused", "BUDGET_EXCEEDED", 0)


async def test_a_key_with_a_budget_spends_from_a_wallet_of_its_own(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    key = gateway.keys.add(budget_key="root")
    await gateway.warm(key)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    await client.answer()
    assert [ask.key_id for ask in bank.asked] == ["root"]
    assert [subject[1] for subject in gateway.plane.credit._wallets] == ["root"]
    await _back(gateway, bank, 1_000 - USED)


@pytest.mark.parametrize("markup_bps", [1, 1_500, -2_500])
async def test_a_markup_is_reserved_and_charged_to_the_nanodollar(serve: Serve, markup_bps: int) -> None:
    gateway, bank = await _open(serve, 1_000)
    key = gateway.keys.add(markup_bps=markup_bps)
    await gateway.warm(key)
    marked = marked_up(PRICE, markup_bps)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    (wallet,) = gateway.plane.credit._wallets.values()
    assert wallet.reserved == upper_bound(marked, len(BODY), 10)
    await upstream.send(JSON_OK)
    await client.answer()
    receipt = await gateway.receipt()
    assert receipt.markup_bps == markup_bps
    (cost,) = priced(Catalogue([PRICE]), [("owner", [structs.astuple(receipt)])], {}, Notes()).costs
    assert cost == _cost(receipt, marked)
    await _back(gateway, bank, 1_000 - cost)


async def test_new_terms_hold_for_the_next_call(serve: Serve) -> None:
    gateway, _ = await _open(serve, 1_000)
    gateway.keys.add(KEY, key_id="key0", markup_bps=5_000)
    gateway.link_server.renew(["key0", "unknown"])
    await until(lambda: _markup(gateway) == 5_000, "the new terms")


def _markup(gateway: Gateway) -> int:
    held = gateway.plane.admission._held[hashlib.sha256(KEY).digest()]
    return held.grant.markup_bps


async def test_with_everything_taken_off_a_call_needs_no_credit(serve: Serve) -> None:
    gateway, bank = await _open(serve, 0)
    key = gateway.keys.add(markup_bps=-10_000)
    await gateway.warm(key)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    await gateway.answer_one(gateway.llm)
    assert (await client.answer()).status == 200
    assert not bank.asked


async def test_of_many_calls_at_once_no_more_pass_than_can_be_paid(serve: Serve) -> None:
    gateway, bank = await _open(serve, 5 * MOST + 7)
    clients = [await gateway.ask(request(b"POST " + CHAT, body=BODY, id=b"")) for _ in range(12)]
    upstreams = [await gateway.llm.accept() for _ in range(5)]
    for upstream in upstreams:
        await upstream.read_head()
        await upstream.send(JSON_OK)
    statuses = [(await client.answer()).status for client in clients]
    assert sorted(statuses) == [200] * 5 + [402] * 7
    assert gateway.llm.is_untouched()
    await _back(gateway, bank, 5 * (MOST - USED) + 7)


async def test_a_model_without_a_price_needs_no_credit(serve: Serve) -> None:
    gateway, bank = await _open(serve, 0)
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m2"}'))
    await gateway.answer_one(gateway.llm)
    assert (await client.answer()).status == 200
    assert not bank.asked
    assert not gateway.plane.credit._wallets


async def test_a_call_waits_for_credit_while_control_is_replaced(serve: Serve) -> None:
    gateway, bank = await _open(serve, MOST)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    await client.answer()
    assert bank.rest == 0
    (link,) = gateway.link_server.links
    link.close()
    await until(lambda: not gateway.link.connected.is_set(), "the link's end")
    bank.rest = USED  # enough only with what the worker holds and gives back
    await client.send(request(b"POST " + CHAT, body=BODY))
    await upstream.read_head()
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    assert len(bank.asked) == 2
    await _back(gateway, bank, MOST - USED)


async def test_a_stream_waits_for_more_credit_while_control_is_replaced(serve: Serve) -> None:
    gateway, bank = await _open(serve, 27 + 10 + 100, credit={"output_tokens_default": 5})
    client, upstream = await _stream(gateway, b'{"model":"m","stream":true}')
    for number in range(20):
        if number == 5:
            bank.rest = 1_000
            (link,) = gateway.link_server.links
            link.close()
            await until(lambda: not gateway.link.connected.is_set(), "the link's end")
        await upstream.send(_chunk(DELTA))
        await gateway.turn()
    await upstream.send(b"0\r\n\r\n")
    answer = await client.answer()
    assert (answer.is_whole, answer.body) == (True, DELTA * 20)


async def test_with_control_away_what_is_leased_is_served_and_then_refused_for_now(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuproxy.link.client.KEEP_S", 0.1)
    gateway, bank = await _open(serve, MOST + USED)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    await client.answer()
    await gateway.cut_link()
    assert bank.rest == 0
    await client.send(request(b"POST " + CHAT, body=BODY))
    await upstream.read_head()
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    await client.send(request(b"POST " + CHAT, body=BODY))
    answer = await client.answer()
    assert (answer.status, answer.field(b"retry-after")) == (503, b"1")


async def test_a_worker_that_is_linked_anew_tells_of_whom_it_has_credit(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    client, _ = await _stream(gateway)
    await _relink(gateway)
    await until(lambda: bank.told == [(("user", ""),)], "the user")
    client.close()
    await _back(gateway, bank, 1_000 - _cost(await gateway.receipt()))
    await _relink(gateway)
    await until(lambda: bank.told[1:] == [()], "nobody")


async def test_an_upstream_that_cannot_be_reached_costs_nothing(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    gateway.llm.close()
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    assert (await client.answer()).status == 502
    await _back(gateway, bank, 1_000)


async def test_a_call_that_goes_out_again_is_billed_once(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m2"}', id=b"first"))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.answer()
    await client.send(request(b"POST " + CHAT, body=BODY))
    await upstream.read_head()
    upstream.close()  # an idle connection that was closing: the request goes out on a new one
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    await client.answer()
    receipt = await gateway.receipt(2)
    assert (receipt.attempts, _cost(receipt)) == (2, USED)
    await _back(gateway, bank, 1_000 - USED)


async def test_a_client_that_leaves_while_credit_is_asked_for_pays_nothing(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    bank.gate.clear()
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    await until(lambda: bool(bank.asked), "the question")
    client.close()
    await gateway.receipt()
    bank.gate.set()
    await until(lambda: bank.rest < 1_000, "the answer")
    await gateway.turn()
    assert gateway.llm.is_untouched()
    await _back(gateway, bank, 1_000)


async def test_a_body_that_comes_while_credit_is_asked_for_goes_upstream_whole(serve: Serve) -> None:
    price = Price("*", "raw", request_nanousd=1)
    gateway, bank = await _open(serve, 10, price)
    bank.gate.clear()
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Content-Length: 8"))
    await until(lambda: bool(bank.asked), "the question")
    await client.send(b"12345678")
    await gateway.turn()
    bank.gate.set()
    upstream = await gateway.raw.accept()
    assert b"Content-Length: 8\r\n" in await upstream.read_head()
    await upstream.expect(b"12345678")
    await upstream.send(OK)
    assert (await client.answer()).status == 200
    await _back(gateway, bank, 9)


async def test_a_stream_that_is_left_is_billed_for_what_was_delivered(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    client, upstream = await _stream(gateway)
    await client.read_head()
    for _ in range(6):
        await upstream.send(_chunk(DELTA))
        await client.expect(_chunk(DELTA))
    client.close()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.output_tokens, receipt.usage_source) == ("client_gone", 5, "estimated")
    assert _cost(receipt) == receipt.input_tokens + 5 * 2 + 100
    await _back(gateway, bank, 1_000 - _cost(receipt))


async def test_a_stream_without_a_bound_reserves_more_on_its_way(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000, credit={"output_tokens_default": 5})
    client, upstream = await _stream(gateway, b'{"model":"m","stream":true}')
    for _ in range(30):
        await upstream.send(_chunk(DELTA))
        await gateway.turn()
    usage = b'data: {"usage":{"prompt_tokens":5,"completion_tokens":30}}\n\n'
    (wallet,) = gateway.plane.credit._wallets.values()
    assert wallet.reserved >= 27 + 2 * 29 + 100
    await upstream.send(_chunk(usage) + b"0\r\n\r\n")
    answer = await client.answer()
    assert (answer.body, answer.is_whole) == (DELTA * 30 + usage, True)
    await _back(gateway, bank, 1_000 - 5 - 60 - 100)


async def test_a_compressed_stream_has_more_tokens_than_bytes(serve: Serve) -> None:
    gateway, bank = await _open(serve, 3_000, credit={"output_tokens_default": 200})
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m","stream":true}'))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    deflater = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    data = deflater.compress(DELTA * 500) + deflater.flush(zlib.Z_SYNC_FLUSH)
    assert len(data) < 200
    await upstream.send(STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + _chunk(data))
    await client.read_head()
    await client.expect(_chunk(data))
    (wallet,) = gateway.plane.credit._wallets.values()
    await until(lambda: wallet.reserved >= 27 + 2 * 400 + 100, "more to be set aside")
    upstream.close()
    await client.expect_end()
    receipt = await gateway.receipt()
    assert receipt.output_tokens == 499
    await _back(gateway, bank, 3_000 - _cost(receipt))


async def test_a_stream_that_cannot_reserve_more_is_told_why_and_cut(serve: Serve) -> None:
    body = b'{"model":"m","stream":true}'
    have = len(body) + 2 * 15 + 100  # its bound, and two times more
    gateway, bank = await _open(serve, have, credit={"output_tokens_default": 5})
    client, upstream = await _stream(gateway, body)
    for _ in range(16):  # the first carries no output
        await upstream.send(_chunk(DELTA))
        await gateway.turn()
    answer = await client.answer()
    assert not answer.is_whole
    sent, _, told = answer.body.partition(b"\n\n\n\nevent: error\ndata: ")
    assert set(sent.split(b"\n\n")) == {DELTA.strip()}
    assert json.loads(told)["error"]["code"] == "insufficient_quota"
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, receipt.output_tokens) == ("cut", "INSUFFICIENT_CREDITS", 15)
    assert _cost(receipt) <= have
    await _back(gateway, bank, have - _cost(receipt))


async def test_while_more_is_asked_for_nothing_more_is_sent(serve: Serve) -> None:
    gateway, bank = await _open(serve, 27 + 10 + 100, credit={"output_tokens_default": 5})
    client, upstream = await _stream(gateway, b'{"model":"m","stream":true}')
    bank.asked.clear()
    bank.gate.clear()
    for _ in range(20):
        await upstream.send(_chunk(DELTA))
        await gateway.turn()
    assert len(bank.asked) == 1
    await client.read_head()
    await client.read(len(_chunk(DELTA)) * 6)
    assert client.is_silent()
    bank.rest = 1_000
    bank.gate.set()
    await upstream.send(b"0\r\n\r\n")
    assert await client._read_chunks() == (DELTA * 14, True)


async def test_time_is_reserved_bit_by_bit_and_a_call_ends_when_it_runs_out(serve: Serve) -> None:
    price = Price("*", "raw", second_nanousd=1_000)
    gateway, bank = await _open(serve, 4, price, credit={"reserved_s": 0.001})
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    for reserved in (2, 3, 4):
        gateway.plane.sweep()
        await gateway.turn()
        (wallet,) = gateway.plane.credit._wallets.values()
        assert wallet.reserved == reserved
    gateway.plane.sweep()
    assert (await client.answer()).status == 402
    await _back(gateway, bank, 4)
    assert not gateway.plane.timed


async def test_a_tunnel_ends_when_its_time_runs_out(serve: Serve) -> None:
    price = Price("*", "raw", request_nanousd=2, second_nanousd=1_000)
    gateway, _ = await _open(serve, 3, price, credit={"reserved_s": 0.001})
    client = await gateway.ask(request(b"GET " + RAW + b"/ws?x=1", *UPGRADE))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 101
    gateway.plane.sweep()
    await client.expect_end()
    receipt = await gateway.receipt()
    assert (receipt.status, receipt.outcome, receipt.error) == (101, "cut", "INSUFFICIENT_CREDITS")


async def test_an_envelope_to_an_upstream_costs_what_the_model_costs_there(serve: Serve) -> None:
    gateway, bank = await _open(serve, 99, Price("m", "llm", request_nanousd=100))
    url = f"http://127.0.0.1:{gateway.llm.port}/v1/chat/completions"
    body = json.dumps({"protocol": "openinference", "target_url": url, "body": {"model": "m"}}).encode()
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=body))
    assert (await client.answer()).status == 402
    bank.rest = 100
    await client.send(request(b"POST " + ENVELOPE, body=body, id=b"t2"))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    assert (await gateway.receipt(2)).upstream == "llm"
    await _back(gateway, bank, 0)


async def test_a_price_that_changes_holds_for_calls_that_begin_then(serve: Serve) -> None:
    gateway, bank = await _open(serve, 1_000)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    gateway.link_server.publish([Price("m", request_nanousd=900)])
    await until(lambda: gateway.plane.prices.find("m", "llm", 1) != PRICE, "the new price")
    await upstream.send(JSON_OK)
    await client.answer()
    await _back(gateway, bank, 1_000 - USED)


async def test_uploads_of_unknown_size_reserve_the_largest(serve: Serve) -> None:
    price = Price("*", "raw", 10**6)
    gateway, bank = await _open(serve, 999, price, limits={"body_bytes_max": 1_000})
    client = await gateway.ask(request(b"POST " + RAW + b"/x", b"Transfer-Encoding: chunked") + b"1\r\nx\r\n")
    assert (await client.answer()).status == 402
    assert gateway.raw.is_untouched()
    assert bank.rest == 999


@pytest.mark.parametrize("is_enough", [False, True])
async def test_a_picture_sets_less_aside_than_it_has_bytes(serve: Serve, is_enough: bool) -> None:
    url = "data:image/png;base64,iVBORw0KGgo" + "A" * 1_000_000
    body = json.dumps({"model": "m", "max_tokens": 10, "messages": [{"image_url": {"url": url}}]}).encode()
    needed = len(body) - len(url) + 65_536 + 20 + 100
    gateway, bank = await _open(serve, needed if is_enough else needed - 1)
    client = await gateway.ask(request(b"POST " + CHAT, body=body))
    if not is_enough:
        assert (await client.answer()).status == 402
        return
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    await gateway.receipt()
    await _back(gateway, bank, needed - USED)


async def test_the_short_alias_and_the_long_path_cost_the_same(serve: Serve) -> None:
    gateway, bank = await _open(serve, 2_000)
    client = await gateway.client()
    upstream: Wire | None = None
    for path in (CHAT, PREFIX + CHAT):
        await client.send(request(b"POST " + path, body=BODY))
        upstream = upstream or await gateway.llm.accept()
        await upstream.read_head()
        await upstream.send(JSON_OK)
        await client.answer()
    await _back(gateway, bank, 2_000 - 2 * USED)


async def test_a_call_costs_what_the_place_costs_that_served_it_with_the_markup(serve: Serve) -> None:
    prices = Price("m", "llm", request_nanousd=100), Price("m", "raw", request_nanousd=300)
    raw = {"protocol": "openinference", "models": ["m"]}
    gateway, bank = await _open(serve, 2_000, *prices, raw=raw)
    key = gateway.keys.add(markup_bps=1_000)
    paid = []
    for number in range(2):
        client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key, id=b"t%d" % number))
        await until(lambda: not (gateway.llm.is_untouched() and gateway.raw.is_untouched()), "the call")
        (wallet,) = gateway.plane.credit._wallets.values()
        assert wallet.reserved == 330
        listener = gateway.raw if gateway.llm.is_untouched() else gateway.llm
        upstream = await listener.accept()
        await upstream.read_head()
        await upstream.send(JSON_OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n", 1))
        await client.answer()
        upstream.close()
        paid.append({"llm": 110, "raw": 330}[(await gateway.receipt(number + 1)).upstream])
    assert set(paid) == {110, 330}
    await _back(gateway, bank, 2_000 - sum(paid))
