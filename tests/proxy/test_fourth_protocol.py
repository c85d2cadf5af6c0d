"""A protocol written outside the package enters by the same door and works the same way."""

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from gpuproxy.plugin import (
    Call,
    GatewayError,
    Intent,
    ProtocolHandler,
    Registry,
    UpstreamRequest,
    Usage,
    UsageReader,
    load_plugins,
)
from gpuproxy.pricing import Price

from .conftest import Serve
from .harness import ENVELOPE, KEY, PREFIX, Gateway, request, until
from .test_credit import Bank
from .test_tunnels import SWITCH, UPGRADE
from .wire import Listener

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/x-words\r\nContent-Length: 13\r\n\r\none two three"


class WordCounter:
    """Counts the words of an answer."""

    def __init__(self) -> None:
        self._text = b""

    def feed(self, data: bytes) -> None:
        self._text += data

    def finish(self) -> Usage | None:
        return Usage(1, 0, len(self._text.split()))


class Words:
    """Routes by the first word of the body."""

    name: str = "words"
    mounts: tuple[str, ...] = ("words",)

    def needs_body(self, method: bytes, path: bytes) -> bool:
        return True

    def inspect(self, call: Call) -> Intent:
        if not call.body:
            raise GatewayError("BAD_REQUEST", "say the name of an upstream")
        return Intent(upstream=call.body.split()[0].decode("latin-1"), model="words", path=b"/say")

    def describe(self, call: Call) -> Intent:
        return Intent(model="described")

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        return UpstreamRequest(headers=[(b"X-Words", b"%d" % len((call.body or b"").split()))])

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        return WordCounter() if content_type.startswith(b"text/x-words") else None

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        return b"application/json", json.dumps(body.decode().split()).encode()

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        return json.dumps({"oops": error.code}).encode()


_: type[ProtocolHandler] = Words


class Renaming(Words):
    """Fails to rename what it is told to."""

    def inspect(self, call: Call) -> Intent:
        return Intent(model="m1")

    def rename(self, call: Call, path: bytes, body: bytes | None, model: str) -> tuple[bytes, bytes | None]:
        if body == b"fail":
            raise ZeroDivisionError
        if body == b"refuse":
            raise GatewayError("BAD_REQUEST", "no other name for it")
        return path, body


class Miscounting(Words):
    """Tells of answers what cannot be; fails to, if that is an exception."""

    def __init__(self, told: Any) -> None:
        self._told = told

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        return Miscounter(self._told)


