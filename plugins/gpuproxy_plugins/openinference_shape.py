"""Which route an envelope's body is for when its target names none: decided by the fields it has.

First match wins: ``messages``, ``input``, ``prompt``, tensor ``inputs``, ``text_input``, text ``inputs``. A chat or a
prompt with fields that only Ollama has goes to its own route: under /v1 it would not heed them.
"""

from urllib.parse import quote

import msgspec
from msgspec import Raw

from gpuproxy.plugin import Call, GatewayError

Fields = dict[str, Raw]

_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_list = msgspec.json.Decoder(list[Fields]).decode
_decode_string = msgspec.json.Decoder(str).decode
_OLLAMA = frozenset(("options", "keep_alive", "think", "raw", "template"))
_KNOWN = "messages, input, prompt, inputs, text_input"


def completed_path(call: Call) -> bytes | None:
    """Return the path for an envelope whose target has none or ends in ``/v1``; None to keep it.

    Raises GatewayError BAD_REQUEST when the body fits no route, or a V2 one without a model.
    """
    route, mark, query = call.path.partition(b"?")
    base = route.rstrip(b"/")
    if call.method != b"POST" or not call.body or not (base == b"" or base.endswith(b"/v1")):
        return None
    found = _route(call, call.body)
    if base == b"":
        if found is None:
            raise GatewayError("BAD_REQUEST", f"target_url has no path and the body none of {_KNOWN}; name the path")
        return found + mark + query
    if found is None or not found.startswith(b"/v1/"):
        return None
    return base + found[3:] + mark + query


def _route(call: Call, body: bytes) -> bytes | None:
    """Return the route for the body's fields, None if none fits."""
    try:
        fields = _decode_fields(body)
    except (ValueError, RecursionError):
        return None
    if "messages" in fields:
        return _chat_route(call, fields)
    if "input" in fields:
        return _input_route(fields)
    if "prompt" in fields:
        return b"/v1/completions" if _OLLAMA.isdisjoint(fields) else b"/api/generate"
    return _v2_route(call, fields)


def _chat_route(call: Call, fields: Fields) -> bytes:
    if not _OLLAMA.isdisjoint(fields):
        return b"/api/chat"
    is_anthropic = "system" in fields or "anthropic_version" in fields or call.header(b"anthropic-version") is not None
    return b"/v1/messages" if is_anthropic else b"/v1/chat/completions"


def _input_route(fields: Fields) -> bytes:
    if "encoding_format" in fields or "dimensions" in fields:
        return b"/v1/embeddings"
    return b"/v1/responses"


def _v2_route(call: Call, fields: Fields) -> bytes | None:
    """Return the route for V2 tensors, V2 text or TGI's own text."""
    verb = b"generate_stream" if _bytes_of(fields, "stream") == b"true" else b"generate"
    if "inputs" in fields and _has_tensors(fields["inputs"]):
        return b"/v2/models/" + _model(fields) + b"/infer"
    if "text_input" in fields:
        return b"/v2/models/" + _model(fields) + b"/" + verb
    if "inputs" in fields:
        return b"/" + verb
    return None


def _has_tensors(inputs: Raw) -> bool:
    try:
        items = _decode_list(inputs)
    except (ValueError, RecursionError):
        return False
    return bool(items) and "datatype" in items[0]


def _model(fields: Fields) -> bytes:
    """Return the model of a V2 body as a path segment."""
    for name in ("model", "model_name"):
        try:
            model = _decode_string(fields.get(name, b'""'))
        except (ValueError, RecursionError):
            continue
        if model:
            return quote(model, safe="").encode()
    raise GatewayError("BAD_REQUEST", "the body names no model; set `model`, or name the path", param="model")


def _bytes_of(fields: Fields, name: str) -> bytes:
    return bytes(fields[name]) if name in fields else b""
