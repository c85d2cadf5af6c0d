"""Second tries: which failures earn one, where it goes, what client and receipt are told, and how many there may be."""

import asyncio
import json
from typing import Any

import pytest

from gpuproxy.link.messages import BreakerMove
from gpuproxy.types import Receipt

from .conftest import Serve
from .harness import CHAT, OK, OK_SENT, OK_SENT_AGAIN, Gateway, request, until
from .wire import Answer, Listener, Wire

Pair = tuple[Listener, Listener]
BODY = b'{"model":"two","messages":[{"role":"user","content":"Hi"}]}'
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def blocks(pair: Pair, **model: Any) -> dict[str, Any]:
    """Return the configuration of two upstreams, a and b, that serve the model "two"."""
    names = zip("ab", pair, strict=True)
    upstreams = [{"name": name, "protocol": "openinference", "urls": [each.url]} for name, each in names]
    return {
        "upstreams": upstreams,
        "models": [{"name": "two", "targets": [{"upstream": "a"}, {"upstream": "b"}], **model}],
    }


async def ask(gateway: Gateway, body: bytes = BODY, id: bytes = b"t1") -> Wire:
    return await gateway.ask(request(b"POST " + CHAT, body=body, id=id))


async def take(listener: Listener, body: bytes = BODY) -> Wire:
    """Let an upstream get the call, whole, on a new connection."""
    upstream = await listener.accept()
    assert (await upstream.read_head()).startswith(b"POST /v1/chat/completions ")
    await upstream.expect(body)
    return upstream


def told(receipt: Receipt) -> tuple[Any, ...]:
    return receipt.upstream, receipt.status, receipt.outcome, receipt.error, receipt.attempts


# -- one of two dies ------------------------------------------------------------------------------------------


