"""Server-Sent Events as bytes: where events end, what they carry, which of them contain a word.

Nothing here changes what is forwarded. A line ends in LF, CRLF or CR, and an empty line ends an event
(WHATWG HTML §9.2.6). Line ends are made LF first; an LF at the head of an event, left over from a CRLF that
was split, is an empty line and means nothing.
"""

from collections.abc import Iterator

EVENT_BYTES_MAX = 262_144  # token events are under 1 KiB; a `response.completed` can be longer
TAIL_BYTES = 65_536  # what is shown of a longer event: usage stands near the end

_SLACK_BYTES = 8  # line ends around an event, so that the limits hold however it was split
_EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _with_lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def _payload(event: bytes) -> bytes:
    """Return the ``data`` lines of an event with LF line ends, joined by LF."""
    lines = event.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])


def event_payloads(body: bytes) -> Iterator[bytes]:
    """Yield the data of every event of a whole stream; events without data are left out."""
    for event in _with_lf(body).split(b"\n\n"):
        if data := _payload(event.lstrip(b"\n")):
            yield data


class EventFilter:
    """Watches a stream pass and picks out the few events that contain ``word``.

    A subclass sets ``word`` and overrides `take`. The result does not depend on how the stream was split. At
    most EVENT_BYTES_MAX and one chunk are held; of a longer event only its last TAIL_BYTES are shown. A
    subclass may name a form of the word, ``dull``, that events may be skipped for when they have no other.
    """

    __slots__ = ("_ended_in_cr", "_held", "_is_long", "_last")

    word: bytes = b""
    dull: bytes = b""

    def __init__(self) -> None:
        self._held: bytearray | None = None
        self._is_long = False
        self._last = b""  # what was fed last
        self._ended_in_cr = False

    def take(self, data: bytes) -> None:
        """Be told the data of one event that contains the word."""

    def take_tail(self, tail: bytes) -> None:
        """Be told the last bytes of an over-long event, if the word is among them."""

    def feed(self, data: bytes) -> None:
        """Look at the next bytes. Whole events without the word, the common case, cost two searches."""
        self._last = data
        if self._held is None and data.endswith(_EVENT_ENDS) and self.is_dull(data):
            return
        self._cut(data)

    def is_dull(self, data: bytes) -> bool:
        """Tell whether the word is nowhere in it but in its dull form. `find`, since `in` takes twice the time."""
        return data.find(self.word) < 0 or data.count(self.word) == data.count(self.dull)

    def flush(self) -> None:
        """Treat what is held as the last event: its empty line may be missing."""
        if self._held is not None:
            self._show(bytes(self._held))
            self._held = None

    def _cut(self, data: bytes) -> None:
        """Take all whole events out of what is held plus `data`, and hold the rest."""
        if not data:
            return
        if self._ended_in_cr:
            data = data.removeprefix(b"\n")
        self._ended_in_cr = data.endswith(b"\r")
        held = bytearray() if self._held is None else self._held
        seen = max(len(held) - 1, 0)  # an event's end may lie across the border
        held += _with_lf(data)
        end = held.rfind(b"\n\n", seen) + 2
        if end >= 2:
            self._show_all(bytes(held[:end]))
            del held[:end]
        if len(held) > EVENT_BYTES_MAX + _SLACK_BYTES:
            del held[: -TAIL_BYTES - _SLACK_BYTES]
            self._is_long = True
        self._held = held or None

    def _show_all(self, events: bytes) -> None:
        """Show the events that contain the word; the others are never cut out."""
        start = 0
        if self._is_long:
            start = events.find(b"\n\n") + 2
            self._show(events[:start])
        while (found := events.find(self.word, start)) >= 0:
            start = max(events.rfind(b"\n\n", start, found), start)
            end = events.find(b"\n\n", found)
            self._show(events[start:end])
            start = end + 2

    def _show(self, event: bytes) -> None:
        event = event.strip(b"\n")
        is_long, self._is_long = self._is_long or len(event) > EVENT_BYTES_MAX, False
        shown = event[-TAIL_BYTES:] if is_long else event
        if self.word not in shown:
            return
        if is_long:
            self.take_tail(shown)
        else:
            self.take(_payload(event))
