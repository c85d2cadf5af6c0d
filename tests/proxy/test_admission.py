"""Who may call, what they are told if not, and in which dialect."""

import time
from typing import Any

import pytest

from gpuproxy.codec.key import generate

from .conftest import Serve
from .harness import CHAT, ENVELOPE, KEY, OK, OK_SENT, PREFIX, RAW, Gateway, request

CHAT_BODY = b'{"model":"m"}'


async def _refused(gateway: Gateway, data: bytes) -> tuple[int, Any, dict[bytes, bytes]]:
    client = await gateway.ask(data)
    answer = await client.answer()
    return answer.status, answer.json(), {name.lower(): value for name, value in answer.fields}


async def test_no_credential_is_a_401_that_says_how(gateway: Gateway) -> None:
    status, body, fields = await _refused(gateway, request(b"GET " + RAW + b"/x", key=b""))
    assert (status, body["code"], body["request_id"]) == (401, "UNAUTHORIZED", "t1")
    assert "X-API-Key" in body["error"]
    assert (fields[b"www-authenticate"], fields[b"x-should-retry"]) == (b"Bearer", b"false")
    receipt = await gateway.receipt()
    assert (receipt.outcome, receipt.status, receipt.user_id, receipt.upstream) == ("refused", 401, "", "")


@pytest.mark.parametrize("key", [b"x", b"gp_", b"gp_" + b"a" * 49, b"a" * 5_000, KEY[:-1], KEY[:-1] + b"!", b"sk-1"])
async def test_what_is_no_key_is_refused_without_asking_control(gateway: Gateway, key: bytes) -> None:
    status, body, _ = await _refused(gateway, request(b"GET " + RAW + b"/x", key=key))
    assert (status, body["code"]) == (401, "UNAUTHORIZED")
    assert gateway.keys.questions == []


async def test_an_unknown_key_is_asked_about_once_and_remembered(gateway: Gateway) -> None:
    stranger = generate().encode()
    for _ in range(3):
        status, body, _ = await _refused(gateway, request(b"GET " + RAW + b"/x", key=stranger))
        assert (status, body["code"]) == (401, "UNAUTHORIZED")
    assert len(gateway.keys.questions) == 1
    gateway.keys.add(stranger)
    gateway.passes(gateway.config.auth.unknown_key_ttl_s)
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=stranger))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200


async def test_an_expired_key_is_refused_even_while_held(gateway: Gateway) -> None:
    key = gateway.keys.add(expires_ns=time.time_ns() - 1)
    status, body, _ = await _refused(gateway, request(b"GET " + RAW + b"/x", key=key))
    assert (status, body["code"]) == (401, "UNAUTHORIZED")
    assert (await gateway.receipt()).key_id == "key1"


async def test_a_key_without_the_scope_is_forbidden(gateway: Gateway) -> None:
    key = gateway.keys.add(scopes=("billing",))
    status, body, _ = await _refused(gateway, request(b"GET " + RAW + b"/x", key=key))
    assert (status, body["code"]) == (403, "FORBIDDEN")
    key = gateway.keys.add(scopes=("billing", "inference"))
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200


async def test_a_key_revoked_during_its_stream_is_refused_at_the_next_call(gateway: Gateway) -> None:
    key = gateway.keys.add(key_id="doomed")
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
    await client.read_head()
    await client.expect(b"ab")
    gateway.keys.grants.clear()
    gateway.link_server.revoke(["doomed"])
    await gateway.turn()
    await upstream.send(b"cd")
    await client.expect(b"cd")
    await client.send(request(b"GET " + RAW + b"/x", key=key))
    assert (await client.answer()).status == 401
    assert [receipt.outcome for receipt in gateway.receipts()] == ["ok", "refused"]


async def test_an_answer_about_a_key_that_was_revoked_meanwhile_lets_nobody_in(gateway: Gateway) -> None:
    key = gateway.keys.add(key_id="doomed")
    gateway.keys.gate.clear()
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    await gateway.turn()
    gateway.link_server.revoke(["doomed"])
    gateway.keys.gate.set()
    assert (await client.answer()).status == 401
    assert gateway.raw.is_untouched()


