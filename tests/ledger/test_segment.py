"""Cutting frames off a journal segment."""

import struct
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from journals import frame, frames, receipt

from gpuproxy.ledger.segment import FRAME_BYTES_MAX, cut, holds_frame
from gpuproxy.types import Receipt

ALL = 1_000_000


def test_whole_frames_become_rows_in_field_order() -> None:
    found = cut(frame([receipt(1), receipt(2)]) + frame([receipt(3)]), ALL)
    assert found.rows == [msgspec.structs.astuple(receipt(number)) for number in (1, 2, 3)]
    assert found.damage == ""


@given(st.integers(0, 2_000))
def test_a_cut_anywhere_takes_whole_frames_only(end: int) -> None:
    data = frames(0, 6)
    found = cut(data[:end], ALL)
    assert found.damage == ""
    assert data[: found.bytes_used] == frames(0, len(found.rows))
    assert found.bytes_used <= end


@given(st.integers(0, 2_000))
def test_reading_on_after_a_cut_anywhere_gives_every_row_once(end: int) -> None:
    data = frames(0, 6)
    first = cut(data[:end], ALL)
    rest = cut(data[first.bytes_used :], ALL)
    assert [row[0] for row in first.rows + rest.rows] == [receipt(number).id for number in range(6)]


def test_no_more_rows_are_taken_than_asked_but_for_the_frame_begun() -> None:
    assert len(cut(frames(0, 10, size=3), 4).rows) == 6


def test_the_size_of_an_unfinished_frame_is_told() -> None:
    data = frames(0, 1)
    assert cut(data[:-1], ALL).bytes_wanted == len(data)


@pytest.mark.parametrize("position", [4, 8, 20, -1])
def test_one_wrong_bit_is_damage_and_what_is_before_it_is_good(position: int) -> None:
    bad = bytearray(frames(1, 2))
    bad[position] ^= 1
    found = cut(frames(0, 1) + bytes(bad) + frames(2, 3), ALL)
    assert (len(found.rows), found.damage) == (1, "checksum does not match")


def test_zeros_are_damage_not_an_empty_frame() -> None:
    assert cut(bytes(16), ALL).damage == "frame length 0"


def test_an_absurd_length_is_damage() -> None:
    assert cut((FRAME_BYTES_MAX + 1).to_bytes(4, "little") + bytes(8), ALL).damage


def test_a_segment_of_an_older_version_is_read_with_what_it_did_not_know_empty() -> None:
    fields = msgspec.structs.astuple(receipt(1))
    older = msgspec.msgpack.encode([fields[: Receipt.__struct_fields__.index("markup_bps")]])
    data = struct.pack("<II", len(older), crc32(older)) + older
    assert cut(data, 9).rows == [fields]


def test_a_payload_that_is_no_list_of_receipts_is_damage() -> None:
    import struct
    from zlib import crc32

    payload = msgspec.msgpack.encode([["too", "short"]])
    found = cut(struct.pack("<II", len(payload), crc32(payload)) + payload, ALL)
    assert "Array" in found.damage or "array" in found.damage


def test_a_frame_is_found_wherever_it_begins() -> None:
    assert holds_frame(b"\x07garbage" + frames(0, 1) + b"more")
    assert not holds_frame(frames(0, 1)[1:])
    assert not holds_frame(bytes(500))