async def test_one_that_takes_no_connection_is_stood_in_for(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    pair[0].close()
    client = await ask(gateway)
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert told(await gateway.receipt()) == ("b", 200, "ok", "", 2)


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX-"])
async def test_one_that_dies_before_its_answer_is_stood_in_for(
    serve: Serve, pair: Pair, sent: bytes, is_reset: bool
) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(sent)
    await gateway.turn()
    upstream.reset() if is_reset else upstream.close()
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert told(await gateway.receipt()) == ("b", 200, "ok", "", 2)


async def test_one_that_speaks_no_http_is_stood_in_for(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    await (await take(pair[0])).send(b"SSH-2.0-OpenSSH\r\n")
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert told(await gateway.receipt()) == ("b", 200, "ok", "", 2)


async def test_one_that_dies_with_the_connections_it_had_is_stood_in_for(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    kept = await take(pair[0])
    await kept.send(OK)
    await client.expect(OK_SENT)
    client = await ask(gateway)
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT)
    client = await ask(gateway)
    await kept.read_head()
    await kept.expect(BODY)
    pair[0].close()  # its process died: what it had taken ends, and no new connection can be made
    upstream = pair[1].wires[0]
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).field(b"x-gpuproxy-attempts") == b"3"
    assert told(await gateway.receipt(3)) == ("b", 200, "ok", "", 3)


async def test_one_that_dies_in_the_middle_of_a_stream_leaves_a_broken_stream(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(STREAM + b"5\r\ndata:\r\n")
    await client.read_head()
    await client.expect(b"5\r\ndata:\r\n")
    upstream.reset()
    await client.expect_end()
    assert pair[1].is_untouched(), "what has reached the client cannot be taken back"
    assert told(await gateway.receipt()) == ("a", 200, "upstream_failed", "UPSTREAM_INVALID", 1)


async def test_a_head_that_reached_the_client_is_never_followed_by_a_second_one(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(STREAM)
    await client.read_head()
    upstream.close()
    await client.expect_end()
    assert pair[1].is_untouched()
    await gateway.receipt()


async def test_when_both_are_dead_the_client_is_told_once(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    for listener in pair:
        listener.close()
    client = await ask(gateway)
    answer = await client.answer()
    assert (answer.status, answer.field(b"x-gpuproxy-attempts")) == (502, b"2")
    assert answer.field(b"x-should-retry") == b"false", "both were asked already"
    assert told(await gateway.receipt()) == ("b", 502, "upstream_failed", "UPSTREAM_UNREACHABLE", 2)


# -- by policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"502 Bad Gateway", b"503 Unavailable", b"504 Timeout"])
@pytest.mark.parametrize("body", [b"Content-Length: 1\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"])
async def test_an_answer_that_may_be_better_elsewhere_is_held_back(
    serve: Serve, pair: Pair, status: bytes, body: bytes
) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(b"HTTP/1.1 " + status + b"\r\nX-Seen: no\r\n" + body)
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert told(await gateway.receipt()) == ("b", 200, "ok", "", 2)


@pytest.mark.parametrize("status", [400, 401, 404, 408, 500, 501])
async def test_an_answer_that_would_be_the_same_elsewhere_passes(serve: Serve, pair: Pair, status: int) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    await (await take(pair[0])).send(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status)
    answer = await client.answer()
    assert (answer.status, answer.body, answer.field(b"x-gpuproxy-attempts")) == (status, b"no", None)
    assert pair[1].is_untouched()
    await gateway.receipt()


async def test_the_last_answer_passes_as_it_is_when_nobody_else_can(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    await (await take(pair[0])).send(BUSY)
    await (await take(pair[1])).send(BUSY)
    answer = await client.answer()
    assert (answer.status, answer.body, answer.field(b"retry-after")) == (503, b"busy", b"7")
    assert answer.field(b"x-gpuproxy-attempts") == b"2"
    assert told(await gateway.receipt()) == ("b", 503, "ok", "", 2)


async def test_a_first_byte_that_does_not_come_is_awaited_elsewhere(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair, first_byte_s=4.0))
    client = await ask(gateway)
    upstream = await take(pair[0])
    gateway.passes(4)
    await upstream.expect_gone()
    second = await take(pair[1])
    await gateway.turn()
    gateway.passes(2)
    await second.send(OK)
    await client.expect(OK_SENT_AGAIN)
    assert told(await gateway.receipt()) == ("b", 200, "ok", "", 2)


async def test_a_policy_of_nothing_tries_nothing_again_but_what_nobody_got(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair, retry_on=[]))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(BUSY)
    assert (await client.answer()).status == 503
    assert pair[1].is_untouched()
    pair[1].close()
    client = await ask(gateway, id=b"t2")
    await upstream.read_head()
    await upstream.expect(BODY)
    await upstream.send(OK)
    assert (await client.answer()).field(b"x-gpuproxy-attempts") == b"2", "b took no connection"
    assert (await gateway.receipt(2)).attempts == 2


async def test_attempts_have_a_bound(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair, attempts_max=1))
    client = await ask(gateway)
    await (await take(pair[0])).send(BUSY)
    assert (await client.answer()).status == 503
    assert pair[1].is_untouched()
    await gateway.receipt()


NAMED = b"/api/v1/gpu/proxy/upstreams/two/x"


def named(pair: Pair, **routing: Any) -> dict[str, Any]:
    """Return the configuration of an upstream with two URLs."""
    upstream = {"name": "two", "protocol": "https", "urls": [each.url for each in pair]}
    return {"upstreams": [upstream], "routing": routing}


@pytest.mark.parametrize("how", ["status", "lost", "first_byte"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"])
async def test_an_upstream_by_its_name_is_tried_at_its_other_url_where_that_does_no_harm(
    serve: Serve, pair: Pair, method: bytes, how: str
) -> None:
    gateway = await serve(**named(pair))
    body = b"abc" if method == b"PUT" else None
    client = await gateway.ask(request(method + b" " + NAMED, body=body))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.expect(body or b"")
    if how == "status":
        await upstream.send(BUSY)
    elif how == "lost":
        upstream.close()
    else:
        await gateway.turn()
        gateway.passes(gateway.config.timeouts.first_byte_s)
    second = await pair[1].accept()
    assert (await second.read_head()).startswith(method + b" /x ")
    await second.expect(body or b"")
    await second.send(OK if method != b"HEAD" else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    answer = await client.answer(method)
    assert (answer.status, answer.field(b"x-gpuproxy-attempts")) == (200, b"2")
    assert told(await gateway.receipt()) == ("two", 200, "ok", "", 2)


@pytest.mark.parametrize("how", ["status", "lost", "first_byte"])
@pytest.mark.parametrize("method", [b"POST", b"PATCH"])
async def test_what_may_not_be_repeated_goes_to_an_upstream_by_its_name_once(
    serve: Serve, pair: Pair, method: bytes, how: str
) -> None:
    gateway = await serve(**named(pair))
    client = await gateway.ask(request(method + b" " + NAMED, body=b"abc"))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.expect(b"abc")
    if how == "status":
        await upstream.send(BUSY)
    elif how == "lost":
        upstream.close()
    else:
        await gateway.turn()
        gateway.passes(gateway.config.timeouts.first_byte_s)
    status = {"status": 503, "lost": 502, "first_byte": 504}[how]
    assert (await client.answer()).status == status
    assert pair[1].is_untouched()
    assert (await gateway.receipt()).attempts == 1


@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_what_nobody_got_goes_to_another_url_whatever_the_method(serve: Serve, pair: Pair, method: bytes) -> None:
    gateway = await serve(**named(pair))
    pair[0].close()
    body = b"abc" if method == b"POST" else None
    client = await gateway.ask(request(method + b" " + NAMED, body=body))
    upstream = await pair[1].accept()
    await upstream.read_head()
    await upstream.expect(body or b"")
    await upstream.send(OK)
    await client.expect(OK_SENT_AGAIN)
    await gateway.receipt()


async def test_an_upload_that_is_not_held_whole_is_not_repeated(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**named(pair))
    body = b"x" * 100_000
    client = await gateway.ask(request(b"PUT " + NAMED, body=body))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(BUSY)
    assert (await client.answer()).status == 503
    assert pair[1].is_untouched()


async def test_the_policy_and_its_budget_hold_for_upstreams_by_name_too(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**named(pair, retry_on=["502"]))
    client = await gateway.ask(request(b"GET " + NAMED))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(BUSY)
    assert (await client.answer()).status == 503
    assert pair[1].is_untouched()
    place = gateway.plane.router.upstreams["two"]
    assert (place.terms.retry_on, place.terms.budget_percent) == (frozenset(("502",)), 20)
    assert gateway.plane.router.upstreams["llm"].terms.attempts_max == 1, "with one URL there is no choice"


def enveloped(url: str, **fields: Any) -> bytes:
    body = json.dumps({"protocol": "https", "target_url": url, **fields}).encode()
    return request(b"POST /api/v1/gpu/proxy", body=body)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("how", ["status", "lost", "closed"])
async def test_an_envelope_to_one_url_of_an_upstream_may_go_to_the_other(
    serve: Serve, pair: Pair, how: str, is_stream: bool
) -> None:
    gateway = await serve(**named(pair))
    if how == "closed":
        pair[0].close()
    client = await gateway.ask(enveloped(pair[0].url + "/deep/x?y=1", stream=is_stream))
    if how != "closed":
        upstream = await pair[0].accept()
        await upstream.read_head()
        await upstream.send(BUSY) if how == "status" else upstream.close()
    second = await pair[1].accept()
    head = await second.read_head()
    assert head.startswith(b"GET /deep/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % pair[1].port)
    await second.send(OK)
    answer = await client.answer()
    assert (answer.status, answer.field(b"x-gpuproxy-attempts")) == (200, b"2")
    assert answer.body == b"ok" if is_stream else answer.json()["status_code"] == 200
    assert told(await gateway.receipt()) == ("two", 200, "ok", "", 2)


async def test_an_envelope_carries_one_credential_that_of_the_upstream(
    serve: Serve, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_KEY", "ours")
    tree = named(pair)
    tree["upstreams"][0]["api_key_env"] = "TWO_KEY"
    gateway = await serve(**tree)
    client = await gateway.ask(enveloped(pair[0].url + "/x", headers={"authorization": "Bearer theirs"}))
    upstream = await pair[0].accept()
    head = await upstream.read_head()
    assert [line for line in head.split(b"\r\n") if b"earer" in line] == [b"Authorization: Bearer ours"]
    await upstream.send(OK)
    assert (await client.answer()).status == 200


async def test_callers_in_a_hurry_take_no_endpoint_from_the_others(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**named(pair, failures_max=1))
    client = await gateway.ask(enveloped(pair[0].url + "/x", timeout_s=2, body={"a": 1}))
    upstream = await pair[0].accept()
    await upstream.read_head()
    gateway.passes(2)
    assert (await client.answer()).status == 504
    client = await gateway.ask(enveloped(pair[0].url + "/x", timeout_s=2, body={"a": 1}))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await gateway.turn()
    gateway.passes(2)
    assert (await client.answer()).status == 504
    assert {replica.state for replica in gateway.plane.replicas.all()} == {0}


async def test_an_envelope_that_may_not_be_repeated_is_answered_as_it_is(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**named(pair))
    client = await gateway.ask(enveloped(pair[0].url + "/x", body={"a": 1}))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(BUSY)
    assert (await client.answer()).json()["status_code"] == 503
    assert pair[1].is_untouched()


async def test_a_whole_path_is_not_taken_to_where_it_means_something_else(serve: Serve, pair: Pair) -> None:
    urls = [pair[0].url + "/a", pair[1].url + "/b"]
    gateway = await serve(upstreams=[{"name": "two", "protocol": "https", "urls": urls}])
    client = await gateway.ask(enveloped(pair[0].url + "/a/x"))
    upstream = await pair[0].accept()
    await upstream.read_head()
    await upstream.send(BUSY)
    assert (await client.answer()).json()["status_code"] == 503
    assert pair[1].is_untouched()


LIMITED = b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy"


async def test_a_limit_of_requests_is_one_of_the_model_and_not_of_the_server(serve: Serve, pair: Pair) -> None:
    tree = blocks(pair)
    tree["models"].append({"name": "another", "targets": [{"upstream": "a"}, {"upstream": "b", "priority": 1}]})
    gateway = await serve(**tree)
    told_others: list[BreakerMove] = []
    gateway.link_server.pass_on = lambda sender, move: told_others.append(move)  # type: ignore[method-assign]
    client = await ask(gateway)
    limited = await take(pair[0])
    await limited.send(LIMITED)
    kept = await take(pair[1])
    await kept.send(OK)
    await client.expect(OK_SENT_AGAIN)
    for _ in range(3):
        client = await ask(gateway)
        await kept.read_head()
        await kept.expect(BODY)
        await kept.send(OK)
        await client.expect(OK_SENT)
    another = BODY.replace(b"two", b"another")
    client = await ask(gateway, another)
    await limited.read_head()
    await limited.expect(another)
    await limited.send(OK)
    await client.expect(OK_SENT)
    gateway.passes(7)
    places = gateway.plane.router.models["two"].endpoints
    assert all(endpoint.is_listed for endpoint in places)
    await until(lambda: bool(told_others), "the word to other workers")
    (move,) = told_others
    assert (move.what, move.upstream, move.model, move.for_s) == ("resting", "a", ("two", "two"), 7.0)
    gateway.plane.replicas.told(move)
    assert [endpoint.is_listed for endpoint in places] == [False, True]
    assert all(endpoint.is_listed for endpoint in gateway.plane.router.models["another"].endpoints)


async def test_a_limit_that_many_calls_meet_is_told_once(serve: Serve, pair: Pair) -> None:
    """The only endpoint is never given up: each of its calls may be limited."""
    tree = blocks(pair)
    tree["models"] = [{"name": "two", "targets": [{"upstream": "a"}]}]
    gateway = await serve(**tree)
    told_others: list[BreakerMove] = []
    gateway.plane.replicas.tell = told_others.append
    client = await ask(gateway)
    limited = await take(pair[0])
    for number in range(3):
        await limited.send(LIMITED)
        assert (await client.answer()).status == 429
        await client.send(request(b"POST " + CHAT, body=BODY, id=b"n%d" % number))
        await limited.read_head()
        await limited.expect(BODY)
    assert [move.what for move in told_others] == ["resting"]
    gateway.passes(7)
    await limited.send(LIMITED)
    assert (await client.answer()).status == 429
    assert [move.what for move in told_others] == ["resting"] * 2


async def test_retry_after_is_obeyed_towards_the_one_that_said_it(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair))
    client = await ask(gateway)
    upstream, other = await take(pair[0]), None
    await upstream.send(BUSY)
    for number in range(4):
        other = other or await pair[1].accept()
        await other.read_head()
        await other.expect(BODY)
        await other.send(OK)
        answer = await client.answer()
        assert answer.status == 200
        await client.send(request(b"POST " + CHAT, body=BODY, id=b"n%d" % number))
        await gateway.turn()
    assert upstream.is_silent()
    await other.read_head()  # type: ignore[union-attr]
    await other.expect(BODY)  # type: ignore[union-attr]
    await other.send(OK)  # type: ignore[union-attr]
    await client.answer()
    gateway.passes(7)
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "a"]
    assert replica.admits, "after 7 s it may be asked again"


@pytest.mark.parametrize(
    ("told", "open_s"),
    [
        (b"Retry-After: 7\r\n", 7),
        (b"Date: Thu, 01 Jan 1970 00:00:40 GMT\r\nRetry-After: Thu, 01 Jan 1970 00:00:47 GMT\r\n", 7),
        (b"Retry-After: Thu, 01-Jan-70 00:00:47 GMT\r\nDate: Thu Jan  1 00:00:40 1970\r\n", 7),
        (b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n", 60),
        (b"Retry-After: Thu, 01 Jan 1970 00:00:47 GMT\r\n", 0),
        (b"Retry-After: soon\r\n", 0),
        (b"Retry-After: -7\r\n", 0),
        (b"Retry-After: \xff\r\n", 0),
    ],
    ids=["seconds", "date", "older forms of dates", "far away", "past", "word", "negative", "no text"],
)
async def test_a_wait_may_be_told_as_a_date(serve: Serve, pair: Pair, told: bytes, open_s: int) -> None:
    gateway = await serve(**blocks(pair), routing={"open_max_s": 60.0, "failures_max": 5})
    client = await ask(gateway)
    await (await take(pair[0])).send(b"HTTP/1.1 503 Busy\r\n" + told + b"Content-Length: 0\r\n\r\n")
    await (await take(pair[1])).send(OK)
    await client.expect(OK_SENT_AGAIN)
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "a"]
    left_s = replica.open_until_s - gateway.plane.replicas.now_s if not replica.admits else 0
    assert round(left_s) == open_s


# -- fallback -------------------------------------------------------------------------------------------------


def with_fallback(pair: Pair, **model: Any) -> dict[str, Any]:
    """Return the configuration of a model "main" at a, and one "spare" at b that stands in for it."""
    tree = blocks(pair)
    tree["models"] = [
        {"name": "main", "targets": [{"upstream": "a"}], "fallback": ["spare"], **model},
        {"name": "spare", "targets": [{"upstream": "b", "as": "spare-there"}]},
    ]
    return tree


MAIN = b'{"model": "main" ,"x":1.0}'
SPARE = b'{"model": "spare-there" ,"x":1.0}'


async def test_another_model_stands_in_and_is_the_one_that_is_billed(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**with_fallback(pair))
    client = await ask(gateway, MAIN)
    await (await take(pair[0], MAIN)).send(BUSY)
    await (await take(pair[1], SPARE)).send(OK)
    await client.expect(OK_SENT_AGAIN)
    receipt = await gateway.receipt()
    assert (receipt.model, *told(receipt)) == ("spare", "b", 200, "ok", "", 2)


async def test_a_model_that_is_left_alone_is_not_tried_first(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**with_fallback(pair))
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "a"]
    while replica.admits:
        replica.failed(replica.generation)
    client = await ask(gateway, MAIN)
    await (await take(pair[1], SPARE)).send(OK)
    await client.expect(OK_SENT)
    assert (await gateway.receipt()).model == "spare"


async def test_a_key_gets_no_model_it_may_not_use(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**with_fallback(pair))
    key = gateway.keys.add(models=("main",))
    client = await gateway.ask(request(b"POST " + CHAT, body=MAIN, key=key))
    await (await take(pair[0], MAIN)).send(BUSY)
    assert (await client.answer()).status == 503
    assert pair[1].is_untouched()
    assert (await gateway.receipt()).model == "main"


# -- how many -------------------------------------------------------------------------------------------------


class Server:
    """A server that answers every call the same way."""

    def __init__(self, sock: Any, answer: bytes) -> None:
        self.call_count = 0
        self._answer = answer
        self._sock = sock

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, sock=self._sock.dup(), backlog=4096)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(len(BODY))
                self.call_count += 1
                writer.write(self._answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def many(gateway: Gateway, count: int, connections: int = 20) -> list[Answer]:
    """Make calls on several connections and return the answers."""
    left = list(range(count))
    answers: list[Answer] = []

    async def one() -> None:
        client = await gateway.client()
        while left:
            await client.send(request(b"POST " + CHAT, body=BODY, id=b"m%d" % left.pop()))
            answers.append(await client.answer())

    await asyncio.gather(*(one() for _ in range(connections)))
    return answers


async def test_second_tries_add_a_fifth_to_the_load_at_most(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair), routing={"failures_max": 1000})
    plain = BUSY.replace(b"Retry-After: 7\r\n", b"")
    async with Server(pair[0].sock, plain) as one, Server(pair[1].sock, plain) as other:
        answers = await many(gateway, 500)
    assert {answer.status for answer in answers} == {503}
    assert 500 < one.call_count + other.call_count <= 500 * 1.2 + 10
    assert sum(receipt.attempts for receipt in gateway.receipts()) == one.call_count + other.call_count
    assert len(gateway.receipts()) == 500


async def test_no_storm_breaks_out_when_2000_calls_meet_a_slow_upstream(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair, first_byte_s=30.0), limits={"connections_max": 5_000})
    pair[0].sock.listen(4096)
    clients: list[Wire] = []
    async with Server(pair[1].sock, OK) as healthy:
        for number in range(2_000):
            clients.append(await ask(gateway, id=b"s%d" % number))
        slow, quick = (
            next(each for each in gateway.plane.replicas.all() if each.upstream == name) for name in ("a", "b")
        )
        await until(lambda: healthy.call_count == 1_000 and slow.open_count == 1_000 == quick.ended_count, "the calls")
        await until(lambda: not gateway.plane._tasks, "all connections")
        gateway.passes(30)  # all 1,000 calls at the slow one expire in one sweep
        assert slow.opened_count == 1, "the breaker opened once, not once for each"
        assert slow.open_until_s - gateway.plane.replicas.now_s <= gateway.config.routing.open_s
        answers = await asyncio.gather(*(client.answer() for client in clients))
        assert quick.state == 0, "the healthy one was not drowned in second tries"
        extra = healthy.call_count - 1_000
        assert 0 < extra <= 2_000 * 0.2 + 10
        statuses = [answer.status for answer in answers]
        assert (statuses.count(200), statuses.count(504)) == (1_000 + extra, 1_000 - extra)
        gateway.passes(gateway.config.routing.open_s)
        before = slow.begun_count
        more = [await ask(gateway, id=b"h%d" % number) for number in range(50)]
        await until(lambda: healthy.call_count == 1_049 + extra, "the calls after")
        assert slow.begun_count == before + 1, "half open, it gets one call"
        for client in [*clients, *more]:
            client.close()
    assert len({receipt.request_id for receipt in gateway.receipts()}) >= 2_000
