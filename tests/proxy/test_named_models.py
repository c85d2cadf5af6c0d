"""Calls to an upstream by its name, or by its URL in an envelope, cost what the model costs that they mean."""

import json
from typing import Any

import pytest

from gpuproxy.pricing import Price

from .conftest import Serve
from .harness import ENVELOPE, PREFIX, Gateway, request
from .test_credit import ANSWER, JSON_OK, _back, _open
from .test_tunnels import UPGRADE
from .wire import Wire

BY_NAME = PREFIX + b"/upstreams/llm"
CHAT = BY_NAME + b"/v1/chat/completions"
DEAR = Price("dear", request_nanousd=100)


def model(**fields: Any) -> dict[str, Any]:
    return {"name": "dear", "targets": [{"upstream": "llm", "as": "there"}], **fields}


async def served(gateway: Gateway, client: Wire) -> bytes:
    """Let the upstream answer; returns the head it got."""
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200
    return head


def enveloped(gateway: Gateway, path: str, body: Any, **fields: Any) -> bytes:
    url = f"http://127.0.0.1:{gateway.llm.port}{path}"
    return json.dumps({"protocol": "openinference", "target_url": url, "body": body, **fields}).encode()


@pytest.mark.parametrize("name", ["dear", "there", "also"])
@pytest.mark.parametrize("is_envelope", [False, True])
async def test_whatever_name_is_used_the_price_is_that_of_the_model(serve: Serve, name: str, is_envelope: bool) -> None:
    gateway, bank = await _open(serve, 100, DEAR, models=[model(aliases=["also"])])
    body = {"model": name}
    sent = request(b"POST " + CHAT, body=json.dumps(body).encode())
    if is_envelope:
        sent = request(b"POST " + ENVELOPE, body=enveloped(gateway, "/v1/chat/completions", body))
    await served(gateway, await gateway.ask(sent))
    assert (await gateway.receipt()).model == "dear"
    await _back(gateway, bank, 0)


@pytest.mark.parametrize("is_envelope", [False, True])
async def test_a_call_that_names_none_is_one_of_the_only_model(serve: Serve, is_envelope: bool) -> None:
    gateway, bank = await _open(serve, 100, DEAR, llm={"models": ["dear"]})
    sent = request(b"POST " + BY_NAME + b"/generate", body=b'{"inputs":"Hi"}')
    if is_envelope:
        sent = request(b"POST " + ENVELOPE, body=enveloped(gateway, "", {"inputs": "Hi"}))
    head = await served(gateway, await gateway.ask(sent))
    assert head.startswith(b"POST /generate ")
    assert (await gateway.receipt()).model == "dear"
    await _back(gateway, bank, 0)


async def test_what_only_asks_costs_nothing(serve: Serve) -> None:
    gateway, _ = await _open(serve, 0, DEAR, llm={"models": ["dear"]})
    await served(gateway, await gateway.ask(request(b"GET " + BY_NAME + b"/v1/models")))
    assert (await gateway.receipt()).model == ""


NAMELESS = [
    (b"/v1/chat/completions", b'{"messages":[]}'),
    (b"/v1/chat/completions", '{"model":"dear"}'.encode("utf-16")),
    (b"/v1/chat/completions", b'\xef\xbb\xbf{"model":"dear"}'),
    (b"/%76%31/chat/completion%73", b'{"model":"dear"}'),
    (b"/v1/batches", b'{"input_file_id":"f"}'),
]


@pytest.mark.parametrize(("path", "body"), NAMELESS)
async def test_where_models_have_prices_a_call_must_let_see_which_it_means(
    serve: Serve, path: bytes, body: bytes
) -> None:
    gateway, _ = await _open(serve, 1_000, DEAR, models=[model()])
    client = await gateway.ask(request(b"POST " + BY_NAME + path, body=body))
    error = (await client.answer()).json()["error"]
    assert (error["code"], error["param"]) == ("BAD_REQUEST", "model")
    assert "'llm' have prices; name `model`" in error["message"]
    assert gateway.llm.is_untouched()


