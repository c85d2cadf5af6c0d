"""A rented machine as an upstream: by its contract or its address, the caller's own only, never past the guard."""

import json

import pytest

from gpuproxy.guard import parse_target
from gpuproxy.link.messages import Machine
from gpuproxy.pricing import Price, cost_of
from gpuproxy.proxy.instances import Rented
from gpuproxy.types import RENTED

from .conftest import Serve
from .harness import ENVELOPE, KEY, OK, PREFIX, Gateway, request, until
from .test_credit import JSON_OK, _open

MINE = PREFIX + b"/instances/gpx1-a/8000"


class Rentals:
    """What control says a user has. Counts the questions."""

    def __init__(self, gateway: Gateway) -> None:
        self.asked: list[str] = []
        self.machines: tuple[Machine, ...] = (Machine("gpx1-a", "127.0.0.1", {8000: gateway.raw.port}),)
        self.is_broken = False
        gateway.link_server.machines_of = self._answer

    async def _answer(self, user_id: str) -> tuple[Machine, ...]:
        self.asked.append(user_id)
        if self.is_broken:
            raise OSError("the store is away")
        return self.machines


@pytest.fixture
async def gateway(serve: Serve) -> Gateway:
    """Run a gateway whose callers' machines are on this host."""
    return await serve(egress={"allow": ["127.0.0.1/32"]})


@pytest.fixture
def rentals(gateway: Gateway) -> Rentals:
    return Rentals(gateway)


def envelope(target_url: str) -> bytes:
    return request(b"POST " + ENVELOPE, body=json.dumps({"protocol": "https", "target_url": target_url}).encode())


async def test_a_path_below_a_port_reaches_the_machine(gateway: Gateway, rentals: Rentals) -> None:
    client = await gateway.ask(request(b"POST " + MINE + b"/generate?x=1", b"X-A: b", body=b"{}"))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert head.startswith(b"POST /generate?x=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-A: b\r\n" % gateway.raw.port)
    assert KEY not in head
    await upstream.send(OK)
    assert (await client.answer()).status == 200
    assert rentals.asked == ["user"]


@pytest.mark.parametrize("is_envelope", [False, True])
async def test_calls_to_it_cost_nothing_whatever_its_models_are_called(serve: Serve, is_envelope: bool) -> None:
    price = Price("m", "", 10**6, 10**6, 10**6, 100)
    gateway, _ = await _open(serve, 0, price, egress={"allow": ["127.0.0.1/32"]})
    Rentals(gateway)
    url = "http://127.0.0.1:8000/v1/chat/completions"
    wrapped = json.dumps({"protocol": "openinference", "target_url": url, "body": {"model": "m"}}).encode()
    by_path = request(b"POST " + MINE + b"/v1/chat/completions", body=b'{"model":"m"}')
    client = await gateway.ask(request(b"POST " + ENVELOPE, body=wrapped) if is_envelope else by_path)
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    receipt = await gateway.receipt()
    assert (receipt.model, receipt.upstream, receipt.output_tokens) == ("m", RENTED, 4)
    assert cost_of(receipt, price) == 0


async def test_what_is_known_is_not_asked_again_until_it_has_changed(gateway: Gateway, rentals: Rentals) -> None:
    for _ in range(3):
        client = await gateway.ask(request(b"GET " + MINE + b"/"))
        if _ == 0:
            upstream = await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(OK)
        assert (await client.answer()).status == 200
    assert rentals.asked == ["user"]
    rentals.machines = ()
    gateway.link_server.forget_machines(["user"])
    await until(lambda: not gateway.plane.instances._known, "the word of control")
    client = await gateway.ask(request(b"GET " + MINE + b"/"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (b"/instances/gpx1-b/8000/", 404),
        (b"/instances/gpx1-a/8001/", 404),
        (b"/instances/gpx1-a", 404),
        (b"/instances/gpx1-a/0/x", 404),
        (b"/instances/gpx1-a/99999/x", 404),
        (b"/instances/gpx1-a/x/8000", 404),
    ],
)
async def test_what_is_not_the_callers_is_not_found(
    gateway: Gateway, rentals: Rentals, path: bytes, status: int
) -> None:
    client = await gateway.ask(request(b"GET " + PREFIX + path))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (status, "NOT_FOUND")


