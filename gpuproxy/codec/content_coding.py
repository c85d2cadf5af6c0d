"""Decodes compressed content (RFC 9110 §8.4.1) for who reads along; what is passed on stays as it is.

gzip and deflate always; br and zstd where Python, or a package that happens to be there, can. Pieces are small, and of
content that grows too much none come any more: it may have been made to keep a reader busy.
"""

import importlib
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

PIECE_BYTES = 65_536
GROWTH_MAX = 64  # times; streams of tokens grow tenfold, and twentyfold if they are compressed as a whole
FREE_BYTES = 1_048_576  # of decoded content that may come of however little

_Decode = Callable[[bytes], Iterator[bytes]]


class UnreadableError(Exception):
    """The content is not coded as it says, or grows too much."""


class Decoder:
    """Decodes one content."""

    __slots__ = ("_allowed_bytes", "_decode", "_errors")

    def __init__(self, decode: _Decode, errors: tuple[type[Exception], ...]) -> None:
        self._decode = decode
        self._errors = errors
        self._allowed_bytes = FREE_BYTES

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what the next bytes decode to, piece by piece. Raises UnreadableError."""
        self._allowed_bytes += len(data) * GROWTH_MAX
        try:
            for piece in self._decode(data):
                self._allowed_bytes -= len(piece)
                if self._allowed_bytes < 0:
                    raise UnreadableError(f"it grows over {GROWTH_MAX} times")
                yield piece
        except self._errors as error:
            raise UnreadableError(str(error)) from None


def decoder_of(coding: bytes) -> Decoder | None:
    """Return a decoder for content of a Content-Encoding, None for those that cannot be decoded here."""
    name = coding.strip().lower()
    if name in (b"gzip", b"x-gzip"):
        return Decoder(_Inflater(lambda _: zlib.MAX_WBITS + 16).decode, (zlib.error,))
    if name == b"deflate":
        return Decoder(_Inflater(_window_of_deflate).decode, (zlib.error,))
    if name == b"br" and hasattr(brotli := _module("brotli"), "Decompressor"):
        return Decoder(_unbrotli(brotli), (brotli.error, TypeError))  # TypeError: an old one knows no limit
    if name == b"zstd" and (zstd := _module("compression.zstd")) is not None:
        return Decoder(_unzstd(zstd), (zstd.ZstdError, EOFError))
    return None


def _window_of_deflate(data: bytes) -> int:
    """Return the window for "deflate": in zlib's format as it should be, or without, as some servers send it."""
    return zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS


class _Inflater:
    """Inflates one stream after the other: gzip may have several members."""

    def __init__(self, window_of: Callable[[bytes], int]) -> None:
        self._window_of = window_of
        self._stream: Any = None

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` inflates to."""
        piece = b""
        while data or len(piece) == PIECE_BYTES:  # a full piece may have left something behind
            if self._stream is None or self._stream.eof:
                if not data:
                    return
                self._stream = zlib.decompressobj(self._window_of(data))
            stream = self._stream
            if piece := stream.decompress(data, PIECE_BYTES):
                yield piece
            data = stream.unconsumed_tail or stream.unused_data


def _unbrotli(brotli: Any) -> _Decode:
    stream = brotli.Decompressor()

    def decode(data: bytes) -> Iterator[bytes]:
        while piece := stream.process(data, output_buffer_limit=PIECE_BYTES):
            yield piece
            data = b""

    return decode


def _unzstd(zstd: Any) -> _Decode:
    stream = zstd.ZstdDecompressor()

    def decode(data: bytes) -> Iterator[bytes]:
        while not stream.eof and (data or not stream.needs_input):
            if piece := stream.decompress(data, PIECE_BYTES):
                yield piece
            data = b""

    return decode


@lru_cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
