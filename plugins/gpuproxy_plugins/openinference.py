"""Protocol "openinference": OpenAI- and Anthropic-shaped calls under /v1, Open Inference (V2) under /v2.

Under /v1 the body names the model, so it is read whole before routing; under /v2 the path does, so bodies
(binary tensors among them) stream through unread. The methods here run once per call on the hot path; they
decode only the fields they name. They search bytes by `find`, which takes half the time of `in`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from msgspec import Struct

from gpuproxy.plugin import (
    Call,
    GatewayError,
    Intent,
    ModelLister,
    ModelOffer,
    ModelRenamer,
    ProtocolHandler,
    Registry,
    UpstreamRequest,
    UsageReader,
)
from gpuproxy_plugins.envelope import content_type_if_absent
from gpuproxy_plugins.openinference_ask import UsageStripper, asking, asks_usage
from gpuproxy_plugins.openinference_intent import (
    OLLAMA_PATHS,
    description,
    intent_of_body,
    intent_of_path,
    is_file,
    is_of_earlier_call,
    is_ollama,
    may_lack_model,
    refuse_dot_segments,
)
from gpuproxy_plugins.openinference_media import LONG_BODY_BYTES, text_size
from gpuproxy_plugins.openinference_models import asks_for_models, listing
from gpuproxy_plugins.openinference_realtime import is_socket, reader_of
from gpuproxy_plugins.openinference_refusal import refusal
from gpuproxy_plugins.openinference_rename import renamed
from gpuproxy_plugins.openinference_shape import completed_path
from gpuproxy_plugins.openinference_sniff import SniffingReader
from gpuproxy_plugins.openinference_stream import GENERATE, TGI_ROOTS, StreamUsageReader, TgiStreamReader, marker_of
from gpuproxy_plugins.openinference_usage import GeneratedReader, JsonUsageReader, LinesUsageReader, OllamaStreamReader

_JSON_STARTS = b"{ \t\r\n"  # a form may name a model too
# Wherever below its URL an upstream has them: Azure has deployments, Google /v1beta/openai, Zhipu /v4.
_SHAPES = (*OLLAMA_PATHS, b"/completions", b"/embeddings", b"/responses", b"/messages")
_PATHS_MAX = 128  # remembered: nearly all calls have one of a few, and one may have 64 KiB
JSON, EVENTS, LINES, UNTOLD, OTHER = range(5)  # kinds of content
_JSON = (b"application/json", b"text/json")
_LINES = (b"application/x-ndjson", b"application/ndjson", b"application/jsonl", b"application/stream+json")
_PLAIN = (b"", b"text/plain")  # nobody has told, or not the truth
_KINDS_MAX = 32  # of content remembered


class _Asked(Struct, frozen=True, gc=False):
    """What a reader wants to know of a call: its path at the upstream, the text it was asked with, and how often."""

    path: bytes
    text_bytes: int
    choice_count: int = 1


class OpenInference:
    """Routes by model and reads usage."""

    name: str = "openinference"
    mounts: tuple[str, ...] = ("v1", "v2")

    def needs_body(self, method: bytes, path: bytes) -> bool:
        """Whatever is posted under /v1 but files names its model in the body, and so do calls of a known shape
        elsewhere.
        """
        return method == b"POST" and _names_model_in_body(path)

    def inspect(self, call: Call) -> Intent:
        """Return model and stream. Raises GatewayError INVALID_JSON or BAD_REQUEST."""
        if (intent_of := _checked(call.path)) is not None and call.method == b"POST":
            return intent_of(call)
        if call.path.startswith(b"/v1/models") and asks_for_models(call):
            return Intent()
        return intent_of_path(call.path)

    def describe(self, call: Call) -> Intent:
        """Return the model and stream that path or body tell; an empty intent if they tell none."""
        return description(call)

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        """Ask for a readable answer; choose an envelope's path by its body's shape. Raises BAD_REQUEST."""
        if not call.is_envelope:
            is_read = _may_tell_usage(call.path) if call.method == b"POST" else is_socket(call.method, call.path)
            request = UpstreamRequest(identity=is_read)
            if intent.is_stream and call.body:
                _prepare_stream(request, call, call.path, call.body, intent)
            return request
        path = completed_path(call)
        route = call.path if path is None else path
        if path is not None:
            call.note = _Asked(path, len(call.body or b""))
        identity = call.method == b"POST" and _may_tell_usage(route)
        request = UpstreamRequest(path=path, headers=content_type_if_absent(call), identity=identity)
        if intent.is_stream and call.body:
            _prepare_stream(request, call, route, call.body, intent)
        return request

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        """Return a reader for JSON, event streams, JSON lines and WebSockets; None for errors and all else.

        A GET may show what an earlier call has used, and was counted for; so may what ends or changes an answer.
        """
        asked = _Asked(call.path, call.body_bytes) if call.note is None else call.note
        path = asked.path
        if status >= 400 or not _may_tell_usage(path):
            return None
        if call.method != b"POST":
            return reader_of(call) if status == 101 else None
        kind = JSON if content_type == b"application/json" else _kind_of(content_type)
        if kind == JSON:
            return GeneratedReader(asked.text_bytes) if _is_generate(path) else JsonUsageReader()
        if kind == EVENTS:
            return _stream_reader(asked)
        if kind == LINES:
            return OllamaStreamReader(asked.text_bytes) if is_ollama(path) else LinesUsageReader()
        return SniffingReader(lambda: _stream_reader(asked)) if kind == UNTOLD else None

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Return the answer as it is."""
        return content_type, body

    def rename(self, call: Call, path: bytes, body: bytes | None, model: str) -> tuple[bytes, bytes | None]:
        """Return path and body with another name for the model. Raises BAD_REQUEST."""
        return renamed(call, path, body, model)

    def asks_for_models(self, call: Call) -> bool:
        """Tell whether the call asks for the list of models."""
        return asks_for_models(call)

    def list_models(self, call: Call, offers: Sequence[ModelOffer]) -> bytes:
        """Return the list in the dialect of the caller. Raises METHOD_NOT_ALLOWED."""
        return listing(call, offers)

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        """Return the error in the dialect of the path."""
        return refusal(path, error, request_id)


