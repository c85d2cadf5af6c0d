"""Where an inference call wants to go: its model, read from the body (JSON or form) or from the path."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Raw, Struct

from gpuproxy.plugin import Call, GatewayError, Intent, has_dot_segments
from gpuproxy_plugins.multipart import form_fields, is_form
from gpuproxy_plugins.openinference_media import FORM_TOKENS_MAX, LONG_BODY_BYTES, input_tokens_max
from gpuproxy_plugins.openinference_realtime import is_socket, model_of_query

_MODEL_CHARS_MAX = 256  # the longest known ids (paths of fine-tunes) are under 150
_UNREADABLE = (ValueError, RecursionError)
_OLLAMA_STREAMS = (b"/api/chat", b"/api/generate")
_LATER = (b"/batches", b"/runs")  # what is done elsewhere, after the answer
# What is posted there tells of things that are kept (files, stored answers), and no model; moderations need not.
_KEPT = re.compile(
    rb"/v1/(?:files|uploads|batches|messages/batches|vector_stores|conversations|threads|containers|evals|skills|moderations"
    rb"|responses/[^/]+/cancel|chat/completions/[^/]+|(?:assistants|fine_tuning/jobs)/[^/]+)(?:[/?]|\Z)"
)
_EARLIER = re.compile(rb"/v1/(?:responses/[^/?]+/cancel|chat/completions/[^/?]+)(?:\?|\Z)")
_FILES = re.compile(rb"/v1/(?:files|uploads/[^/?]+/parts|containers/[^/?]+/files)/?(?:\?|\Z)")
OLLAMA_PATHS = (*_OLLAMA_STREAMS, b"/api/embed", b"/api/embeddings")  # its own, not OpenAI-shaped ones


class _Body(Struct, gc=False):
    """What routing and reserving need of a JSON body. All but the model is the upstream's to judge: any type passes."""

    model: str = ""
    stream: Any = None
    stream_options: Raw = Raw()
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    prompt: Raw = Raw()
    background: Any = None  # of a response that is fetched later


class _LooseBody(_Body, gc=False):
    """The same for calls that are routed already, in other shapes too; ``model_name`` is the V2 spelling."""

    model_name: str = ""
    options: Any = None  # Ollama's
    parameters: Any = None  # TGI's


def _decoder(body: type[_Body]) -> Callable[[bytes], Any]:
    """Return a decoder that takes no other spelling of ``model``: servers in Go would let it count. Costs 0.16 µs."""
    spellings = ["".join(letters) for letters in product(*zip("model", "MODEL", strict=True))][1:]
    strict = msgspec.defstruct("Strict", [(name, None, None) for name in spellings], bases=(body,), gc=False)
    return msgspec.json.Decoder(strict).decode


_decode = _decoder(_Body)
_decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_loosely = _decoder(_LooseBody)
_TRUE = ("true", "t", "yes", "y", "on", "1")  # as Pydantic reads text, and so most servers in Python


def intent_of_body(call: Call) -> Intent:
    """Return model and stream of a JSON or form body. Raises GatewayError: INVALID_JSON, BAD_REQUEST."""
    try:
        body = _decode(call.body or b"")
    except _UNREADABLE as error:
        content_type = call.header(b"content-type") or b""
        if is_form(content_type):
            return _intent_of_form(call.body or b"", content_type)
        raise _explained(call, error) from None
    model = body.model
    if not 0 < len(model) <= _MODEL_CHARS_MAX:
        refuse_model(model)
    return _intent(model, body, call.body or b"")


