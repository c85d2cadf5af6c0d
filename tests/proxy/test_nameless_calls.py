"""Files, batches, stored answers: what is posted to keep or end them names no model, and goes where it can be meant."""

import pytest

from gpuproxy.pricing import Price

from .conftest import Serve
from .harness import OK, OK_SENT, PREFIX, Gateway, request
from .test_credit import _open

FORM = b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b0--\r\n'
FORM_KIND = b"Content-Type: multipart/form-data; boundary=b0"
KEPT: list[tuple[bytes, bytes | None]] = [
    (b"/v1/files", FORM),
    (b"/v1/responses/resp_1/cancel", b""),
    (b"/v1/responses/resp_1/cancel", None),
    (b"/v1/batches/batch_1/cancel", b""),
    (b"/v1/messages/batches", b'{"requests":[]}'),
    (b"/v1/batches?x=1", b'{"input_file_id":"f"}'),
    (b"/v1/vector_stores/vs_1/search", b'{"query":"x"}'),
    (b"/v1/threads", b"{}"),
    (b"/v1/moderations", b'{"input":"x"}'),
    (b"/v1/chat/completions/c_1", b'{"metadata":{}}'),
]
OTHER = {"name": "other", "protocol": "openinference", "urls": ["http://127.0.0.1:1"], "models": ["x"]}


@pytest.mark.parametrize(("path", "body"), KEPT)
@pytest.mark.parametrize("prefix", [b"", PREFIX])
async def test_it_goes_to_the_only_upstream(gateway: Gateway, prefix: bytes, path: bytes, body: bytes | None) -> None:
    client = await gateway.ask(request(b"POST " + prefix + path, FORM_KIND, body=body))
    upstream = await gateway.llm.accept()
    head = await upstream.read_head()
    assert head.startswith(b"POST " + path + b" HTTP/1.1\r\n")
    await upstream.expect(body or b"")
    await upstream.send(OK)
    await client.expect(OK_SENT)
    receipt = await gateway.receipt()
    assert (receipt.upstream, receipt.model, receipt.outcome) == ("llm", "", "ok")


@pytest.mark.parametrize("path", [b"/v1/files", b"/v1/uploads/u_1/parts", b"/v1/containers/c_1/files?x=1"])
@pytest.mark.parametrize("prefix", [b"", PREFIX])
async def test_a_file_is_not_held(serve: Serve, prefix: bytes, path: bytes) -> None:
    gateway = await serve(limits={"buffered_body_bytes_max": 10})
    body = FORM * 2
    head = request(b"POST " + prefix + path, FORM_KIND, b"Content-Length: %d" % len(body))
    client = await gateway.ask(head + FORM)
    upstream = await gateway.llm.accept()
    assert (await upstream.read_head()).startswith(b"POST " + path + b" HTTP/1.1\r\n")
    await upstream.expect(FORM)
    await client.send(FORM)
    await upstream.expect(FORM)
    await upstream.send(OK)
    await client.expect(OK_SENT)
    assert (await gateway.receipt()).request_bytes == len(body)


@pytest.mark.parametrize(("path", "body"), KEPT)
async def test_of_several_one_must_be_named(serve: Serve, path: bytes, body: bytes | None) -> None:
    gateway = await serve(upstreams=[OTHER])
    client = await gateway.ask(request(b"POST " + path, FORM_KIND, body=body))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")
    assert "/api/v1/gpu/proxy/upstreams/: llm, other" in answer.json()["error"]["message"]


async def test_one_that_names_a_model_goes_to_where_that_is_served(serve: Serve) -> None:
    gateway = await serve(upstreams=[OTHER])
    client = await gateway.ask(request(b"POST /v1/threads/t_1/runs", body=b'{"model":"m"}'))
    await gateway.answer_one(gateway.llm)
    await client.expect(OK_SENT)
    assert (await gateway.receipt()).model == "m"


@pytest.mark.parametrize(
    ("models", "message"), [(["m"], "not one in the background or a batch"), (["m", "m2"], "name `model`")]
)
@pytest.mark.parametrize("path", [b"/v1/batches", b"/v1/threads/t_1/runs", b"/v1/messages/batches"])
async def test_work_that_is_done_later_is_refused_where_tokens_cost(
    serve: Serve, path: bytes, models: list[str], message: str
) -> None:
    gateway, _ = await _open(serve, 10**9, Price("m", "", 10**6, 10**6, 10**6), llm={"models": models})
    client = await gateway.ask(request(b"POST " + path, body=b"{}"))
    answer = await client.answer()
    assert answer.status == 400
    assert message in answer.json()["error"]["message"]
    assert gateway.llm.is_untouched()


async def test_a_key_that_is_bound_to_models_cannot_do_what_names_none(gateway: Gateway) -> None:
    key = gateway.keys.add(models=("m",))
    client = await gateway.ask(request(b"POST /v1/batches", body=b"{}", key=key))
    assert (await client.answer()).status == 403
    assert gateway.llm.is_untouched()


async def test_triton_tells_of_all_models(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + PREFIX + b"/v2/models/stats"))
    assert (await gateway.answer_one(gateway.llm)).startswith(b"GET /v2/models/stats ")
    await client.expect(OK_SENT)
