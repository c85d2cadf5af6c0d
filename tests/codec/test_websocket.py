"""Frames are read the same however they come, and what is read is bounded."""

from collections.abc import Iterable
from typing import Any

import pytest
from frames import frame
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.websocket import BINARY, TEXT, MessageReader, close_frame, unmasked

KEY = b"\x01\xfe\x37\x80"


def cut(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Return the data in pieces of these sizes, the rest as the last."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


def read(pieces: Iterable[bytes], **says: Any) -> tuple[list[bytes], int, bool]:
    found: list[bytes] = []
    reader = MessageReader(found.append, **says)
    for piece in pieces:
        reader.feed(piece)
    return found, reader.unread_count, reader.is_between_frames


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, list[bytes], int]:
    """Return a stream of frames, the text messages in it, and how many of them are too long or compressed."""
    stream, told, unread = b"", [], 0
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from([TEXT, TEXT, BINARY]))
        parts = draw(st.lists(st.binary(max_size=draw(st.sampled_from([5, 140]))), min_size=1, max_size=4))
        key = draw(st.sampled_from([b"", KEY]))
        reserved = draw(st.sampled_from([0, 0, 0, 0x40]))
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            stream += frame(part, 0 if number else kind, is_last, key, 0 if number else reserved)
            if not is_last and draw(st.booleans()):
                stream += frame(b"still there?", 9, True, key)
        whole = b"".join(parts)
        if kind == TEXT and not reserved and len(whole) <= 200:
            told.append(whole)
        elif kind == TEXT:
            unread += 1
    return stream, told, unread


@given(messages(), st.lists(st.integers(0, 40), max_size=40))
def test_messages_do_not_depend_on_how_their_bytes_come(sent: tuple[bytes, list[bytes], int], sizes: list[int]) -> None:
    stream, told, unread = sent
    for pieces in (cut(stream, sizes), cut(stream, [1] * len(stream)), [stream]):
        assert read(pieces, limit_bytes=200) == (told, unread, True)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "masked"])
def test_every_form_of_a_length_is_understood(size: int, key: bytes) -> None:
    payload = (b"abcdefg" * (size // 7 + 1))[:size]
    whole = frame(payload, key=key)
    for pieces in ([whole], cut(whole, [1] * 20), cut(whole, [len(whole) - 1])):
        assert read(pieces) == ([payload], 0, True)


def test_only_the_kinds_asked_for_are_handed_over() -> None:
    stream = frame(b"a") + frame(b"b", BINARY) + frame(b"", 10) + frame(b"c", key=KEY)
    assert read([stream])[0] == [b"a", b"c"]
    assert read([stream], kinds=(TEXT, BINARY))[0] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("shape", ["one frame", "many frames"])
def test_a_message_over_the_limit_is_counted_and_never_held(shape: str) -> None:
    found: list[bytes] = []
    reader = MessageReader(found.append, limit_bytes=1_000)
    piece = b"x" * 600
    if shape == "one frame":
        stream = [frame(piece * 100)[:4], *[piece] * 100]
    else:
        stream = [frame(piece, 0 if number else TEXT, number == 99) for number in range(100)]
    for part in stream:
        reader.feed(part)
        assert sum(map(len, reader._message)) <= 1_000
    assert (found, reader.unread_count) == ([], 1)
    reader.feed(frame(b"next"))
    assert found == [b"next"]


@given(st.binary(max_size=300), st.lists(st.integers(0, 20), max_size=20))
def test_no_bytes_make_it_fail(data: bytes, sizes: list[int]) -> None:
    read(cut(data, sizes))


@given(st.binary(max_size=300), st.binary(max_size=60), st.integers(0, 400))
def test_what_is_left_of_a_frame_is_known_wherever_it_stands(payload: bytes, behind: bytes, at: int) -> None:
    whole = frame(payload)
    at = min(at, len(whole))
    reader = MessageReader(lambda message: None)
    reader.feed(whole[:at])
    rest = reader.rest_of_frame(whole[at:] + behind)
    if 0 < at < len(whole):
        assert rest == len(whole) - at
        reader.feed(whole[at:])
    assert reader.is_between_frames or at == 0


def test_a_close_frame_has_code_and_reason_within_what_a_control_frame_may_hold() -> None:
    assert close_frame(1008, "no credit") == b"\x88\x0b\x03\xf0no credit"
    long = close_frame(1013, "ł" * 100)
    assert len(long) == 2 + long[1] <= 127
    assert long[4:].decode() == "ł" * 61


@pytest.mark.parametrize("size", [0, 1, 7, 4_096, 4_097, 10_003])
def test_masking_twice_changes_nothing(size: int) -> None:
    payload = (b"payload" * 2_000)[:size]
    masked = unmasked(payload, KEY)
    assert masked == frame(payload, key=KEY)[-size:] if size else not masked
    assert unmasked(masked, KEY) == payload
