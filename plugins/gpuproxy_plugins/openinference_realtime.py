"""OpenAI's WebSockets: ``/v1/realtime``, and ``/v1/responses`` in its WebSocket mode.

The URL names the model, which decides where the connection goes and what it costs. The Realtime API keeps to it; in the
Responses API each event names a model, so those that name another one do not pass. Where the URL names none, as an
upstream called by its name allows, no event may: it would be served for nothing. Each answer tells its usage in its
last event; a transcription of what was said does too. What is delivered of an answer that is not over, or failed and
tells none, is counted by its events: each carries a token or more.
"""

import re
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

import msgspec
from msgspec import Struct

from gpuproxy.plugin import Call, GatewayError, Usage, UsageReader
from gpuproxy_plugins.openinference_media import input_tokens_max
from gpuproxy_plugins.openinference_usage import UNREADABLE, WORD, loose_counts, usage_of

_PATHS = (b"/realtime", b"/responses")
_DELTA = re.compile(rb'"type": ?"response\.[a-z_.]+\.delta"')
_ENDED = re.compile(rb'"type": ?"response\.(?:done|completed|incomplete|failed)"')
_SOUND = re.compile(rb'"type": ?"input_audio_buffer\.append"')
_SOUND_BYTES_PER_TOKEN = 1_000  # of base64, where it is packed most: G.711, 8,000 bytes and 10 tokens a second
_TYPE_BYTES = 256  # within which an event tells its type
_ANSWER_ENDS = ("response.done", "response.completed", "response.incomplete", "response.failed")
_TRANSCRIBED = "conversation.item.input_audio_transcription.completed"


class _Carrier(Struct, gc=False):
    usage: Any = None


class _Event(Struct, gc=False):
    type: str = ""
    response: _Carrier | None = None
    usage: Any = None


class _Named(Struct, gc=False):
    model: Any = None


class _Said(Struct, gc=False):
    """Where a client's event can name a model."""

    model: Any = None
    response: _Named | None = None
    session: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_said = msgspec.json.Decoder(_Said).decode


def is_socket(method: bytes, path: bytes) -> bool:
    """Tell whether a call may be the opening of such a connection."""
    return method == b"GET" and path.partition(b"?")[0].endswith(_PATHS)


def names_model_in_events(method: bytes, path: bytes) -> bool:
    """Tell whether the events of such a connection name a model."""
    return method == b"GET" and path.partition(b"?")[0].endswith(b"/responses")


def model_of_query(path: bytes) -> str:
    """Return the model that a path's query names, at Azure as `deployment`, empty for none. Raises BAD_REQUEST."""
    try:
        fields = parse_qs(path.partition(b"?")[2], max_num_fields=64)
    except ValueError as error:
        raise GatewayError("BAD_REQUEST", f"the query cannot be read: {error}", param="model") from None
    values = fields.get(b"model", []) + fields.get(b"deployment", [])
    if len(values) > 1:
        raise GatewayError("BAD_REQUEST", "the query names `model` twice", param="model")
    return values[0].decode("utf-8", "replace") if values else ""


class RealtimeReader:
    """Sums up the usage of all answers on a connection."""

    __slots__ = ("_cached", "_count", "_input", "_is_counted", "_is_told", "_output")

    def __init__(self) -> None:
        self._input = self._cached = self._output = 0
        self._count = 0  # events of an answer that is not over
        self._is_told = False
        self._is_counted = False  # of some answer its events alone are known

    @property
    def is_amid(self) -> bool:
        """Tell whether an answer is under way."""
        return self._count > 0

    def feed(self, data: bytes) -> None:
        """Look at one message of the upstream; most are pieces of an answer, and some of these are long."""
        if _DELTA.search(data, 0, _TYPE_BYTES) is not None:
            self._count += 1
            return
        if WORD not in data and _ENDED.search(data, 0, _TYPE_BYTES) is None:
            return
        try:
            event = _decode_event(data)
        except UNREADABLE:
            return
        if event.type in _ANSWER_ENDS:
            self._add(event.response.usage if event.response is not None else None)
        elif event.type == _TRANSCRIBED:
            self._add(event.usage, is_answer=False)

    def _add(self, counts: Any, is_answer: bool = True) -> None:
        usage = usage_of(loose_counts(counts)) if isinstance(counts, dict) else None
        if usage is not None:
            self._is_told = True
            self._input += usage.input_tokens
            self._cached += usage.cached_tokens
            self._output += usage.output_tokens
        elif is_answer and self._count:
            self._is_counted = True
            self._output += self._count
        if is_answer:
            self._count = 0

    def weigh(self, message: bytes) -> int:
        """Return the most tokens that a client's message adds to the input of the next answer."""
        if _SOUND.search(message, 0, _TYPE_BYTES) is not None:
            return len(message) // _SOUND_BYTES_PER_TOKEN
        return input_tokens_max(message)

    def so_far(self) -> Usage:
        """Return what was delivered by now."""
        is_exact = self._is_told and not self._count and not self._is_counted
        output = self._output + self._count
        return Usage(self._input, self._cached, output, "provider" if is_exact else "estimated")

    def finish(self) -> Usage | None:
        """Return what was used, None if nothing was told or delivered."""
        return self.so_far() if self._is_told or self._is_counted or self._count else None


class ResponsesReader(RealtimeReader):
    """The same where events of the client can name a model: in the Responses API, and if the URL names none."""

    __slots__ = ("_model",)

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def check(self, message: bytes) -> str:
        """Return why a client's message must not pass, empty if it may."""
        if b'"model"' not in message and b"\\u" not in message:
            return ""
        try:
            said = _decode_said(message)
        except UNREADABLE:
            return "an event names a model where it cannot be read"
        parts = [said.model, said.response.model if said.response is not None else None]
        if not self._model and isinstance(said.session, dict):
            parts.append(said.session.get("model"))
        other = next((name for name in parts if name is not None and name != self._model), None)
        if other is None:
            return ""
        if not self._model:
            return f"the URL of this connection names no model, so no event may; open it with ?model={str(other)[:40]}"
        return f"this connection is for model {self._model!r}, not {str(other)[:40]!r}"


def reader_of(call: Call) -> UsageReader | None:
    """Return the reader for a WebSocket that opens, None for one of another kind."""
    if not is_socket(call.method, call.path):
        return None
    model = ""
    with suppress(GatewayError):  # passed to an upstream by its name
        model = model_of_query(call.path)
    is_checked = not model or names_model_in_events(call.method, call.path)
    return ResponsesReader(model) if is_checked else RealtimeReader()


_: list[type[UsageReader]] = [RealtimeReader, ResponsesReader]
