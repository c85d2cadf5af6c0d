"""Trace context on its way through: passed on as it is while traces are off, taken part in while they are on."""

import json
from typing import Any

import msgspec
import pytest

from gpuproxy.codec.traceparent import Context, parse
from gpuproxy.proxy.traced import is_chosen
from gpuproxy.types import Receipt, Trace

from .conftest import Serve
from .harness import CHAT, ENVELOPE, OK, OK_SENT, OK_SENT_AGAIN, PREFIX, RAW, Gateway, forwarded, lines, request
from .wire import Listener, Wire

TRACE_ID, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"traceparent: 00-{TRACE_ID}-{CALLER}-01".encode()
UNSAMPLED = f"traceparent: 00-{TRACE_ID}-{CALLER}-00".encode()
STATE = b"tracestate: a=1,b=2"
BAGGAGE = b"baggage: user=7"
ON = {"endpoint": "http://127.0.0.1:9/v1/traces"}
BODY = b'{"model":"two","messages":[]}'
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def values(head: bytes, name: bytes) -> list[bytes]:
    """Return all values of a field."""
    pairs = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line]
    return [value for other, value in pairs if other.lower() == name]


def context(head: bytes) -> Context:
    """Return what an upstream was told of the trace, once and validly."""
    (value,) = values(head, b"traceparent")
    found = parse(value)
    assert found is not None
    return found


def trace_of(receipt: Receipt) -> Trace:
    assert receipt.trace is not None
    return receipt.trace


def id_of(trace: Trace, attempt: int) -> str:
    """Return the span id of an attempt, counted from 1."""
    return f"{trace.span_id + attempt:016x}"


async def pass_through(gateway: Gateway, *fields: bytes, line: bytes = b"GET " + RAW + b"/x?q=1") -> bytes:
    """Make a call and return the head its upstream got."""
    client = await gateway.ask(request(line, *fields))
    head = await gateway.answer_one(gateway.raw)
    await client.expect(OK_SENT)
    return head


# -- off --------------------------------------------------------------------------------------------------------


async def test_off_the_fields_pass_byte_for_byte_in_their_order(gateway: Gateway) -> None:
    fields = (b"X-A: 1", STATE, SAMPLED, b"TraceParent: not valid", BAGGAGE, b"X-B: 2")
    client = await gateway.ask(request(b"GET " + RAW + b"/x", *fields))
    upstream = await gateway.raw.accept()
    await upstream.expect_request(forwarded(b"GET /x", *fields, port=gateway.raw.port))
    await upstream.send(OK)
    await client.expect(OK_SENT)
    receipt = await gateway.receipt()
    assert (receipt.trace_id, receipt.trace) == ("", None)


async def test_off_a_call_without_trace_gets_none(gateway: Gateway) -> None:
    head = await pass_through(gateway)
    assert b"trace" not in head.lower()


# -- on ---------------------------------------------------------------------------------------------------------