def _intent(model: str, body: _Body, content: bytes) -> Intent:
    # flat and by position: this is paid per call
    stream = body.stream
    most = 0
    if type(each := body.max_tokens) is int and each > most:
        most = each
    if type(each := body.max_completion_tokens) is int and each > most:
        most = each
    if type(each := body.max_output_tokens) is int and each > most:
        most = each
    count = body.n if type(body.n) is int and body.n > 1 else 1
    if body.prompt:
        count *= _prompt_count(bytes(body.prompt))
    options = body.stream_options
    note = bytes(options) if options else None
    is_stream = stream is True or (stream is not None and stream is not False and _is_true(stream))
    intent = Intent(model, "", None, is_stream, note, most, count)
    if len(content) > LONG_BODY_BYTES:
        intent.input_tokens_max = input_tokens_max(content)
    if body.background:
        intent.is_deferred = True
    return intent


def _is_true(value: Any) -> bool:
    return bool(value == 1 or (isinstance(value, str) and value.lower() in _TRUE))


def _prompt_count(prompt: bytes) -> int:
    """Return how many prompts a completion has: a list of texts or of lists of tokens is several."""
    if prompt[:1] != b"[":
        return 1
    parts = _decode_list(prompt)
    return len(parts) if parts and bytes(parts[0])[:1] in (b'"', b"[") else 1


def may_lack_model(path: bytes) -> bool:
    """Tell whether what is posted to a path need not name a model."""
    return _KEPT.match(path) is not None


def is_of_earlier_call(path: bytes) -> bool:
    """Tell whether the answer to a POST is that of an earlier call, which shows what that one has used."""
    return _EARLIER.search(path) is not None


def is_file(path: bytes) -> bool:
    """Tell whether what is posted to a path is a file, of any length and for no model."""
    return _FILES.match(path) is not None


def model_of(body: bytes) -> str:
    """Return the model that a body names which `intent_of_body` has read."""
    return str(_decode(body).model)


def refuse_model(model: str) -> NoReturn:
    """Raise BAD_REQUEST for a model name that is empty or too long."""
    if model:
        message = f"`model` has {len(model)} characters; at most {_MODEL_CHARS_MAX} are allowed"
    else:
        message = "the request names no model; set `model` to the id of one, or call an upstream by its name"
    raise GatewayError("BAD_REQUEST", message, param="model")


def _explained(call: Call, error: Exception) -> GatewayError:
    """Turn a decoder's failure into an error that says where and what to do."""
    encoding = call.header(b"content-encoding") or b"identity"
    if encoding.lower() != b"identity":
        what = encoding.decode("latin-1")
        return GatewayError("BAD_REQUEST", f"content-encoding {what!r} hides the model; send the body uncompressed")
    size_bytes = len(call.body or b"")
    if size_bytes == 0:
        return GatewayError("INVALID_JSON", "the body is empty; send a JSON object with `model` (byte 0)")
    if isinstance(error, RecursionError):
        return GatewayError("INVALID_JSON", "the body is not usable JSON: it is nested too deeply")
    what = str(error)
    if "$.model`" in what:
        return GatewayError("BAD_REQUEST", "`model` must be a string", param="model")
    if "$.model`" in what.lower():
        return GatewayError("BAD_REQUEST", "the body spells the key `model` in capitals; write `model`", param="model")
    where = "" if "(byte" in what or isinstance(error, msgspec.ValidationError) else f" (byte {size_bytes})"
    return GatewayError("INVALID_JSON", f"the body is not a valid JSON object: {what}{where}")


def _intent_of_form(body: bytes, content_type: bytes) -> Intent:
    """Return model and stream of a form, wherever in it they stand."""
    try:
        fields = form_fields(body, content_type, (b"model", b"stream"))
        model = fields.get(b"model", b"").decode()
    except ValueError as error:
        raise GatewayError("BAD_REQUEST", f"the form cannot be read: {error}", param="model") from None
    if not 0 < len(model) <= _MODEL_CHARS_MAX:
        refuse_model(model)
    is_stream = fields.get(b"stream", b"").lower() in (b"true", b"1")
    most = FORM_TOKENS_MAX if len(body) > FORM_TOKENS_MAX else 0
    return Intent(model, is_stream=is_stream, input_tokens_max=most)