class Miscounter(WordCounter):
    """Its reader."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self._told = told

    def so_far(self) -> Usage:
        if isinstance(self._told, Exception):
            raise self._told
        return Usage(-1, 0, self._told)

    def finish(self) -> Usage | None:
        return self.so_far()


class Broken(Words):
    """Fails at the first question."""

    def needs_body(self, method: bytes, path: bytes) -> bool:
        raise ZeroDivisionError


class Unreadable(Words):
    """Fails when it shall read a tunnel."""

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        raise ZeroDivisionError


async def _serve(serve: Serve, words: Words | None = None) -> Gateway:
    registry = load_plugins(("https", "mcp", "openinference"))
    registry.run("words", lambda registry: registry.protocol(words or Words()))
    return await serve(registry, raw={"protocol": "words"})


def test_the_registry_takes_it_once() -> None:
    registry = Registry()
    registry.run("words", lambda registry: registry.protocol(Words()))
    assert registry.mounts["words"] is registry.protocols["words"]


async def test_it_routes_completes_and_meters_below_its_mount(serve: Serve) -> None:
    gateway = await _serve(serve)
    client = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"raw data"))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert head.startswith(b"POST /say HTTP/1.1\r\n")
    assert b"X-Words: 2\r\n" in head
    await upstream.expect(b"raw data")
    await upstream.send(ANSWER)
    assert (await client.answer()).body == b"one two three"
    receipt = await gateway.receipt()
    assert (receipt.protocol, receipt.model, receipt.output_tokens) == ("words", "words", 3)


async def test_it_refuses_in_its_own_dialect(serve: Serve) -> None:
    gateway = await _serve(serve)
    client = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"llm data"))
    answer = await client.answer()
    assert (answer.status, answer.json()) == (404, {"oops": "UNKNOWN_UPSTREAM"})
    await client.send(request(b"POST " + PREFIX + b"/words/x", body=b"", id=b"t2"))
    assert (await client.answer()).json() == {"oops": "BAD_REQUEST"}


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "asked for"])
async def test_a_fault_in_it_ends_its_call_and_nothing_else(serve: Serve, is_known: bool) -> None:
    gateway = await _serve(serve, Broken())
    gateway.may_fail = True
    if is_known:
        await gateway.warm(KEY)
    client = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"raw data"))
    answer = await client.answer()
    assert (answer.status, answer.json()) == (500, {"oops": "INTERNAL"})
    assert (await gateway.receipt()).error == "INTERNAL"


@pytest.mark.parametrize("told", [1 << 70, -(1 << 70), 12.5, "many", None, ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["as it is", "in an envelope"])
async def test_what_it_tells_that_cannot_be_harms_no_other_call(serve: Serve, told: Any, is_wrapped: bool) -> None:
    gateway = await _serve(serve, Miscounting(told))
    gateway.link_server.lessor = bank = Bank(10**9)
    gateway.link_server.publish([Price("*", "raw", 1, 1, 10**6)])
    await until(lambda: gateway.plane.prices.is_any, "the price")
    target = f'{{"protocol":"words","target_url":"http://127.0.0.1:{gateway.raw.port}/x"}}'.encode()
    wrapped = request(b"POST " + ENVELOPE, body=target)
    client = await gateway.ask(wrapped if is_wrapped else request(b"POST " + PREFIX + b"/words/x", body=b"raw data"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    with capture_logs() as logs:
        await upstream.send(ANSWER)
        assert (await client.answer()).status == 200
    assert [line["protocol"] for line in logs if line["log_level"] == "error"] == ["words"]
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.output_tokens, receipt.usage_source) == ("ok", -1, "none")
    gateway.plane.credit.close()
    await until(lambda: bank.rest == 10**9, "what was reserved")


async def _one_at_once(serve: Serve) -> tuple[Gateway, Listener]:
    """Return a gateway whose model takes one call at once, and has another name at its upstream."""
    registry = load_plugins(("https", "mcp", "openinference"))
    registry.run("words", lambda registry: registry.protocol(Renaming()))
    upstream = Listener()
    gateway = await serve(
        registry,
        upstreams=[{"name": "a", "protocol": "words", "urls": [upstream.url]}],
        models=[{"name": "m1", "targets": [{"upstream": "a", "as": "m2", "concurrency_max": 1}]}],
        server={"workers": 1},
    )
    return gateway, upstream


async def test_a_fault_in_it_in_a_call_that_waited_ends_that_call_alone(serve: Serve) -> None:
    gateway, upstream = await _one_at_once(serve)
    gateway.may_fail = True
    first = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"a"))
    wire = await upstream.accept()
    await wire.read_head()
    second = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"fail", id=b"t2"))
    place = gateway.plane.router.models["m1"]
    await until(lambda: len(place.waiting) == 1, "the call to wait")
    await wire.send(ANSWER)
    assert (await first.answer()).body == b"one two three"
    answer = await second.answer()
    assert (answer.status, answer.json()) == (500, {"oops": "INTERNAL"})
    assert [(each.request_id, each.outcome) for each in gateway.receipts()] == [("t2", "refused"), ("t1", "ok")]
    upstream.close()


async def test_many_that_waited_and_fail_at_once_are_each_answered(serve: Serve) -> None:
    """Each makes room for the next when it has failed: not within one another, for there may be thousands."""
    gateway, upstream = await _one_at_once(serve)
    first = await gateway.ask(request(b"POST " + PREFIX + b"/words/x", body=b"a"))
    wire = await upstream.accept()
    await wire.read_head()
    call = PREFIX + b"/words/x"
    refused = [request(b"POST " + call, body=b"refuse", id=b"n%d" % number) for number in range(150)]
    others = [await gateway.ask(each) for each in refused]
    place = gateway.plane.router.models["m1"]
    await until(lambda: len(place.waiting) == len(others), "the calls to wait")
    await wire.send(ANSWER)
    assert (await first.answer()).status == 200
    assert {(await other.answer()).status for other in others} == {400}
    upstream.close()


async def test_a_fault_before_a_tunnel_leaves_nothing_open(serve: Serve) -> None:
    gateway = await _serve(serve, Unreadable())
    client = await gateway.ask(request(b"GET " + PREFIX + b"/upstreams/raw/x", *UPGRADE))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(SWITCH)
    assert (await client.answer()).status == 502
    await upstream.expect_gone()
    assert (await gateway.receipt()).outcome == "upstream_failed"
    (failure,) = gateway.failures
    assert isinstance(failure["exception"], ZeroDivisionError)
    gateway.failures.clear()


async def test_it_serves_its_upstream_by_name(serve: Serve) -> None:
    gateway = await _serve(serve)
    client = await gateway.ask(request(b"GET " + PREFIX + b"/upstreams/raw/any?x"))
    upstream = await gateway.raw.accept()
    assert (await upstream.read_head()).startswith(b"GET /any?x HTTP/1.1\r\n")
    await upstream.send(ANSWER)
    assert (await client.answer()).body == b"one two three"
    assert (await gateway.receipt()).model == "described"


async def test_it_serves_envelopes(serve: Serve) -> None:
    gateway = await _serve(serve)
    body = {"protocol": "words", "target_url": f"http://127.0.0.1:{gateway.raw.port}/x", "body": "a b c"}
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=json.dumps(body).encode()))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert b"X-Words: 3\r\n" in head
    assert b"Content-Type: text/plain; charset=utf-8\r\n" in head
    await upstream.expect(b"a b c")
    await upstream.send(ANSWER)
    whole = (await client.answer()).json()
    assert (whole["data"], whole["usage"]["output_tokens"]) == (["one", "two", "three"], 3)


async def test_an_unknown_protocol_names_it_among_the_known(serve: Serve) -> None:
    gateway = await _serve(serve)
    body = {"protocol": "nope", "target_url": "http://example.com"}
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=json.dumps(body).encode()))
    assert "https, mcp, openinference, words" in (await client.answer()).json()["error"]