async def test_a_held_grant_serves_while_control_is_away(gateway: Gateway) -> None:
    await gateway.cut_link()
    for passed_s in (0, gateway.config.auth.grant_ttl_s + 1, 600):
        gateway.passes(passed_s)
        client = await gateway.ask(request(b"GET " + RAW + b"/x"))
        upstream = await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(OK)
        await client.expect(OK_SENT)
        client.close()
        gateway.passes(5)
    gateway.passes(gateway.config.auth.stale_grant_s)
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    await gateway.turn()
    gateway.passes(gateway.config.auth.authorize_timeout_s)
    assert (await client.answer()).status == 503


async def test_a_key_nobody_holds_is_a_503_while_control_is_away(gateway: Gateway) -> None:
    key = gateway.keys.add()
    await gateway.cut_link()
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    await gateway.turn()
    gateway.passes(gateway.config.auth.authorize_timeout_s)
    answer = await client.answer()
    assert (answer.status, answer.json()["code"], answer.field(b"retry-after")) == (503, "UNAVAILABLE", b"1")
    assert answer.field(b"x-should-retry") == b"true"


async def test_a_store_that_fails_is_a_503_and_no_401(gateway: Gateway) -> None:
    key = gateway.keys.add()
    gateway.keys.is_broken = True
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    await gateway.turn()
    gateway.passes(gateway.config.auth.authorize_timeout_s)
    refused = await client.answer()
    assert (refused.status, refused.json()["code"]) == (503, "UNAVAILABLE")
    gateway.keys.is_broken = False
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=key))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200


async def test_a_store_that_fails_for_a_moment_is_not_noticed(gateway: Gateway) -> None:
    gateway.keys.is_broken = True
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=gateway.keys.add()))
    await gateway.turn()
    gateway.keys.is_broken = False
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200


async def test_a_question_without_answer_is_a_503_after_its_time(gateway: Gateway) -> None:
    gateway.keys.gate.clear()
    client = await gateway.ask(request(b"GET " + RAW + b"/x", key=gateway.keys.add()))
    await gateway.turn()
    gateway.passes(gateway.config.auth.authorize_timeout_s)
    assert (await client.answer()).status == 503
    gateway.keys.gate.set()


async def test_many_first_calls_of_one_key_ask_control_once(gateway: Gateway) -> None:
    key = gateway.keys.add()
    gateway.keys.gate.clear()
    clients = [await gateway.ask(request(b"GET " + RAW + b"/x", key=key, id=b"t%d" % n)) for n in range(50)]
    await gateway.turn()
    gateway.keys.gate.set()
    for _ in clients:
        upstream = await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(OK)
    for client in clients:
        assert (await client.answer()).body == b"ok"
    assert len(gateway.keys.questions) == 1
    await gateway.receipt(50)


async def test_a_stale_grant_is_refreshed_without_holding_the_call(gateway: Gateway) -> None:
    gateway.keys.gate.clear()
    gateway.passes(gateway.config.auth.grant_ttl_s)
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200
    assert len(gateway.keys.questions) == 1
    gateway.keys.gate.set()


async def test_both_credentials_may_be_sent_if_they_are_the_same(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"GET " + RAW + b"/x", b"Authorization: Bearer " + KEY))
    await gateway.answer_one(gateway.raw)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("other", [b"Authorization: Bearer x", b"X-API-Key: x", b"authorization: bearer " + KEY[:-1]])
async def test_two_different_credentials_are_refused(gateway: Gateway, other: bytes) -> None:
    status, body, _ = await _refused(gateway, request(b"GET " + RAW + b"/x", other))
    assert (status, body["code"]) == (400, "BAD_REQUEST")


