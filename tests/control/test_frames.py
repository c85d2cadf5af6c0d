"""WebSocket's frames: what is written by the book is read however it is cut, and what is not is named by its code."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.codec.websocket import TEXT, close_frame
from gpuproxy.control.frames import (
    CLOSE,
    CONTINUATION,
    MESSAGE_BYTES_MAX,
    MESSAGE_FRAMES_MAX,
    PING,
    FrameError,
    FrameReader,
    Message,
    answering_code,
    frame,
    upgrade,
)
from gpuproxy.errors import GatewayError

SIZES = (0, 1, 3, 125, 126, 127, 300, 65_535, 65_536)


def masked(opcode: int, data: bytes, is_final: bool = True, mask: bytes | None = None) -> bytes:
    """Return a frame as a client sends it."""
    mask = os.urandom(4) if mask is None else mask
    head = frame(opcode, data)[: -len(data) or None]
    first, second = head[0] if is_final else head[0] & 0x7F, head[1] | 0x80
    return bytes((first, second)) + head[2:] + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))


@settings(max_examples=40)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4), st.integers(1, 70_000))
def test_messages_are_read_however_they_are_cut(sizes: list[int], step: int) -> None:
    sent = [Message(TEXT, bytes(size)) for size in sizes]
    stream = b"".join(masked(*message, mask=b"\1\2\3\4") for message in sent)
    reader = FrameReader()
    parts = (stream[at : at + step] for at in range(0, len(stream), step))
    assert [message for part in parts for message in reader.feed(part)] == sent


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_a_mask_is_taken_off(data: bytes, mask: bytes) -> None:
    assert FrameReader().feed(masked(TEXT, data, mask=mask)) == [Message(TEXT, data)]


def test_a_message_in_parts_is_one_and_control_frames_come_between() -> None:
    parts = (
        masked(TEXT, b"a", False) + masked(PING, b"?") + masked(CONTINUATION, b"b", False) + masked(CONTINUATION, b"c")
    )
    assert FrameReader().feed(parts + masked(TEXT, b"d")) == [(PING, b"?"), (TEXT, b"abc"), (TEXT, b"d")]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"x"), 1002),
        (b"\xc1" + masked(TEXT, b"x")[1:], 1002),
        (masked(0x3, b"x"), 1002),
        (masked(PING, b"", False), 1002),
        (masked(PING, bytes(126)), 1002),
        (masked(CONTINUATION, b"x"), 1002),
        (masked(TEXT, b"x", False) + masked(TEXT, b"y"), 1002),
        (masked(TEXT, bytes(MESSAGE_BYTES_MAX + 1))[:14], 1009),
        (masked(TEXT, bytes(MESSAGE_BYTES_MAX), False) + masked(CONTINUATION, b"x"), 1009),
        (masked(TEXT, b"", False) + masked(CONTINUATION, b"", False) * MESSAGE_FRAMES_MAX, 1009),
    ],
    ids=[
        "unmasked",
        "extension",
        "opcode",
        "cut ping",
        "long ping",
        "no begin",
        "two begins",
        "long",
        "long in parts",
        "empty parts",
    ],
)
def test_who_breaks_the_protocol_is_told_how(data: bytes, code: int) -> None:
    with pytest.raises(FrameError) as caught:
        FrameReader().feed(data)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("code", "reason", "answer"),
    [(code, b"bye", code) for code in (1000, 1001, 1003, 1007, 1011, 1014, 3000, 4999)]
    + [(code, b"", 1002) for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)]
    + [(1000, b"\xff", 1007)],
)
def test_a_goodbye_is_answered_with_what_may_be_said(code: int, reason: bytes, answer: int) -> None:
    assert answering_code(code.to_bytes(2, "big") + reason) == answer


def test_a_goodbye_carries_code_and_reason() -> None:
    assert close_frame(1013, "read faster") == bytes((0x80 | CLOSE, 13)) + b"\x03\xf5read faster"
    assert len(close_frame(1002, "x" * 500)) == 127


def test_a_handshake_is_answered_as_the_specification_shows() -> None:
    head = upgrade("13", "dGhlIHNhbXBsZSBub25jZQ==")
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n" in head


@pytest.mark.parametrize(
    ("version", "key", "named"),
    [
        ("8", "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version is '8'; /ws speaks 13"),
        ("13", "x", "Sec-WebSocket-Key"),
        ("13", "", "Sec-WebSocket-Key"),
        ("13", "eA==", "Sec-WebSocket-Key"),
    ],
)
def test_a_wrong_handshake_is_refused(version: str, key: str, named: str) -> None:
    with pytest.raises(GatewayError, match=named):
        upgrade(version, key)