def _prepare_stream(request: UpstreamRequest, call: Call, path: bytes, body: bytes, intent: Intent) -> None:
    if len(body) > LONG_BODY_BYTES:
        call.note = _Asked(path, text_size(body), intent.choice_count)
    elif intent.choice_count > 1:
        call.note = _Asked(path, len(body), intent.choice_count)
    if call.may_ask_usage:
        _ask_usage(request, path, body, intent.note)


def _ask_usage(request: UpstreamRequest, path: bytes, body: bytes, options: bytes | None) -> None:
    """Let the upstream tell the usage of a stream whose client did not ask for it."""
    if body[0] not in _JSON_STARTS or not path.partition(b"?")[0].endswith(b"/completions"):
        return
    if options is None or not asks_usage(options):
        request.body = asking(body, options)
        request.editor = UsageStripper()
        request.asks_usage = True


def _stream_reader(asked: _Asked) -> UsageReader:
    marker = marker_of(asked.path)
    kind = TgiStreamReader if marker is GENERATE else StreamUsageReader
    return kind(marker, asked.text_bytes, asked.choice_count)


@lru_cache(_KINDS_MAX)
def _kind_of(content_type: bytes) -> int:
    kind = content_type.partition(b";")[0].strip()
    if kind in _LINES:
        return LINES
    if kind in _JSON or kind.endswith(b"+json"):
        return JSON
    if kind == b"text/event-stream":
        return EVENTS
    return UNTOLD if kind in _PLAIN else OTHER


@lru_cache(_PATHS_MAX)
def _checked(path: bytes) -> Callable[[Call], Intent] | None:
    """Return what reads the intent from what is posted there, if not the path tells. Raises BAD_REQUEST for dots."""
    if path.find(b"/.") >= 0 or path.find(b"%") >= 0 or path.find(b"\\") >= 0:
        refuse_dot_segments(path)
    if not path.startswith(b"/v1/"):
        return None
    return description if may_lack_model(path) else intent_of_body


@lru_cache(_PATHS_MAX)
def _names_model_in_body(path: bytes) -> bool:
    route = path.partition(b"?")[0]
    if is_file(route):
        return False
    return b"/v1/" in route or b"/deployments/" in route or route.endswith(_SHAPES) or route in TGI_ROOTS


@lru_cache(_PATHS_MAX)
def _is_generate(path: bytes) -> bool:
    """Tell whether a path is TGI's or V2's own to generate a text, not Ollama's."""
    route = path.partition(b"?")[0]
    return route in TGI_ROOTS or (route.endswith(b"/generate") and not route.endswith(b"/api/generate"))


@lru_cache(_PATHS_MAX)
def _may_tell_usage(path: bytes) -> bool:
    """Tell whether an answer to a POST is worth reading; V2 tensors tell nothing, and may well be compressed."""
    return not path.partition(b"?")[0].endswith(b"/infer") and not is_of_earlier_call(path)


def register(registry: Registry) -> None:
    """Offer the protocol."""
    registry.protocol(OpenInference())


_: type[ProtocolHandler] = OpenInference
_renames: type[ModelRenamer] = OpenInference
_lists: type[ModelLister] = OpenInference