async def test_a_model_outside_the_keys_list_is_forbidden(gateway: Gateway) -> None:
    key = gateway.keys.add(models=("m2", "m3"))
    status, body, _ = await _refused(gateway, request(b"POST " + CHAT, body=CHAT_BODY, key=key))
    assert status == 403
    assert body["error"]["param"] == "model"
    assert "m2, m3" in body["error"]["message"]
    client = await gateway.ask(request(b"POST " + CHAT, body=b'{"model":"m2"}', key=key))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    await upstream.send(OK)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("line", "body"),
    [
        (b"POST " + PREFIX + b"/upstreams/llm/v1/chat/completions", CHAT_BODY),
        (b"POST " + PREFIX + b"/v2/models/m/infer", b"{}"),
        (b"GET " + PREFIX + b"/v2/models/m", None),
        (b"POST " + PREFIX + b"/upstreams/llm/v2/models/m/infer", b"\0\1"),
        (b"POST " + RAW + b"/x", b"anything"),
    ],
)
async def test_a_key_bound_to_models_has_no_way_round(gateway: Gateway, line: bytes, body: bytes | None) -> None:
    key = gateway.keys.add(models=("m2",))
    client = await gateway.ask(request(line, body=body, key=key))
    assert (await client.answer()).status == 403
    assert gateway.llm.is_untouched()
    assert gateway.raw.is_untouched()


@pytest.mark.parametrize("path", [PREFIX + b"/upstreams/llm/v1/responses", RAW + b"/x"], ids=["responses", "raw"])
async def test_nor_has_it_a_tunnel_in_which_any_model_may_be_named(gateway: Gateway, path: bytes) -> None:
    key = gateway.keys.add(models=("m2",))
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x")
    client = await gateway.ask(request(b"GET " + path, *upgrade, key=key))
    assert (await client.answer()).status == 403
    assert gateway.llm.is_untouched()
    assert gateway.raw.is_untouched()


async def test_an_unknown_model_names_the_known_ones(gateway: Gateway) -> None:
    status, body, _ = await _refused(gateway, request(b"POST " + CHAT, body=b'{"model":"gpt-9"}'))
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert "known: m, m2" in body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"{", "(byte 1)"),
        (b'{"model": nope}', "(byte 14)"),
        (b"", "(byte 0)"),
        (b'{"x":' + b"[" * 100_000, "deeply"),
        (b"[]", "object"),
    ],
)
async def test_invalid_json_is_refused_with_its_place(gateway: Gateway, body: bytes, where: str) -> None:
    status, answer, _ = await _refused(gateway, request(b"POST " + CHAT, body=body))
    assert (status, answer["error"]["code"]) == (400, "INVALID_JSON")
    assert where in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"{}", b'{"model":""}', b'{"model":5}', b'{"model":null}'])
async def test_a_body_without_a_model_is_refused_by_name(gateway: Gateway, body: bytes) -> None:
    status, answer, _ = await _refused(gateway, request(b"POST " + CHAT, body=body))
    assert (status, answer["error"]["param"]) == (400, "model")


DIALECTS = {
    b"/v1/chat/completions": {"error"},
    PREFIX + b"/v1/embeddings": {"error"},
    b"/v1/messages": {"type", "error", "request_id"},
    b"/v1/messages/count_tokens?beta=true": {"type", "error", "request_id"},
    PREFIX + b"/v2/models/m/infer": {"error", "code", "request_id"},
    PREFIX + b"/mcp/tools": {"jsonrpc", "id", "error"},
    PREFIX: {"error", "code", "request_id"},
    RAW + b"/x": {"error", "code", "request_id"},
    PREFIX + b"/upstreams/llm/v1/chat/completions": {"error"},
}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (b"/chat/completions", "no path '/chat/completions'; the base URL of SDKs ends in /v1 here"),
        (b"/embeddings?x=1", "no path '/embeddings'; the base URL of SDKs ends in /v1 here"),
        (PREFIX + b"/chat/completions", "are: instances, mcp, upstreams, v1, v2"),
        (PREFIX + b"/upstreams/nope/v1/chat/completions", "no upstream 'nope'; known: llm, raw, tools"),
        (PREFIX + b"/upstreams/nope/v1/messages", "no upstream 'nope'; known: llm, raw, tools"),
    ],
)
async def test_an_sdk_with_a_wrong_base_url_is_told_so_in_its_dialect(
    gateway: Gateway, target: bytes, message: str
) -> None:
    status, body, _ = await _refused(gateway, request(b"POST " + target, body=CHAT_BODY))
    assert status == 404
    assert message in body["error"]["message"]
    assert ("type" in body) == target.endswith(b"/messages")


