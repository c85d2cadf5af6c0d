"""Content is decoded whatever its coding and however it is split, and never much more of it than came."""

import gzip
import zlib
from collections.abc import Callable

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.content_coding import FREE_BYTES, GROWTH_MAX, PIECE_BYTES, UnreadableError, decoder_of

TEXT = b"".join(b'data: {"id":"%d","text":"%b"}\n\n' % (number, b"ab " * (number % 50)) for number in range(1_500))


def raw_deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def in_members(data: bytes) -> bytes:
    return gzip.compress(data[:1_000]) + gzip.compress(data[1_000:])


def flushed(data: bytes) -> bytes:
    """As a server does that sends each event at once."""
    deflater = zlib.compressobj(wbits=zlib.MAX_WBITS + 16)
    events = [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
    return b"".join(deflater.compress(each) + deflater.flush(zlib.Z_SYNC_FLUSH) for each in events) + deflater.flush()


CODED: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"gzip", gzip.compress),
    (b" X-Gzip", in_members),
    (b"GZIP", flushed),
    (b"deflate", zlib.compress),
    (b"deflate", raw_deflated),
    (b"br", lambda data: brotli.compress(data, quality=5)),
]


@pytest.mark.parametrize(("coding", "encode"), CODED)
@pytest.mark.parametrize("size", [17, 1_000, 1 << 20])
def test_content_decodes_to_what_it_was(coding: bytes, encode: Callable[[bytes], bytes], size: int) -> None:
    decoder, data = decoder_of(coding), encode(TEXT)
    assert decoder is not None
    pieces = [piece for at in range(0, len(data), size) for piece in decoder.feed(data[at : at + size])]
    assert b"".join(pieces) == TEXT
    assert max(map(len, pieces)) < 2 * PIECE_BYTES  # brotli stops soon after its limit


@given(st.sampled_from([CODED[0], CODED[4], CODED[5]]), st.integers(1, 3 * PIECE_BYTES))
def test_nothing_is_left_behind_at_the_border_of_a_piece(
    coded: tuple[bytes, Callable[[bytes], bytes]], size: int
) -> None:
    coding, encode = coded
    decoder, text = decoder_of(coding), (b"0123456789" * (size // 10 + 1))[:size]
    assert decoder is not None
    assert b"".join(decoder.feed(encode(text))) == text


@pytest.mark.parametrize(("coding", "encode"), [CODED[0], CODED[4], CODED[5]])
def test_what_grows_too_much_comes_to_an_end(coding: bytes, encode: Callable[[bytes], bytes]) -> None:
    data = encode(b"a" * (4 << 20))
    decoder, pieces = decoder_of(coding), list[bytes]()
    assert decoder is not None
    with pytest.raises(UnreadableError):
        pieces.extend(decoder.feed(data))
    assert sum(map(len, pieces)) <= FREE_BYTES + len(data) * GROWTH_MAX


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
def test_what_is_not_coded_as_it_says_cannot_be_read(coding: bytes) -> None:
    decoder = decoder_of(coding)
    assert decoder is not None
    with pytest.raises(UnreadableError):
        list(decoder.feed(b'{"usage": {"prompt_tokens": 1}}' * 4))


@pytest.mark.parametrize("coding", [b"", b"compress", b"gzip, br", b"aws-chunked"])
def test_other_codings_are_left_alone(coding: bytes) -> None:
    assert decoder_of(coding) is None
