"""Upstreams and models that change while calls run: control pushes them, nobody's call is dropped."""

from typing import Any

from gpuproxy.config import build
from gpuproxy.link.messages import Routing
from gpuproxy.proxy.report import REPEATED, Reporter

from .conftest import Serve
from .harness import CHAT, OK, OK_SENT, Gateway, request, until
from .wire import Listener, Wire

Pair = tuple[Listener, Listener]


def blocks(listener: Listener, name: str = "a", **target: Any) -> dict[str, Any]:
    return {
        "upstreams": [{"name": name, "protocol": "openinference", "urls": [listener.url]}],
        "models": [{"name": "one", "targets": [{"upstream": name, **target}]}],
        "server": {"workers": 1},
    }


async def push(gateway: Gateway, tree: dict[str, Any]) -> None:
    """Let control tell of these upstreams and models, and wait until they are in force."""
    config = build(tree)
    gateway.link_server.publish_routing(Routing(config.upstreams, config.models))
    await until(lambda: gateway.plane.router.config.upstreams == config.upstreams, "the change")


async def ask(gateway: Gateway, id: bytes = b"t1") -> Wire:
    return await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"one"}', id=id))


async def take(listener: Listener) -> Wire:
    upstream = await listener.accept()
    await upstream.read_head()
    await upstream.expect(b'{"model":"one"}')
    return upstream


async def test_calls_under_way_end_where_they_are_and_new_ones_go_where_they_should(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0]))
    client = await ask(gateway)
    upstream = await take(pair[0])
    await push(gateway, blocks(pair[1], "b"))
    other = await ask(gateway, b"t2")
    await (await take(pair[1])).send(OK)
    assert (await other.answer()).body == b"ok"
    await upstream.send(OK)
    await client.expect(OK_SENT)
    assert {(receipt.request_id, receipt.upstream) for receipt in gateway.receipts()} == {("t1", "a"), ("t2", "b")}
    assert {replica.upstream for replica in gateway.plane.replicas.all()} == {"b"}


async def test_what_fails_after_it_was_taken_out_leaves_nothing_behind(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0]), routing={"failures_max": 1})
    client = await ask(gateway)
    upstream = await take(pair[0])
    await push(gateway, blocks(pair[1], "b"))
    upstream.close()
    assert (await client.answer()).status == 502
    assert not gateway.plane.replicas.restless


async def test_what_is_known_of_an_endpoint_outlives_a_change(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0], concurrency_max=1))
    (replica,) = [each for each in gateway.plane.replicas.all() if each.upstream == "a"]
    client = await ask(gateway)
    upstream = await take(pair[0])
    await push(gateway, blocks(pair[0], concurrency_max=1, weight=2))
    waiting = await ask(gateway, b"t2")
    await until(lambda: bool(gateway.plane.router.models["one"].waiting), "the call to wait: the limit holds on")
    await upstream.send(OK)
    await client.expect(OK_SENT)
    await upstream.read_head()
    await upstream.expect(b'{"model":"one"}')
    await upstream.send(OK)
    assert (await waiting.answer()).body == b"ok"
    assert [each for each in gateway.plane.replicas.all() if each.upstream == "a"] == [replica]
    assert replica.open_count == 0


async def test_calls_that_wait_go_on_by_the_change(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0], concurrency_max=1))
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, b"t2")
    await until(lambda: bool(gateway.plane.router.models["one"].waiting), "the call to wait")
    await push(gateway, blocks(pair[1], "b"))
    await (await take(pair[1])).send(OK)
    assert (await second.answer()).body == b"ok"
    await upstream.send(OK)
    await first.expect(OK_SENT)


async def test_calls_that_wait_for_a_model_that_is_gone_are_told(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0], concurrency_max=1))
    first = await ask(gateway)
    upstream = await take(pair[0])
    second = await ask(gateway, b"t2")
    await until(lambda: bool(gateway.plane.router.models["one"].waiting), "the call to wait")
    tree = blocks(pair[1], "b")
    tree["models"][0]["name"] = "two"
    await push(gateway, tree)
    assert (await second.answer()).status == 404
    await upstream.send(OK)
    await first.expect(OK_SENT)


async def test_what_this_worker_cannot_use_leaves_the_old_in_force(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0]))
    tree = blocks(pair[1], "b")
    tree["upstreams"][0]["protocol"] = "of-tomorrow"
    config = build(tree)
    gateway.plane.take_routing(Routing(config.upstreams, config.models))
    client = await ask(gateway)
    await (await take(pair[0])).send(OK)
    await client.expect(OK_SENT)


async def test_control_hears_how_endpoints_are(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0]))
    reporter = Reporter(gateway.plane.replicas, gateway.link, lambda: gateway.plane.router.models)
    client = await ask(gateway)
    upstream = await take(pair[0])
    reporter.sweep()

    def told() -> list[tuple[Any, ...]]:
        states = [each for each in gateway.link_server.states() if each.upstream == "a"]
        return [(each.url, each.worker, each.state, each.open_count, each.call_count) for each in states]

    await until(lambda: told() == [(pair[0].url, 0, "closed", 1, 1)], "the report")
    await upstream.send(OK)
    await client.expect(OK_SENT)
    reporter.sweep()
    await until(lambda: told() == [(pair[0].url, 0, "closed", 0, 1)], "the second report")
    for link in gateway.link_server.links:
        link.states = ()  # another control
    for _ in range(REPEATED):
        reporter.sweep()
    await until(lambda: bool(told()), "all to be told again")


async def test_control_hears_how_many_calls_wait(serve: Serve, pair: Pair) -> None:
    gateway = await serve(**blocks(pair[0], concurrency_max=1))
    reporter = Reporter(gateway.plane.replicas, gateway.link, lambda: gateway.plane.router.models)
    first = await ask(gateway)
    upstream = await take(pair[0])
    others = [await ask(gateway, b"w%d" % number) for number in range(2)]
    await until(lambda: len(gateway.plane.router.models["one"].waiting) == 2, "the calls to wait")
    reporter.sweep()
    await until(lambda: gateway.link_server.waiting() == [("one", 2)], "the report")
    for client in (first, *others):
        await upstream.send(OK)
        assert (await client.answer()).status == 200
    reporter.sweep()
    await until(lambda: gateway.link_server.waiting() == [], "the second report")
