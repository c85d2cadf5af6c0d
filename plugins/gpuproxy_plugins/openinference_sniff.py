"""Answers whose Content-Type does not tell what they are: none, or plain text. Their first bytes tell."""

from collections.abc import Callable

from gpuproxy.plugin import Usage, UsageReader
from gpuproxy_plugins.openinference_usage import JsonUsageReader

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")  # how an event can begin
_SPACE = b"\xef\xbb\xbf \t\r\n"  # and the byte order mark
_START_BYTES = 6  # tell them all apart


class SniffingReader:
    """Usage of an answer in JSON or in events; what is neither is not looked at."""

    __slots__ = ("_make_stream_reader", "_reader", "_start")

    def __init__(self, make_stream_reader: Callable[[], UsageReader]) -> None:
        self._make_stream_reader = make_stream_reader
        self._start: bytes | None = b""  # None once it is known what comes
        self._reader: UsageReader | None = None

    @property
    def is_terminal(self) -> bool:
        """Tell whether a stream's own end marker has just passed."""
        return getattr(self._reader, "is_terminal", False)

    @property
    def response_model(self) -> str:
        """Return the model that the answer says it is of."""
        return getattr(self._reader, "response_model", "")

    def feed(self, data: bytes) -> None:
        """Look at the next bytes."""
        if self._start is not None:
            self._start += data
            if len(self._start.lstrip(_SPACE)) < _START_BYTES:
                return
            self._open()
        elif self._reader is not None:
            self._reader.feed(data)

    def _open(self) -> None:
        start, self._start = (self._start or b"").lstrip(_SPACE), None
        if start.startswith((b"{", b"[")):
            self._reader = JsonUsageReader()
        elif start.startswith(_FIELDS):
            self._reader = self._make_stream_reader()
        if self._reader is not None:
            self._reader.feed(start)

    def so_far(self) -> Usage:
        """Return what was delivered by now."""
        so_far: Callable[[], Usage] | None = getattr(self._reader, "so_far", None)
        return Usage(-1, -1, 0, "estimated") if so_far is None else so_far()

    def finish(self) -> Usage | None:
        """Return what was used, None if the answer told nothing."""
        if self._start is not None:
            self._open()
        return None if self._reader is None else self._reader.finish()


_: type[UsageReader] = SniffingReader
