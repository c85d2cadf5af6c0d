"""Usage of an event stream: what the upstream tells, else what can be counted of what was delivered.

A stream that was cut, or whose upstream tells no usage, is metered by its events: each carries a token or more, so
their number never says more than was delivered. The input is then estimated from the size of the request.
"""

import re
from typing import Any

import msgspec
from msgspec import Struct

from gpuproxy.plugin import EventFilter, Usage, UsageReader
from gpuproxy_plugins.openinference_ask import are_events_amid
from gpuproxy_plugins.openinference_usage import (
    BYTES_PER_TOKEN,
    UNREADABLE,
    WORD,
    Counts,
    last_counts,
    model_told,
    tokens,
    usage_of,
)

_END_MARKERS = (
    b"data: [DONE]",
    b"data:[DONE]",
    b'"message_stop"',
    b'"response.completed"',
    b'"response.incomplete"',
    b'"response.failed"',
)
# Of the last piece that are searched; a Responses stream repeats its whole answer at the end.
_MARKER_BYTES_MAX = 65_536


# In a text the quotes are escaped, and a line does not end. Two patterns: each begins with what it is searched by.
# Some servers write an empty reason in every event.
_REASON = re.compile(rb'"finish_reason": ?"[^"]')
_DONE = re.compile(rb'\ndata: ?(?:\[DONE\]|\{"error": ?["{]|\{"object": ?"error")')
_INDEX = re.compile(rb'"index": ?([0-9]{1,3})[,}]')
_SPACED_NULL = b'"usage": null'
_SEAM_BYTES = 64  # hold the end of a stream: [DONE], or the whole event message_stop


class Carrier(Struct, gc=False):
    """An object within an event that carries usage."""

    model: Any = None
    usage: Counts | None = None


class TgiDetails(Struct, gc=False):
    """What Text Generation Inference tells in the last event of its own stream."""

    generated_tokens: int | None = None
    input_length: int | None = None


class Event(Struct, gc=False):
    """A stream's event: usage at the top, in ``response`` (Responses API) or in ``message`` (Anthropic)."""

    model: Any = None
    usage: Counts | None = None
    response: Carrier | None = None
    message: Carrier | None = None


class TgiEvent(Struct, gc=False):
    """An event of TGI's own stream."""

    details: TgiDetails | None = None


class Marker(Struct, frozen=True, gc=False):
    """How the events that carry tokens are told from the others.

    `text` stands once in each of them and only at a line's border, so never in a text. Of those counted, `first_count`
    at the start carry none (a chat's first event names the role), and with `has_reason` neither does the event
    that names the reason of the end, nor any behind it. Nor does one that tells of an error. Of several answers in one
    stream each has its own first event and its own end.
    """

    text: bytes
    first_count: int = 0
    has_reason: bool = False


_DATA = b"\ndata:"

CHAT = Marker(_DATA, 1, True)
ANTHROPIC = Marker(b"\nevent: content_block_delta")
RESPONSES = Marker(b".delta\n")
GENERATE = Marker(_DATA)  # Open Inference and TGI: each is a token, and nothing marks the end

TGI_ROOTS = (b"", b"/")  # where Hugging Face's clients call a server of theirs, streamed or not

_decode_event = msgspec.json.Decoder(Event).decode
_decode_tgi_event = msgspec.json.Decoder(TgiEvent).decode


def marker_of(path: bytes) -> Marker:
    """Return how to count the events of an answer to a call of this path."""
    route = path.partition(b"?")[0]
    if route.endswith(b"/messages"):
        return ANTHROPIC
    if route.endswith(b"/responses"):
        return RESPONSES
    return GENERATE if route.endswith(b"/generate_stream") or route in TGI_ROOTS else CHAT