@pytest.mark.parametrize(("path", "body"), NAMELESS)
async def test_where_none_has_it_need_not(serve: Serve, path: bytes, body: bytes) -> None:
    gateway, _ = await _open(serve, 1_000, Price("another", request_nanousd=100), models=[model()])
    await served(gateway, await gateway.ask(request(b"POST " + BY_NAME + path, body=body)))


@pytest.mark.parametrize(("models", "status"), [(["dear", "m"], 400), (["dear"], 402)])
async def test_a_websocket_must_let_see_it_too(serve: Serve, models: list[str], status: int) -> None:
    gateway, _ = await _open(serve, 0, DEAR, llm={"models": models})
    client = await gateway.ask(request(b"GET " + BY_NAME + b"/v1/realtime", *UPGRADE))
    assert (await client.answer()).status == status
    assert gateway.llm.is_untouched()


async def test_a_price_for_all_that_an_upstream_does_holds_for_it(serve: Serve) -> None:
    gateway, bank = await _open(serve, 7, DEAR, Price("*", "llm", request_nanousd=7), models=[model()])
    client = await gateway.ask(request(b"POST " + BY_NAME + b"/v1/batches", body=b"{}"))
    await served(gateway, client)
    await gateway.receipt()
    await _back(gateway, bank, 0)


async def test_a_file_is_uploaded_for_nothing(serve: Serve) -> None:
    gateway, _ = await _open(serve, 0, DEAR, models=[model()])
    form = b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b0--\r\n'
    kind = b"Content-Type: multipart/form-data; boundary=b0"
    client = await gateway.ask(request(b"POST " + BY_NAME + b"/v1/files", kind, body=form))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.expect(form)
    await upstream.send(JSON_OK)
    assert (await client.answer()).status == 200


LATER = [
    (b"/v1/responses", b'{"model":"dear","background":true}'),
    (BY_NAME + b"/v1/batches", b'{"input_file_id":"f"}'),
]


@pytest.mark.parametrize(("path", "body"), LATER)
async def test_what_is_done_later_is_not_done_where_tokens_cost(serve: Serve, path: bytes, body: bytes) -> None:
    price = Price("dear", output_nanousd_per_million=1)
    gateway, _ = await _open(serve, 1_000_000, price, llm={"models": ["dear"]})
    client = await gateway.ask(request(b"POST " + path, body=body))
    error = (await client.answer()).json()["error"]
    assert (error["code"], "in the background or a batch" in error["message"]) == ("BAD_REQUEST", True)
    assert gateway.llm.is_untouched()


@pytest.mark.parametrize(("path", "body"), LATER)
async def test_what_is_done_later_may_have_a_price_by_the_call(serve: Serve, path: bytes, body: bytes) -> None:
    gateway, bank = await _open(serve, 100, DEAR, llm={"models": ["dear"]})
    await served(gateway, await gateway.ask(request(b"POST " + path, body=body)))
    await gateway.receipt()
    await _back(gateway, bank, 0)


@pytest.mark.parametrize(
    ("models", "body", "status"),
    [
        (("dear",), b'{"model":"there"}', 200),
        (("there",), b'{"model":"there"}', 200),
        (("m",), b'{"model":"there"}', 403),
        (("dear",), b"{}", 403),
    ],
)
async def test_a_key_is_bound_to_models_by_either_name(
    serve: Serve, models: tuple[str, ...], body: bytes, status: int
) -> None:
    gateway = await serve(llm={"models": []}, models=[model()])
    key = gateway.keys.add(models=models)
    client = await gateway.ask(request(b"POST " + CHAT, body=body, key=key))
    if status == 200:
        await served(gateway, client)
    else:
        assert (await client.answer()).status == status
        assert gateway.llm.is_untouched()


@pytest.mark.parametrize("name", ["Accept-Encoding", "accept-encoding"])
async def test_no_envelope_hides_its_answers_usage_by_compression(serve: Serve, name: str) -> None:
    gateway = await serve()
    body = enveloped(gateway, "/v1/chat/completions", {"model": "m"}, headers={name: "gzip"})
    head = await served(gateway, await gateway.ask(request(b"POST " + ENVELOPE, body=body)))
    assert head.lower().count(b"accept-encoding") == 1
    assert b"Accept-Encoding: identity\r\n" in head
    assert json.loads(ANSWER)["usage"]["completion_tokens"] == (await gateway.receipt()).output_tokens
