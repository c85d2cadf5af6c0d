"""Asks a stream for its usage when the client did not, and takes the answer to that out again.

OpenAI-shaped servers tell a stream's usage only if ``stream_options.include_usage`` is true: then one more event comes
before the end, with ``usage`` and an empty list of ``choices``. Clients that did not ask may fail on it.
"""

import re

import msgspec
from msgspec import Raw, Struct

from gpuproxy.plugin import EVENT_BYTES_MAX, AnswerEditor, EventCutter

_OPTIONS = b'"stream_options":{"include_usage":true}'
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode

# What shows that the added event may be near: nothing is held back before. The quote tells a reason from null.
_NEAR = re.compile(rb'"finish_reason": ?"[^"]|"usage": ?\{')
# How servers refuse a field: by its name, or by saying that there is one too many.
_REFUSED = re.compile(
    rb"stream[-_ ]?options|include[-_ ]?usage|extra[ _](?:forbidden|inputs?|fields?|properties)|additional ?propert"
    rb"|(?:unknown|unrecognized|unexpected|unsupported) (?:request )?"
    rb"(?:argument|field|key|keyword|name|param|property)",
    re.IGNORECASE,
)
_NEAR_BYTES = 18  # a piece may end in all but the last of the longest of these
_USAGE, _NO_USAGE = b'"usage"', b'"usage":null'
_REASON = b'"finish_reason":'
_ERROR = b'"error"'


class _Added(Struct, gc=False):
    choices: list[Raw] | None = None
    usage: Raw = Raw()


_piece = b""  # what `are_events_amid` was asked about last, and what it said
_is_amid = False

_decode_added = msgspec.json.Decoder(_Added).decode


def asks_usage(options: bytes) -> bool:
    """Tell whether the client's stream_options ask for usage; such as are no object are for the upstream to judge."""
    try:
        asked = _decode_fields(options).get("include_usage", Raw(b"true"))
        return bytes(asked) == b"true"  # {} asks too, by vLLM's defaults
    except (ValueError, RecursionError):
        return options != b"null"


def asking(body: bytes, options: bytes | None) -> bytes:
    """Return the JSON object `body` with the question for usage in it; all other values stay as they are."""
    if options is not None:
        fields = _decode_fields(body)
        asked = {} if options == b"null" else _decode_fields(options)
        asked["include_usage"] = Raw(b"true")
        fields["stream_options"] = Raw(_encode(asked))
        return _encode(fields)
    start = body.index(b"{") + 1
    return b"%b%b,%b" % (body[:start], _OPTIONS, body[start:])


class UsageStripper:
    """Takes the added event out of a chat's or completion's stream.

    Bytes pass untouched until a reason of the end or a usage is seen; from there on whole events pass, so nothing a
    client waits for is ever held back.
    """

    __slots__ = ("_cutter", "_has_cut_crlf", "_seam")

    def __init__(self) -> None:
        self._cutter: EventCutter | None = None  # None: the added event is not near yet
        self._seam = b""
        self._has_cut_crlf = False  # what was taken out ended in a CR, whose LF may follow

    def was_refused(self, body: bytes) -> bool:
        """Tell whether an answer 400 or 422 refuses the question for usage."""
        return _REFUSED.search(body) is not None

    def edit(self, data: bytes, is_last: bool) -> bytes:
        """Return what of the stream so far may be sent now."""
        if self._cutter is None:
            if are_events_amid(data):
                self._seam = data[-_NEAR_BYTES:]
                return data
            joined = self._seam + data
            near = _NEAR.search(joined)
            if near is None:
                self._seam = joined[-_NEAR_BYTES:]
                return data
            self._cutter = EventCutter()
            at = data.rfind(b"\n\n", 0, max(near.start() - len(self._seam), 0)) + 2
            if at >= 2:
                return data[:at] + self.edit(data[at:], is_last)
        cutter = self._cutter
        kept = [self._without_added(event) for event in cutter.feed(data)]
        if is_last or cutter.held_bytes > EVENT_BYTES_MAX:
            kept.append(self._without_added(cutter.spill()))
        return b"".join(kept)

    def _without_added(self, event: bytes) -> bytes:
        """Return the event; of the added one only an LF that belongs to the CR at the end of the one before."""
        if self._has_cut_crlf:
            event = event.removeprefix(b"\n")
            self._has_cut_crlf = False
        if _USAGE not in event or not _is_added(event):
            return event
        self._has_cut_crlf = event.endswith(b"\r")
        return event[: event.startswith(b"\n")]


def are_events_amid(data: bytes) -> bool:
    """Tell whether a piece is whole events from the middle of a chat, as nearly all are: no end is in it.

    On every piece of every stream: plain searches, no pattern. Stripper and reader ask about the same piece one after
    the other, so the last answer is kept.
    """
    global _piece, _is_amid
    if data is not _piece:
        _piece = data
        _is_amid = data[:5] == b"data:" and data[-2:] == b"\n\n" and data.find(b"\r") < 0 and _has_no_end(data)
    return _is_amid


def _has_no_end(events: bytes) -> bool:
    if events.find(b"\n") == len(events) - 2:  # one event, of one line
        at = events.rfind(_REASON) + len(_REASON)
        return at > len(_REASON) and (events[at : at + 4] == b"null" or events[at : at + 5] == b" null")
    reasons = events.count(_REASON)
    is_open = not reasons or reasons in (events.count(_REASON + b"null"), events.count(_REASON + b" null"))
    return (
        is_open
        and events.find(b"[DONE]") < 0
        and events.find(_ERROR) < 0
        and events.count(_USAGE) == events.count(_NO_USAGE)
    )


def _is_added(event: bytes) -> bool:
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        added = _decode_added(b"\n".join(lines))
    except (ValueError, RecursionError):
        return False
    return added.choices == [] and bytes(added.usage) not in (b"", b"null")


_: type[AnswerEditor] = UsageStripper