class StreamUsageReader(EventFilter):
    """Usage of an event stream; `request_bytes` is the size of the request's body, `choice_count` what it asks for."""

    __slots__ = ("_choices", "_count", "_counts", "_is_between", "_is_over", "_marker", "_open_count",
                 "_request_bytes", "_seam", "_text", "response_model")  # fmt: skip

    word = WORD
    dull = b'"usage":null'  # on every event of a stream whose usage comes at the end

    def __init__(self, marker: Marker = CHAT, request_bytes: int = 0, choice_count: int = 1) -> None:
        super().__init__()
        self._counts: Counts | None = None
        self._marker = marker
        self._text = marker.text
        self._request_bytes = request_bytes
        self.response_model = ""
        self._count = 0
        self._is_over = False  # what comes now carries no tokens
        self._seam = b"\n"  # the end of what was fed
        self._open_count = choice_count  # answers whose end is still to come
        self._choices: set[bytes] | None = set() if choice_count > 1 else None  # seen, for a server may give fewer
        self._is_between = self._text == _DATA and choice_count == 1  # events, so that a whole one counts as one

    @property
    def is_terminal(self) -> bool:
        """Tell whether the stream's own end marker has just passed: SDKs hang up at it, and have it all."""
        return any(marker in self._last[-_MARKER_BYTES_MAX:] for marker in _END_MARKERS)

    def feed(self, data: bytes) -> None:
        """Look at the next bytes. Whole events from the middle of a chat, as nearly all are, are just counted."""
        if self._is_between and are_events_amid(data) and self.is_dull(data):
            self._last = self._seam = data
            if not self._is_over:
                self._count += 1 + data.count(_DATA)
            return
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data
        seam = self._seam[-_SEAM_BYTES:]
        joined = seam + lines
        self._seam = joined[-_SEAM_BYTES:]
        if not self._is_over:
            text = self._text
            start = len(seam) - len(text) + 1
            self._count += joined.count(text, start if start > 0 else 0)
            if text == _DATA:
                self._look_for_end(joined, len(seam))
        super().feed(data)
        is_between = self._held is None and self._seam[-2:] == b"\n\n" and self._text == _DATA
        self._is_between = is_between and self._choices is None

    def _look_for_end(self, joined: bytes, seen: int) -> None:
        """Look for ends in what was fed, whose first `seen` bytes have been looked at before."""
        done = _DONE.search(joined)
        end = len(joined) if done is None else done.start()
        reasons = _REASON.finditer(joined, 0, end) if self._marker.has_reason else iter(())
        for reason in reasons:
            if reason.end() > seen:
                self._count -= 1
                self._open_count -= 1
                if not self._open_count:
                    end = reason.start()
                    break
        if self._choices is not None:
            self._choices.update(_INDEX.findall(joined, 0, end))
        if end < len(joined):
            self._is_over = True
            self._count -= joined.count(self._text, end)

    def take(self, data: bytes) -> None:
        """Read one event that mentions usage."""
        try:
            event = _decode_event(data)
        except UNREADABLE:
            self._merge(last_counts(data))  # foreign fields of these names, or text that merely looks like it
            return
        teller = event.response or event.message or event
        self.response_model = model_told(teller.model) or self.response_model
        if event.usage is not None:
            self._merge(event.usage)
        elif event.response is not None:
            self._merge(event.response.usage)
        elif event.message is not None:
            self._merge(event.message.usage)
        elif self._marker is CHAT and data.find(_SPACED_NULL) < 0:  # elsewhere a model's own objects pass
            self._merge(last_counts(data))  # in a choice, as Moonshot tells it, or in ``x_groq``

    def take_tail(self, tail: bytes) -> None:
        """Read the end of an event too long to be held."""
        self._merge(last_counts(tail))

    def finish(self) -> Usage | None:
        """Return what was used, None if the stream told and delivered nothing."""
        self.flush()
        return self._used()

    def so_far(self) -> Usage:
        """Return what was delivered by now, but for an event that is not whole yet."""
        return self._used() or Usage(-1, -1, 0, "estimated")

    def _used(self) -> Usage | None:
        told, delivered = usage_of(self._counts), self._delivered()
        estimated = self._request_bytes // BYTES_PER_TOKEN
        if told is None:
            return Usage(estimated, 0, delivered, "estimated") if delivered else None
        if delivered > told.output_tokens and self._is_open(told):
            return Usage(told.input_tokens or estimated, told.cached_tokens, delivered, "estimated")
        return told

    def _delivered(self) -> int:
        choice_count = 1 if self._choices is None else len(self._choices) or 1
        is_amid = not self._is_over and self._seam[-2:] != b"\n\n"  # in an event, of which nobody has all
        return max(0, self._count - self._marker.first_count * choice_count - is_amid)

    def _is_open(self, told: Usage) -> bool:
        """Tell whether the counts are those of a beginning.

        Anthropic tells the input first, the output last; Ollama's completions tell zeros in each event but the last.
        """
        if self._marker is ANTHROPIC:
            return b'"message_stop"' not in self._seam[-_SEAM_BYTES:]
        return self._marker is CHAT and told.output_tokens == 0 and not self._is_over

    def _merge(self, counts: Counts | None) -> None:
        if self._counts is None or counts is None:
            self._counts = counts or self._counts
            return
        for field in Counts.__struct_fields__:
            if (value := getattr(counts, field)) is not None:
                setattr(self._counts, field, value)


class TgiStreamReader(StreamUsageReader):
    """Usage of Text Generation Inference's own stream: in the details of its last event."""

    __slots__ = ()

    word = b'"generated_tokens"'
    dull = b""

    def take(self, data: bytes) -> None:
        """Read the event that tells the details."""
        try:
            details = _decode_tgi_event(data).details
        except UNREADABLE:
            return
        if details is not None and tokens(details.input_length or 0, 0, details.generated_tokens or 0) is not None:
            self._counts = Counts(prompt_tokens=details.input_length or 0, completion_tokens=details.generated_tokens)

    def take_tail(self, tail: bytes) -> None:
        """Take nothing: an event with details is short."""


_: list[type[UsageReader]] = [StreamUsageReader, TgiStreamReader]