@pytest.mark.parametrize("target", [PREFIX + b"/nope/x", PREFIX + b"/upstreams/nope/x"])
async def test_others_are_told_in_the_gateways_own_form(gateway: Gateway, target: bytes) -> None:
    status, body, _ = await _refused(gateway, request(b"POST " + target, body=CHAT_BODY))
    assert (status, set(body)) == (404, {"error", "code", "request_id"})


@pytest.mark.parametrize("target", DIALECTS)
async def test_a_refusal_speaks_the_dialect_of_its_path(gateway: Gateway, target: bytes) -> None:
    status, body, fields = await _refused(gateway, request(b"POST " + target, body=CHAT_BODY, key=b""))
    assert status == 401
    assert set(body) == DIALECTS[target]
    assert fields[b"content-type"] == b"application/json"
    if "messages" in target.decode():
        assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
    elif "jsonrpc" in body:
        assert (body["jsonrpc"], body["id"], body["error"]["data"]["code"]) == ("2.0", None, "UNAUTHORIZED")
    elif set(body) == {"error"}:
        assert body["error"]["code"] == "invalid_api_key"


async def test_an_upstream_failure_speaks_the_dialect_too(gateway: Gateway) -> None:
    client = await gateway.ask(request(b"POST /v1/messages", body=CHAT_BODY))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    upstream.close()
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["type"]) == (502, "api_error")


async def test_head_is_refused_without_a_body(gateway: Gateway) -> None:
    client = await gateway.ask(
        request(b"HEAD " + RAW + b"/x", key=b"") + request(b"GET " + RAW + b"/x", id=b"t2", key=b"")
    )
    answer = await client.answer(b"HEAD")
    assert (answer.status, int(answer.field(b"content-length") or 0) > 0) == (401, True)
    assert (await client.answer()).status == 401


@pytest.mark.parametrize("target", [b"/nowhere/x", b"/%6clm/x", b"/"])
async def test_an_unknown_upstream_names_the_known_ones(gateway: Gateway, target: bytes) -> None:
    status, body, _ = await _refused(gateway, request(b"GET " + PREFIX + b"/upstreams" + target))
    assert (status, body["code"]) == (404, "UNKNOWN_UPSTREAM")
    assert "llm, raw, tools" in body["error"]


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE", b"OPTIONS"])
async def test_the_envelope_takes_post_only(gateway: Gateway, method: bytes) -> None:
    client = await gateway.ask(request(method + b" " + ENVELOPE))
    answer = await client.answer()
    assert (answer.status, answer.field(b"allow")) == (405, b"POST")
    assert answer.json()["code"] == "METHOD_NOT_ALLOWED"


async def test_a_full_journal_takes_no_more_calls(serve: Serve) -> None:
    gateway = await serve(journal={"bytes_max": 100})
    client = await gateway.ask(request(b"GET " + RAW + b"/x"))
    upstream = await gateway.raw.accept()
    await upstream.read_head()
    await upstream.send(OK)
    await client.expect(OK_SENT)
    await gateway.receipt()
    gateway.plane.journal.measure()
    await client.send(request(b"GET " + RAW + b"/x"))
    answer = await client.answer()
    assert (answer.status, answer.json()["code"], answer.field(b"retry-after")) == (503, "JOURNAL_FULL", b"5")
    gateway.started.pop()  # a refusal costs nobody anything: it is counted, not kept
    assert gateway.plane.journal.refusals_dropped == 1


async def test_replicas_take_calls_in_turn_and_stand_in_for_each_other(serve: Serve) -> None:
    gateway = await serve(llm={"urls": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}, raw={"models": ["r"]})
    client = await gateway.ask(request(b"POST " + CHAT, body=CHAT_BODY))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (502, "UPSTREAM_UNREACHABLE")
    assert (await gateway.receipt()).attempts == 2
