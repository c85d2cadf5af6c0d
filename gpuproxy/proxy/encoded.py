"""Usage of answers that an upstream compresses although it was asked not to: the reader sees them decoded.

The client gets the bytes as they came. What cannot be decoded is not read on; what was read before it counts.
"""

from typing import Any

from gpuproxy.codec.content_coding import Decoder, UnreadableError, decoder_of
from gpuproxy.plugin import UsageReader


class EncodedReader:
    """Shows a reader decoded content; in all else it is that reader."""

    def __init__(self, reader: UsageReader, decoder: Decoder) -> None:
        self._reader = reader
        self._decoder: Decoder | None = decoder

    def feed(self, data: bytes) -> None:
        """Let the reader look at what the next bytes decode to."""
        if self._decoder is None:
            return
        try:
            for piece in self._decoder.feed(data):
                self._reader.feed(piece)
        except UnreadableError:
            self._decoder = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def decoded(body: bytes, coding: bytes) -> bytes:
    """Return what a whole body of a Content-Encoding decodes to, nothing if it cannot be decoded."""
    decoder = decoder_of(coding)
    try:
        return b"" if decoder is None else b"".join(decoder.feed(body))
    except UnreadableError:
        return b""


def reader_of_encoded(reader: UsageReader | None, coding: bytes) -> UsageReader | None:
    """Return a reader for content of a Content-Encoding, None if there is none or it cannot be decoded."""
    decoder = None if reader is None else decoder_of(coding)
    return None if reader is None or decoder is None else EncodedReader(reader, decoder)