async def test_the_upstream_gets_the_attempt_as_its_parent(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    head = await pass_through(gateway, b"X-A: 1", STATE, SAMPLED, b"TraceState: c=3", BAGGAGE)
    receipt = await gateway.receipt()
    trace = trace_of(receipt)
    assert (receipt.trace_id, trace.parent_id) == (TRACE_ID, CALLER)
    assert context(head) == Context(TRACE_ID, id_of(trace, 1), True)
    assert values(head, b"tracestate") == [b"a=1,b=2", b"c=3"]
    assert (values(head, b"baggage"), values(head, b"x-a")) == ([b"user=7"], [b"1"])
    (attempt,) = trace.attempts
    assert (attempt.address, attempt.port, attempt.status, attempt.error) == ("127.0.0.1", gateway.raw.port, 200, "")
    assert 0 <= attempt.began_us <= attempt.began_us + attempt.duration_us <= receipt.duration_us


@pytest.mark.parametrize(
    "fields",
    [(), (STATE,), (b"traceparent: 00-xyz", STATE), (SAMPLED, SAMPLED, STATE), (SAMPLED[:-2] + b"1", STATE)],
    ids=["none", "state alone", "not valid", "two", "too short"],
)
async def test_a_call_without_a_valid_parent_begins_a_trace(serve: Serve, fields: tuple[bytes, ...]) -> None:
    gateway = await serve(traces=ON)
    head = await pass_through(gateway, *fields)
    receipt = await gateway.receipt()
    told = context(head)
    assert told == Context(receipt.trace_id, id_of(trace_of(receipt), 1), True)
    assert (trace_of(receipt).parent_id, told.trace_id == TRACE_ID) == ("", False)
    assert values(head, b"tracestate") == []


async def test_calls_with_the_same_head_have_spans_of_their_own(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    client, upstream = await gateway.client(), None
    told = []
    for _ in range(3):
        await client.send(request(b"GET " + RAW + b"/x", SAMPLED, STATE, id=b""))  # else no head is remembered
        upstream = upstream or await gateway.raw.accept()
        head = await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).body == b"ok"
        told.append(context(head))
        assert values(head, b"tracestate") == [b"a=1,b=2"]
    assert {each.trace_id for each in told} == {TRACE_ID}
    assert len({each.span_id for each in told}) == 3


async def test_what_the_caller_does_not_sample_passes_unchanged_and_has_no_spans(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    head = await pass_through(gateway, UNSAMPLED, STATE)
    assert values(head, b"traceparent") == [UNSAMPLED.partition(b": ")[2]]
    assert values(head, b"tracestate") == [b"a=1,b=2"]
    receipt = await gateway.receipt()
    assert (receipt.trace_id, receipt.trace) == (TRACE_ID, None)


@pytest.mark.parametrize("is_envelope", [False, True])
async def test_the_model_that_the_answer_names_is_noted(serve: Serve, is_envelope: bool) -> None:
    gateway = await serve(traces=ON)
    told = b'{"model":"m-2026","usage":{"prompt_tokens":1}}'
    url = f"http://127.0.0.1:{gateway.llm.port}/v1/chat/completions"
    wrapped = json.dumps({"protocol": "openinference", "target_url": url, "body": {"model": "m"}}).encode()
    sent = (
        request(b"POST " + ENVELOPE, body=wrapped) if is_envelope else request(b"POST " + CHAT, body=b'{"model":"m"}')
    )
    client = await gateway.ask(sent)
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    length = b"Content-Length: %d\r\n\r\n" % len(told)
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + told)
    assert (await client.answer()).status == 200
    receipt = await gateway.receipt()
    assert (receipt.model, trace_of(receipt).response_model) == ("m", "m-2026")


async def test_without_a_caller_that_decides_the_ratio_does(serve: Serve) -> None:
    gateway = await serve(traces={**ON, "sample_ratio": 0.0})
    told = context(await pass_through(gateway))
    receipt = await gateway.receipt()
    assert (receipt.trace_id, receipt.trace) == (told.trace_id, None)
    assert not told.is_sampled


async def test_a_caller_that_samples_overrules_the_ratio(serve: Serve) -> None:
    gateway = await serve(traces={**ON, "sample_ratio": 0.0})
    assert context(await pass_through(gateway, SAMPLED)).is_sampled
    assert (await gateway.receipt()).trace is not None


def test_the_ratio_chooses_by_the_last_half_of_the_trace_id() -> None:
    begin = "f" * 16
    assert [is_chosen(begin + end * 16, 0.5) for end in "07f"] == [True, True, False]
    assert not is_chosen(begin + "8" + "0" * 15, 0.5)
    assert is_chosen("f" * 32, 1.0)
    assert not is_chosen("0" * 32, 0.0)


async def test_a_refused_call_has_a_span_and_no_attempt(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    client = await gateway.ask(request(b"GET " + PREFIX + b"/none", SAMPLED))
    assert (await client.answer()).status == 404
    receipt = await gateway.receipt()
    assert (receipt.trace_id, trace_of(receipt).parent_id, trace_of(receipt).attempts) == (TRACE_ID, CALLER, [])


async def test_calls_of_the_management_api_pass_unchanged(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    client = await gateway.ask(request(b"GET /health", SAMPLED, STATE))
    head = await gateway.answer_one(gateway.control)
    await client.answer()
    assert values(head, b"traceparent") == [SAMPLED.partition(b": ")[2]]
    assert values(head, b"tracestate") == [b"a=1,b=2"]


# -- again ------------------------------------------------------------------------------------------------------


def two(pair: tuple[Listener, Listener]) -> dict[str, Any]:
    """Return the configuration of two upstreams that serve the model "two"."""
    named = zip("ab", pair, strict=True)
    upstreams = [{"name": name, "protocol": "openinference", "urls": [each.url]} for name, each in named]
    return {"upstreams": upstreams, "models": [{"name": "two", "targets": [{"upstream": "a"}, {"upstream": "b"}]}]}


async def take(listener: Listener) -> tuple[Wire, bytes]:
    upstream = await listener.accept()
    head = await upstream.read_head()
    await upstream.expect(BODY)
    return upstream, head


async def test_each_attempt_has_a_span_that_says_why_it_was_given_up(
    serve: Serve, pair: tuple[Listener, Listener]
) -> None:
    gateway = await serve(traces=ON, **two(pair))
    client = await gateway.ask(request(b"POST " + CHAT, SAMPLED, body=BODY))
    first, first_head = await take(pair[0])
    await first.send(BUSY)
    second, second_head = await take(pair[1])
    await second.send(OK)
    await client.expect(OK_SENT_AGAIN)
    receipt = await gateway.receipt()
    trace = trace_of(receipt)
    assert [context(head).span_id for head in (first_head, second_head)] == [id_of(trace, 1), id_of(trace, 2)]
    told = [(each.port, each.status, each.error) for each in trace.attempts]
    assert told == [(pair[0].port, 503, "503"), (pair[1].port, 200, "")]
    assert trace.operation == "chat"
    first_attempt, second_attempt = trace.attempts
    assert first_attempt.began_us + first_attempt.duration_us == second_attempt.began_us


async def test_an_endpoint_that_takes_no_connection_is_an_attempt(
    serve: Serve, pair: tuple[Listener, Listener]
) -> None:
    gateway = await serve(traces=ON, **two(pair))
    pair[0].close()
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY))
    upstream, head = await take(pair[1])
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    trace = trace_of(await gateway.receipt())
    assert [(each.status, each.error) for each in trace.attempts] == [(0, "unreachable"), (200, "")]
    assert context(head).span_id == id_of(trace, 2)


async def test_a_call_that_met_a_closed_connection_is_sent_in_an_attempt_of_its_own(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    client = await gateway.ask(request(b"GET " + RAW + b"/first"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.answer()
    await client.send(request(b"GET " + RAW + b"/second", SAMPLED))
    first = context(await upstream.read_head())
    upstream.close()
    second = context(await gateway.answer_one(gateway.raw))
    receipt = await gateway.receipt(2)
    trace = trace_of(receipt)
    assert [(each.status, each.error) for each in trace.attempts] == [(0, "lost"), (200, "")]
    assert [first.span_id, second.span_id] == [id_of(trace, 1), id_of(trace, 2)]
    assert receipt.attempts == 2


async def test_a_question_for_usage_that_is_refused_is_an_attempt(serve: Serve) -> None:
    gateway = await serve(traces=ON, llm={"include_usage": True})
    client = await gateway.ask(request(b"POST " + CHAT, SAMPLED, body=b'{"model":"m","messages":[],"stream":true}'))
    upstream = await gateway.llm.accept()
    told = []
    for answer in (b"HTTP/1.1 422 No\r\nContent-Type: text/plain\r\nContent-Length: 14\r\n\r\nstream_options", OK):
        head = await upstream.read_head()
        await upstream.read(int(values(head, b"content-length")[0]))
        await upstream.send(answer)
        told.append(context(head).span_id)
    await client.expect(OK_SENT_AGAIN)
    trace = trace_of(await gateway.receipt())
    assert told == [id_of(trace, 1), id_of(trace, 2)]
    assert [(each.status, each.error) for each in trace.attempts] == [(422, "usage_refused"), (200, "")]


async def test_a_call_whose_upstream_dies_tells_no_status(serve: Serve) -> None:
    gateway = await serve(traces=ON)
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    upstream.close()
    assert (await client.answer()).status == 502
    (attempt,) = trace_of(await gateway.receipt()).attempts
    assert attempt.status == 0


# -- the envelope -------------------------------------------------------------------------------------------------


async def envelope(gateway: Gateway, *fields: bytes, answer: bytes = OK, **says: Any) -> bytes:
    """Make a call by envelope and return the head its target got."""
    says = {"protocol": "https", "target_url": f"http://127.0.0.1:{gateway.raw.port}/x", **says}
    client = await gateway.ask(request(b"POST " + ENVELOPE, *fields, body=json.dumps(says).encode()))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    await upstream.send(answer)
    assert (await client.answer()).status == 200
    return head


async def test_off_an_envelope_passes_on_the_trace_of_its_call(gateway: Gateway) -> None:
    head = await envelope(gateway, SAMPLED, STATE, BAGGAGE, b"X-Mine: 1")
    assert lines(SAMPLED, STATE, BAGGAGE) in head
    assert b"X-Mine" not in head


async def test_off_an_envelope_that_names_a_trace_passes_on_that_one(gateway: Gateway) -> None:
    head = await envelope(gateway, SAMPLED, STATE, BAGGAGE, headers={"Traceparent": "mine"})
    assert (values(head, b"traceparent"), values(head, b"tracestate"), values(head, b"baggage")) == ([b"mine"], [], [])


@pytest.mark.parametrize("place", ["call", "envelope"])
async def test_on_the_target_of_an_envelope_gets_the_attempt_as_its_parent(serve: Serve, place: str) -> None:
    gateway = await serve(traces=ON)
    own = {"traceparent": SAMPLED.partition(b": ")[2].decode(), "tracestate": "a=1,b=2"}
    busy = BUSY  # the caller gets 200 with this in it
    if place == "call":
        head = await envelope(gateway, SAMPLED, STATE, answer=busy)
    else:
        head = await envelope(gateway, UNSAMPLED, answer=busy, headers=own)
    receipt = await gateway.receipt()
    trace = trace_of(receipt)
    assert trace.parent_id == CALLER
    assert context(head) == Context(TRACE_ID, id_of(trace, 1), True)
    assert values(head, b"tracestate") == [b"a=1,b=2"]
    assert (receipt.status, [each.status for each in trace.attempts]) == (200, [503])


def test_receipts_written_before_there_were_traces_can_be_read() -> None:
    told = ["id", "t1", 1, 1, 1, "u", "k", "https", "raw", "", "GET", "/x", 200, "ok", "", 0, 0, -1, -1, -1, "none", 1]
    old = [*told, False]
    receipt = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=Receipt)
    assert (receipt.trace_id, receipt.trace) == ("", None)