def intent_of_path(path: bytes) -> Intent:
    """Return the model that a path names, an empty intent if it names none. Raises BAD_REQUEST.

    ``/v2/models/{m}/…``, ``/v2/repository/models/{m}/…``, ``/v1/models/{m}``, ``/v1/realtime?model={m}``.
    """
    route = path.partition(b"?")[0]
    version, *segments = route.removeprefix(b"/").split(b"/")
    if segments[:1] == [b"repository"]:
        del segments[0]
    if segments == [b"models", b"stats"] and version == b"v2":
        return Intent()  # of all models, by Triton
    if segments[:1] == [b"models"] and len(segments) > 1:
        name = b"/".join(segments[1:]) if version == b"v1" else segments[1]  # ids with a slash, unescaped
        return Intent(_model(unquote_to_bytes(name)), is_stream=segments[-1] == b"generate_stream")
    if segments in ([b"realtime"], [b"responses"]):
        return Intent(_model_of_socket(path), is_stream=True)
    return Intent()


def _model_of_socket(path: bytes) -> str:
    """Return the model that the URL of a WebSocket names. Raises BAD_REQUEST: else it could be any, for nothing."""
    model = model_of_query(path)
    if not model:
        shown = path.partition(b"?")[0].decode("latin-1")
        raise GatewayError("BAD_REQUEST", f"the URL names no model; open {shown}?model=ID", param="model")
    if len(model) > _MODEL_CHARS_MAX:
        refuse_model(model)
    return model


def _model(name: bytes) -> str:
    model = name.decode("utf-8", "replace")
    if not 0 < len(model) <= _MODEL_CHARS_MAX:
        refuse_model(model)
    return model


def refuse_dot_segments(path: bytes) -> None:
    """Raise BAD_REQUEST for ``.`` and ``..`` segments, however they are written.

    An upstream that resolves them would serve another path, so another model, than the one checked here.
    """
    if has_dot_segments(path):
        raise GatewayError("BAD_REQUEST", "the path has a dot segment; send the path it stands for")


def description(call: Call) -> Intent:
    """Return what a call that is routed already tells about model and stream; never raises."""
    if is_file(call.path):
        return Intent(is_upload=call.method == b"POST")
    try:
        if b"/v2/models/" in call.path:
            return intent_of_path(call.path[call.path.index(b"/v2/models/") :])
        if is_socket(call.method, call.path):
            return Intent(model_of_query(call.path)[:_MODEL_CHARS_MAX], is_stream=True)
        body = _decode_loosely(call.body or b"{}")
    except GatewayError:
        return Intent()
    except _UNREADABLE:
        return _description_of_form(call)
    model = _deployment(call.path) or body.model or body.model_name
    intent = _intent(model[:_MODEL_CHARS_MAX], body, call.body or b"")
    if call.path.partition(b"?")[0].endswith(b"/generate_stream") or (body.stream is None and is_ollama(call.path)):
        intent.is_stream = True
    for shape, name in ((body.options, "num_predict"), (body.parameters, "max_new_tokens")):
        if isinstance(shape, dict) and type(most := shape.get(name)) is int and most > intent.max_output_tokens:
            intent.max_output_tokens = most
    if call.path.partition(b"?")[0].rstrip(b"/").endswith(_LATER):
        intent.is_deferred = True
    return intent


def _deployment(path: bytes) -> str:
    """Return the model that a path of Azure's names, whatever the body says; empty if it names none."""
    name = path.partition(b"?")[0].partition(b"/deployments/")[2].partition(b"/")[0]
    return unquote_to_bytes(name).decode("utf-8", "replace")


def is_ollama(path: bytes) -> bool:
    """Tell whether a path is one of Ollama's own that stream unless told not to."""
    return path.partition(b"?")[0].endswith(_OLLAMA_STREAMS)


def _description_of_form(call: Call) -> Intent:
    content_type = call.header(b"content-type")
    if not call.body or content_type is None or not is_form(content_type):
        return Intent()
    try:
        return _intent_of_form(call.body, content_type)
    except GatewayError:
        return Intent()
