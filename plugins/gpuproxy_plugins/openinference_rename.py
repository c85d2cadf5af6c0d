"""Another name for the model of a call, put in its place byte by byte: nothing else of the call changes.

The body is not decoded and encoded anew: key order, spacing, numbers and unknown fields stay as the client wrote them.
"""

import re
from collections.abc import Iterator
from urllib.parse import quote

import msgspec

from gpuproxy.plugin import Call, GatewayError
from gpuproxy_plugins.multipart import field_span, is_form
from gpuproxy_plugins.openinference_intent import model_of
from gpuproxy_plugins.openinference_realtime import names_model_in_events

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_VALUE = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")', re.DOTALL)
_QUERY = re.compile(rb"(^|&)(model|deployment)=[^&]*")


def renamed(call: Call, path: bytes, body: bytes | None, model: str) -> tuple[bytes, bytes | None]:
    """Return path and body with `model` as the name. Raises BAD_REQUEST if the name cannot be put everywhere."""
    if names_model_in_events(call.method, path):
        message = "this model has another name at its upstream, which events on a WebSocket cannot be given"
        raise GatewayError("BAD_REQUEST", f"{message}; call /v1/responses by POST", param="model")
    content_type = call.header(b"content-type") or b""
    if body and is_form(content_type):
        return path, _form(body, content_type, model)
    if body and call.method == b"POST" and path.startswith(b"/v1/"):
        return path, _json(body, model)
    return _path(path, quote(model, safe="").encode()), body


def _json(body: bytes, model: str) -> bytes:
    name = msgspec.json.encode(model)
    spans = _spans(body)
    first = next(spans, None)
    if first is not None:
        changed = _replaced(body, [first], name)
        if model_of(changed) == model:
            return changed
        changed = _replaced(body, [first, *spans], name)  # it stands there twice, and readers differ in which counts
        if model_of(changed) == model:
            return changed
    raise GatewayError("BAD_REQUEST", "the body writes the key `model` with escapes; write it plainly", param="model")


def _spans(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the values of the key ``model`` stand in the outermost object."""
    depth = 0
    for token in _TOKEN.finditer(body):
        kind = body[token.start()]
        if kind in b"{[":
            depth += 1
        elif kind in b"}]":
            depth -= 1
        elif depth == 1 and token[0] == b'"model"' and (value := _VALUE.match(body, token.end())):
            yield value.span(1)


def _replaced(body: bytes, spans: list[tuple[int, int]], name: bytes) -> bytes:
    parts, at = [], 0
    for start, end in spans:
        parts += [body[at:start], name]
        at = end
    return b"".join([*parts, body[at:]])


def _form(body: bytes, content_type: bytes, model: str) -> bytes:
    span = field_span(body, content_type, b"model")
    return body if span is None else _replaced(body, [span], model.encode())


def _path(path: bytes, name: bytes) -> bytes:
    """Return the path with another name where `intent_of_path` has read one."""
    route, mark, query = path.partition(b"?")
    before, marker, after = route.partition(b"/models/")
    if not marker:
        return route + mark + _QUERY.sub(lambda found: found[1] + found[2] + b"=" + name, query, count=1)
    rest = b"" if route.startswith(b"/v1/") else after.partition(b"/")[2]
    return before + marker + name + (b"/" + rest if rest else b"") + mark + query
