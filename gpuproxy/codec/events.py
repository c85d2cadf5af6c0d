"""Server-Sent Events that are changed on their way: cut into whole ones, data and lines replaced, the rest as sent."""

import re
from collections.abc import Callable, Iterator

_LINE_END = re.compile(rb"(\r\n|\n|\r)")  # the group keeps each in what `split` gives
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")

SEAM_BYTES = 3  # an event's end may lie across what comes together

Change = Callable[[bytes], bytes]


class EventCutter:
    """Cuts a stream into whole events. Each byte is looked at once, however long an event is.

    An LF whose CR was the end of what came before begins the next event, where it means nothing.
    """

    __slots__ = ("_parts", "_seam", "held_bytes")

    def __init__(self) -> None:
        self.held_bytes = 0
        self._parts: list[bytes] = []
        self._seam = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes."""
        events: list[bytes] = []
        start, seam = 0, self._seam
        for end in _event_ends(seam + data):
            cut = end - len(seam)
            events.append(self.spill() + data[start:cut])
            start = cut
        rest = data[start:]
        self._seam = (rest if events else seam + rest)[-SEAM_BYTES:]
        if rest:
            self._parts.append(rest)
            self.held_bytes += len(rest)
        return events

    def spill(self) -> bytes:
        """Return what is held of an event, and hold it no more; its end will be found all the same."""
        parts, self._parts, self.held_bytes = self._parts, [], 0
        return b"".join(parts)


def _event_ends(data: bytes) -> Iterator[int]:
    """Yield where events end; where all lines end in LF, as nearly always, without the pattern's look at each byte."""
    if data.find(b"\r") >= 0:
        for found in _EVENT_END.finditer(data):
            yield found.end()
        return
    end = data.find(b"\n\n") + 2
    while end >= 2:
        yield end
        end = data.find(b"\n\n", end) + 2


def with_data(event: bytes, change: Change) -> bytes:
    """Return an event with its data changed; the same event if that changes nothing."""
    parts = _LINE_END.split(event)
    lines, ends = parts[::2], [*parts[1::2], b""]
    places = [at for at, line in enumerate(lines) if line.startswith(b"data:")]
    payload = b"\n".join([lines[at][5:].removeprefix(b" ") for at in places])
    changed = change(payload)
    if not places or changed == payload:
        return event
    first, rest = places[0], set(places[1:])
    lines[first] = (ends[first] or b"\n").join(b"data: " + part for part in changed.split(b"\n"))
    return b"".join([line + end for at, (line, end) in enumerate(zip(lines, ends, strict=True)) if at not in rest])


def with_lines(event: bytes, change: Change) -> bytes:
    """Return an event with each line changed."""
    parts = _LINE_END.split(event)
    parts[::2] = map(change, parts[::2])
    return b"".join(parts)
