"""Models: their names here and there, the list of them, their time, and calls that wait for room."""

import json
from typing import Any

import pytest

from gpuproxy.pricing import from_config

from .conftest import Serve
from .harness import CHAT, OK, OK_SENT, PREFIX, Gateway, request, until
from .wire import Listener, Wire

Pair = tuple[Listener, Listener]


def one(pair: Pair, **model: Any) -> dict[str, Any]:
    """Return the configuration of an upstream a, and a model "m1" there."""
    target = {"upstream": "a", **model.pop("target", {})}
    return {
        "upstreams": [{"name": "a", "protocol": "openinference", "urls": [pair[0].url]}],
        "models": [{"name": "m1", "targets": [target], **model}],
        "server": {"workers": 1},
    }


async def ask(gateway: Gateway, body: bytes = b'{"model":"m1"}', id: bytes = b"t1") -> Wire:
    return await gateway.ask(request(b"POST " + CHAT, body=body, id=id))


async def take(listener: Listener, body: bytes = b'{"model":"m1"}') -> Wire:
    upstream = await listener.accept()
    head = await upstream.read_head()
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head
    await upstream.expect(body)
    return upstream


# -- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (b'{"model":"m1"}', b'{"model":"org/there-2"}'),
        (
            b'{ "x" : 1.50,\n"model"\t:  "m1" , "y":"\\u00e9" }',
            b'{ "x" : 1.50,\n"model"\t:  "org/there-2" , "y":"\\u00e9" }',
        ),
        (b'{"a":{"model":"m1"},"model":"m1"}', b'{"a":{"model":"m1"},"model":"org/there-2"}'),
        (
            b'{"a":["model","m1",{"model":"m1"}],"model":"m1"}',
            b'{"a":["model","m1",{"model":"m1"}],"model":"org/there-2"}',
        ),
        (b'{"z":"model","model":"m1"}', b'{"z":"model","model":"org/there-2"}'),
        (b'{"z":"\\"model\\":\\"m1\\"","model":"m1"}', b'{"z":"\\"model\\":\\"m1\\"","model":"org/there-2"}'),
        (b'{"model":"\\u006d1"}', b'{"model":"org/there-2"}'),
        (b'{"model":"other","model":"m1"}', b'{"model":"org/there-2","model":"org/there-2"}'),
        (b'{"model":"gpt-4"}', b'{"model":"org/there-2"}'),
        (b'{"model":"org/there-2"}', b""),
    ],
)
async def test_only_the_name_of_the_model_changes_in_the_body(
    serve: Serve, pair: Pair, sent: bytes, got: bytes
) -> None:
    gateway = await serve(**one(pair, aliases=["gpt-4"], target={"as": "org/there-2"}))
    client = await ask(gateway, sent)
    if not got:
        assert (await client.answer()).status == 404, "the name there is no name here"
        return
    await (await take(pair[0], got)).send(OK)
    await client.expect(OK_SENT)
    receipt = await gateway.receipt()
    assert (receipt.model, receipt.upstream, receipt.request_bytes) == ("m1", "a", len(sent))


async def test_a_key_that_is_written_in_disguise_is_refused(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"as": "there"}))
    client = await ask(gateway, b'{"mod\\u0065l":"m1"}')
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["param"]) == (400, "model")
    await gateway.receipt()


async def test_a_big_body_is_renamed_and_otherwise_the_same(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"as": "there"}))
    rest = b'","messages":[' + b",".join(b'{"role":"user","content":"%d"}' % number for number in range(5_000)) + b"]}"
    client = await ask(gateway, b'{"model":"m1' + rest)
    await (await take(pair[0], b'{"model":"there' + rest)).send(OK)
    await client.expect(OK_SENT)


async def test_a_stream_is_renamed_and_asked_for_its_usage(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"as": "there"}))
    client = await ask(gateway, b'{"model":"m1","stream":true}')
    upstream = await pair[0].accept()
    head = await upstream.read_head()
    body = await upstream.read(int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]))
    asked = {"model": "there", "stream": True, "stream_options": {"include_usage": True}}
    assert json.loads(body) == asked
    await upstream.send(OK)
    await client.answer()