async def test_a_port_inside_is_translated_in_an_envelope(gateway: Gateway, rentals: Rentals) -> None:
    client = await gateway.ask(envelope("http://127.0.0.1:8000/inference"))
    upstream = await gateway.raw.accept()
    head = await upstream.read_head()
    assert head.startswith(b"GET /inference HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n")
    await upstream.send(OK)
    assert (await client.answer()).json()["status_code"] == 200


async def test_a_port_that_is_nobodys_is_left_as_it_is(gateway: Gateway, rentals: Rentals) -> None:
    rentals.machines = ()
    client = await gateway.ask(envelope(f"http://127.0.0.1:{gateway.tools.port}/x"))
    assert (await gateway.answer_one(gateway.tools)).startswith(b"GET /x HTTP/1.1\r\n")
    assert (await client.answer()).status == 200


async def test_a_providers_word_does_not_open_the_guard(serve: Serve) -> None:
    gateway = await serve()
    rentals = Rentals(gateway)
    for call in (request(b"GET " + MINE + b"/"), envelope("http://127.0.0.1:8000/")):
        client = await gateway.ask(call)
        answer = await client.answer()
        assert (answer.status, answer.json()["code"]) == (403, "TARGET_FORBIDDEN")
    assert rentals.asked == ["user"]
    assert gateway.raw.is_untouched()


async def test_a_body_that_waits_for_control_arrives_whole(gateway: Gateway, rentals: Rentals) -> None:
    body = b"x" * 200_000
    client = await gateway.ask(request(b"POST " + MINE + b"/upload", body=body))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.expect(body)
    await upstream.send(OK)
    assert (await client.answer()).status == 200


async def test_control_that_cannot_tell_is_a_503_and_what_is_known_serves_on(
    gateway: Gateway, rentals: Rentals
) -> None:
    rentals.is_broken = True
    client = await gateway.ask(request(b"GET " + MINE + b"/"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"]) == (503, "UNAVAILABLE")
    rentals.is_broken = False
    client = await gateway.ask(request(b"GET " + MINE + b"/"))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200
    rentals.is_broken = True
    gateway.passes(60)
    client = await gateway.ask(request(b"GET " + MINE + b"/"))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200
    assert len(rentals.asked) == 3


async def test_an_answer_from_before_a_change_is_not_believed(gateway: Gateway, rentals: Rentals) -> None:
    answers = [rentals.machines, ()]

    async def late(user_id: str) -> tuple[Machine, ...]:
        if len(answers) == 2:  # the change comes while the old answer is on its way
            gateway.link_server.forget_machines([user_id])
        return answers.pop(0)

    gateway.link_server.machines_of = late
    client = await gateway.ask(request(b"GET " + MINE + b"/"))
    assert (await client.answer()).status == 404
    assert answers == []


def test_a_machine_behind_tls_is_reached_by_https() -> None:
    rented = Rented([Machine("a", "x.example", {8000: 443}), Machine("b", "192.0.2.1", {8000: 40800})], 0)
    assert rented.at("a", 8000) == ("https", "x.example", 443, "x.example", "")
    assert rented.at("b", 8000) == ("http", "192.0.2.1", 40800, "192.0.2.1:40800", "")
    assert rented.outside(parse_target("http://x.example:8000/p")) == ("https", "x.example", 443, "x.example", "/p")
    plain = parse_target("http://192.0.2.1:8000/p")
    assert rented.outside(plain) == ("http", "192.0.2.1", 40800, "192.0.2.1:8000", "/p")
    other = parse_target("http://192.0.2.1:9000/p")
    assert rented.outside(other) == other
