"""Events that are changed on their way: what is not changed stays byte by byte, however it was split."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.events import EventCutter, with_data, with_lines

STREAMS = st.lists(st.sampled_from([b"data: x", b"id: 1", b": c", b"\n", b"\r\n", b"\r", b""])).map(b"".join)


def cut(stream: bytes, cuts: list[int]) -> tuple[list[bytes], bytes]:
    cutter, events, at = EventCutter(), [], 0
    for end in [*sorted({min(each, len(stream)) for each in cuts}), len(stream)]:
        events += cutter.feed(stream[at:end])
        at = end
    assert cutter.held_bytes == len(stream) - len(b"".join(events))
    return events, cutter.spill()


@given(STREAMS, st.lists(st.integers(0, 100), max_size=8))
def test_nothing_is_lost_and_events_do_not_depend_on_the_split(stream: bytes, cuts: list[int]) -> None:
    whole, split = cut(stream, []), cut(stream, cuts)
    for events, rest in (whole, split):
        assert b"".join(events) + rest == stream

    def shown(events: list[bytes]) -> list[bytes]:
        lines = [event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip(b"\n") for event in events]
        return [event for event in lines if event]

    assert shown([*whole[0], whole[1]]) == shown([*split[0], split[1]])


def test_a_long_event_is_not_looked_at_again_and_again() -> None:
    cutter, piece = EventCutter(), b"x" * 4_096
    started_s = time.process_time()
    for _ in range(8_192):  # 32 MiB: by looking at all of it each time this took minutes
        assert cutter.feed(piece) == []
    assert time.process_time() - started_s < 5
    assert len(cutter.feed(b"\n\n")[0]) == 8_192 * 4_096 + 2


def test_an_event_that_was_spilt_still_ends() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: a\r\n") == []
    assert cutter.spill() == b"data: a\r\n"
    assert cutter.feed(b"\r\ndata: b\n\n") == [b"\r\n", b"data: b\n\n"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_data_is_replaced_where_it_stood(end: bytes) -> None:
    event = b"id: 1\ndata: a\nretry: 5\ndata:b\n\n".replace(b"\n", end)
    seen: list[bytes] = []

    def change(data: bytes) -> bytes:
        seen.append(data)
        return b"c\nd"

    assert with_data(event, change) == b"id: 1\ndata: c\ndata: d\nretry: 5\n\n".replace(b"\n", end)
    assert seen == [b"a\nb"]
    assert with_data(event, lambda data: data) == event


@pytest.mark.parametrize("event", [b"", b": c\n\n", b"\n\n", b"data"])
def test_an_event_without_data_stays(event: bytes) -> None:
    assert with_data(event, lambda data: b"x") == event


def test_lines_are_changed_and_their_ends_are_not() -> None:
    assert with_lines(b"id: 1\r\n\ndata: x\r", bytes.upper) == b"ID: 1\r\n\nDATA: X\r"