async def test_a_form_names_the_model_otherwise_too(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"as": "whisper-large"}))
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="m1"\r\n\r\nmodel m1\r\n'
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--x--\r\n'
    )
    kind = b"Content-Type: multipart/form-data; boundary=x"
    client = await gateway.ask(request(b"POST /v1/audio/transcriptions", kind, body=form % b"m1"))
    await (await take(pair[0], form % b"whisper-large")).send(OK)
    await client.expect(OK_SENT)


@pytest.mark.parametrize(
    ("path", "got"),
    [
        (b"/v2/models/m1/infer?x=1", b"/v2/models/a%2Fb/infer?x=1"),
        (b"/v2/models/m1/versions/2/ready", b"/v2/models/a%2Fb/versions/2/ready"),
        (b"/v2/repository/models/m1/load", b"/v2/repository/models/a%2Fb/load"),
        (b"/v1/realtime?model=m1&x=1", b"/v1/realtime?model=a%2Fb&x=1"),
    ],
)
async def test_a_path_names_the_model_otherwise_too(serve: Serve, pair: Pair, path: bytes, got: bytes) -> None:
    gateway = await serve(**one(pair, target={"as": "a/b"}))
    client = await gateway.ask(request(b"GET " + PREFIX + path))
    upstream = await pair[0].accept()
    assert (await upstream.read_head()).startswith(b"GET " + got + b" HTTP/1.1\r\n")
    await upstream.send(OK)
    await client.expect(OK_SENT)


async def test_a_key_may_name_a_model_by_its_alias(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, aliases=["latest"]))
    key = gateway.keys.add(models=("m1",))
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"latest"}', key=key))
    await (await take(pair[0])).send(OK)
    await client.expect(OK_SENT)
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m2"}', key=key))
    assert (await client.answer()).status == 403


async def test_a_target_has_a_credential_of_its_own(serve: Serve, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_KEY", "secret-1")
    gateway = await serve(**one(pair, target={"api_key_env": "ONE_KEY"}))
    client = await ask(gateway)
    upstream = await pair[0].accept()
    assert b"\r\nAuthorization: Bearer secret-1\r\n" in await upstream.read_head()
    await upstream.send(OK)
    await client.answer()


# -- the list -------------------------------------------------------------------------------------------------

PRICES = [{"model": "m1", "input_usd_per_million": "0.15", "output_usd_per_million": "0.6"}]


@pytest.mark.parametrize("prefix", [b"", PREFIX])
async def test_the_list_of_models_is_what_the_caller_may_use_with_prices(
    serve: Serve, pair: Pair, prefix: bytes
) -> None:
    gateway = await serve(**one(pair, aliases=["latest"]), prices=PRICES)
    gateway.link_server.publish(map(from_config, gateway.config.prices))
    await until(lambda: gateway.plane.prices.is_any, "the prices")
    client = await gateway.ask(request(b"GET " + prefix + b"/v1/models"))
    answer = await client.answer()
    found = {model["id"]: model for model in answer.json()["data"]}
    assert (answer.json()["object"], set(found)) == ("list", {"m", "m2", "m1"})
    assert found["m1"] == {
        "id": "m1",
        "object": "model",
        "created": 0,
        "owned_by": "gpuproxy",
        "prices": {
            "input_usd_per_million": "0.15",
            "cached_input_usd_per_million": "0.15",
            "output_usd_per_million": "0.6",
            "per_request_usd": "0",
            "per_second_usd": "0",
        },
    }
    assert "prices" not in found["m"]
    assert gateway.llm.is_untouched()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.attempts) == ("ok", 200, 0)
    key = gateway.keys.add(models=("m1", "nobody-serves-this"))
    await client.send(request(b"GET " + prefix + b"/v1/models", key=key, id=b"t2"))
    assert [model["id"] for model in (await client.answer()).json()["data"]] == ["m1"]


