"""Protocol "https" touches nothing but an envelope's missing Content-Type."""

import json

from gpuproxy_plugins.https import Https

from gpuproxy.plugin import Call, GatewayError, Intent, UpstreamRequest

HTTPS = Https()


def test_a_plain_call_is_left_alone() -> None:
    call = Call(b"POST", b"/x", [], None)
    assert HTTPS.prepare(call, Intent()) == UpstreamRequest()


def test_a_json_object_in_an_envelope_is_sent_as_json() -> None:
    call = Call(b"POST", b"/x", [], b' {"a":1}', is_envelope=True)
    assert HTTPS.prepare(call, Intent()).headers == [(b"Content-Type", b"application/json")]


def test_the_callers_content_type_stays() -> None:
    call = Call(b"POST", b"/x", [(b"CONTENT-TYPE", b"text/plain")], b'{"a":1}', is_envelope=True)
    assert HTTPS.prepare(call, Intent()) == UpstreamRequest()


def test_a_text_body_gets_no_type() -> None:
    assert HTTPS.prepare(Call(b"POST", b"/x", [], b"hello", is_envelope=True), Intent()) == UpstreamRequest()
    assert HTTPS.prepare(Call(b"GET", b"/x", [], None, is_envelope=True), Intent()) == UpstreamRequest()


def test_errors_have_the_gateways_own_shape() -> None:
    told = json.loads(HTTPS.refuse(b"/x", GatewayError("TARGET_FORBIDDEN", "no"), "r1"))
    assert told == {"error": "no", "code": "TARGET_FORBIDDEN", "request_id": "r1"}