async def test_who_may_use_a_model_by_an_alias_only_is_shown_that(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, aliases=["cheap", "latest"]), prices=PRICES)
    gateway.plane.take_prices(list(map(from_config, gateway.config.prices)))
    key = gateway.keys.add(models=("latest",))
    client = await gateway.ask(request(b"GET /v1/models", key=key))
    (shown,) = (await client.answer()).json()["data"]
    assert (shown["id"], shown["prices"]["output_usd_per_million"]) == ("latest", "0.6")
    for number, (name, status) in enumerate([(b"latest", 200), (b"m1", 404), (b"cheap", 404)]):
        await client.send(request(b"GET /v1/models/" + name, key=key, id=b"s%d" % number))
        assert (await client.answer()).status == status


async def test_anthropics_clients_get_the_list_in_their_shape(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair))
    client = await gateway.ask(request(b"GET /v1/models?limit=20", b"anthropic-version: 2023-06-01"))
    told = (await client.answer()).json()
    assert (told["first_id"], told["last_id"], told["has_more"]) == ("m", "m2", False)
    assert told["data"][1] == {
        "type": "model",
        "id": "m1",
        "display_name": "m1",
        "created_at": "1970-01-01T00:00:00Z",
    }


@pytest.mark.parametrize("name", [b"org%2Fbig", b"org/big", b"short?x=1", b"org%2fbig/"])
async def test_one_model_is_shown_by_name_or_alias(serve: Serve, pair: Pair, name: bytes) -> None:
    tree = one(pair, name="org/big", aliases=["short"])
    gateway = await serve(**tree, prices=[{"model": "org/big", "output_usd_per_million": "0.6"}])
    gateway.plane.take_prices(list(map(from_config, gateway.config.prices)))
    client = await gateway.ask(request(b"GET /v1/models/" + name, id=b"t1"))
    shown = (await client.answer()).json()
    assert (shown["id"], shown["object"], shown["prices"]["output_usd_per_million"]) == ("org/big", "model", "0.6")
    await client.send(request(b"GET /v1/models/" + name, b"anthropic-version: 2023-06-01", id=b"t2"))
    shown = (await client.answer()).json()
    assert (shown["id"], shown["type"], shown["display_name"]) == ("org/big", "model", "org/big")
    await client.send(request(b"HEAD /v1/models/" + name, id=b"t3"))
    assert (await client.answer(b"HEAD")).status == 200
    assert pair[0].is_untouched()
    assert {(receipt.model, receipt.outcome, receipt.attempts) for receipt in gateway.receipts()} == {("", "ok", 0)}


@pytest.mark.parametrize("models", [None, ("m",)], ids=["unknown", "not allowed"])
async def test_a_model_that_is_not_listed_is_not_shown_either(serve: Serve, pair: Pair, models: Any) -> None:
    gateway = await serve(**one(pair))
    key, path = gateway.keys.add(models=models), b"/v1/models/nope" if models is None else b"/v1/models/m1"
    client = await gateway.ask(request(b"GET " + path, key=key, id=b"t1"))
    answer = await client.answer()
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert ("m1" in error["message"].partition("known")[2]) is (models is None), "only what may be used is named"
    await client.send(request(b"GET " + path, b"anthropic-version: 2023-06-01", key=key, id=b"t2"))
    answer = await client.answer()
    told = answer.json()
    assert (answer.status, told["type"], told["error"]["type"]) == (404, "error", "not_found_error")
    assert {(receipt.outcome, receipt.error) for receipt in gateway.receipts()} == {("refused", "UNKNOWN_MODEL")}


async def test_the_list_is_only_read(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair))
    client = await gateway.ask(request(b"DELETE /v1/models"))
    answer = await client.answer()
    assert (answer.status, answer.field(b"allow")) == (405, b"GET, HEAD")
    client = await gateway.ask(request(b"HEAD /v1/models", id=b"t2"))
    assert (await client.answer(b"HEAD")).status == 200


# -- time -----------------------------------------------------------------------------------------------------


async def test_a_call_may_have_a_bound_for_all_of_it(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, total_s=20.0), routing={"failures_max": 1})
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await client.read_head()
    for _ in range(3):
        gateway.passes(4)
        await upstream.send(b"1\r\nb\r\n")
        await gateway.turn()
    gateway.passes(8)
    await upstream.expect_gone()
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.error, receipt.response_bytes) == ("upstream_failed", "UPSTREAM_TIMEOUT", 4)
    assert not gateway.plane.bounded
    assert {replica.state for replica in gateway.plane.replicas.all()} == {0}, "who was answering has not failed"


async def test_a_call_that_ended_in_time_leaves_no_bound_behind(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, total_s=20.0))
    client = await ask(gateway)
    await (await take(pair[0])).send(OK)
    await client.expect(OK_SENT)
    assert not gateway.plane.bounded


async def test_a_model_has_times_of_its_own(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, first_byte_s=3.0, idle_s=2.0))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await upstream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await client.read_head()
    gateway.passes(2)
    await upstream.expect_gone()
    client = await ask(gateway, id=b"t2")
    await take(pair[0])
    gateway.passes(3)
    assert (await client.answer()).status == 504


# -- waiting --------------------------------------------------------------------------------------------------


async def test_calls_over_the_limit_wait_and_are_served_in_their_order(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"concurrency_max": 1}))
    clients = [await ask(gateway)]
    upstream = await take(pair[0])
    place = gateway.plane.router.models["m1"]
    for number in (1, 2):
        clients.append(await ask(gateway, id=b"w%d" % number))
        await until(lambda number=number: len(place.waiting) == number, "the call to wait")  # type: ignore[misc]
    for client in clients:
        assert upstream.is_silent()
        await upstream.send(OK)
        assert (await client.answer()).status == 200
        if client is not clients[-1]:
            await upstream.read_head()
            await upstream.expect(b'{"model":"m1"}')
    assert pair[0].is_untouched(), "one connection was enough"
    assert [receipt.request_id for receipt in gateway.receipts()] == ["t1", "w1", "w2"]


async def test_a_call_that_waited_too_long_is_a_503_that_says_when_to_come_back(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"concurrency_max": 1}, queue_s=3.0))
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, id=b"t2")
    await gateway.turn()
    gateway.passes(3)
    answer = await second.answer()
    assert (answer.status, answer.json()["error"]["code"], answer.field(b"retry-after")) == (503, "UPSTREAM_BUSY", b"1")
    assert not gateway.plane.router.models["m1"].waiting
    await upstream.send(OK)
    await first.expect(OK_SENT)
    receipt = next(each for each in gateway.receipts() if each.request_id == "t2")
    assert (receipt.outcome, receipt.attempts) == ("refused", 0)


async def test_a_client_that_leaves_the_queue_is_not_served(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"concurrency_max": 1}))
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, id=b"t2")
    waiting = gateway.plane.router.models["m1"].waiting
    await until(lambda: bool(waiting), "the call to wait")
    second.close()
    await until(lambda: not waiting, "the call to leave")
    await upstream.send(OK)
    await first.expect(OK_SENT)
    await gateway.turn()
    assert upstream.is_silent()
    assert {receipt.outcome for receipt in gateway.receipts()} == {"ok", "client_gone"}


async def test_a_full_queue_is_refused_at_once(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"concurrency_max": 1}, queue_max=1))
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, id=b"t2")
    await gateway.turn()
    third = await ask(gateway, id=b"t3")
    assert (await third.answer()).status == 503
    await upstream.send(OK)
    await first.expect(OK_SENT)
    await upstream.read_head()
    await upstream.expect(b'{"model":"m1"}')
    await upstream.send(OK)
    assert (await second.answer()).status == 200


async def test_calls_that_wait_get_an_endpoint_that_is_left_alone_before_none(serve: Serve, pair: Pair) -> None:
    tree = one(pair, target={"concurrency_max": 1})
    gateway = await serve(**tree, routing={"failures_max": 1, "open_s": 60.0})
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, id=b"t2")
    await until(lambda: bool(gateway.plane.router.models["m1"].waiting), "the call to wait")
    await upstream.send(OK.replace(b"200 OK", b"502 Bad"))
    assert (await first.answer()).status == 502
    await upstream.read_head()
    await upstream.expect(b'{"model":"m1"}')
    await upstream.send(OK)
    assert (await second.answer()).status == 200


async def test_calls_that_wait_go_to_a_fallback_that_has_room_first(serve: Serve, pair: Pair) -> None:
    tree = one(pair, target={"concurrency_max": 1}, fallback=["spare"])
    tree["upstreams"].append({"name": "b", "protocol": "openinference", "urls": [pair[1].url]})
    tree["models"].append({"name": "spare", "targets": [{"upstream": "b", "concurrency_max": 1}]})
    gateway = await serve(**tree)
    main = await ask(gateway)
    upstream = await take(pair[0])
    spare = await ask(gateway, b'{"model":"spare"}', b"t2")
    other = await take(pair[1], b'{"model":"spare"}')
    waits = await ask(gateway, id=b"t3")
    await until(lambda: bool(gateway.plane.router.models["m1"].waiting), "the call to wait")
    await other.send(OK)
    await spare.expect(OK_SENT.replace(b"t1", b"t2"))
    await other.read_head()
    await other.expect(b'{"model":"spare"}')
    await other.send(OK)
    assert (await waits.answer()).status == 200
    await upstream.send(OK)
    await main.expect(OK_SENT)
    assert {(each.request_id, each.model) for each in gateway.receipts()} == {
        ("t1", "m1"),
        ("t2", "spare"),
        ("t3", "spare"),
    }


async def test_a_call_that_waits_earns_second_tries_once(serve: Serve, pair: Pair) -> None:
    tree = one(pair, target={"concurrency_max": 1})
    tree["upstreams"][0]["urls"].append(pair[1].url)
    gateway = await serve(**tree)
    place = gateway.plane.router.models["m1"]
    running = [(await ask(gateway, id=b"r%d" % number), await take(pair[number])) for number in (0, 1)]
    waiting = [await ask(gateway, id=b"w%d" % number) for number in range(3)]
    await until(lambda: len(place.waiting) == 3, "the calls to wait")
    place.budget.tokens = 0
    upstream = running[0][1]
    for client in (running[0][0], *waiting):
        await upstream.send(OK)
        assert (await client.answer()).status == 200
        if client is not waiting[-1]:
            await upstream.read_head()
            await upstream.expect(b'{"model":"m1"}')
    assert place.budget.tokens == 0
    await running[1][1].send(OK)
    assert (await running[1][0].answer()).status == 200


async def test_calls_by_the_upstreams_name_count_but_do_not_wait(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**one(pair, target={"concurrency_max": 1}))
    by_name = PREFIX + b"/upstreams/a" + CHAT
    named = await gateway.ask(request(b"POST " + by_name, body=b'{"model":"m1"}'))
    upstream = await take(pair[0])
    other = await gateway.ask(request(b"POST " + by_name, body=b'{"model":"m1"}', id=b"t2"))
    another = await take(pair[0])
    waits = await ask(gateway, id=b"t3")
    await until(lambda: bool(gateway.plane.router.models["m1"].waiting), "the call to wait")
    await upstream.send(OK)
    await named.expect(OK_SENT)
    await gateway.turn()
    assert upstream.is_silent()
    await another.send(OK)
    assert (await other.answer()).status == 200
    await another.read_head()
    await another.expect(b'{"model":"m1"}')
    await another.send(OK)
    assert (await waits.answer()).status == 200
