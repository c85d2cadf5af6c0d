"""Event streams are cut the same however they arrive."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuproxy.codec import sse
from gpuproxy.codec.sse import EventFilter, event_payloads


class Found(EventFilter):
    """Collects what the filter shows."""

    word = b"needle"
    dull = b"needle0"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[bytes] = []
        self.tails: list[bytes] = []

    def take(self, data: bytes) -> None:
        self.events.append(data)

    def take_tail(self, tail: bytes) -> None:
        self.tails.append(tail)


def found_in(*chunks: bytes) -> Found:
    found = Found()
    for chunk in chunks:
        found.feed(chunk)
    found.flush()
    return found


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_end_with_an_empty_line_of_any_kind(end: bytes) -> None:
    stream = end.join([b"data: needle 1", b"", b": ping", b"", b"data:needle 2", b"data: more", b"", b""])
    assert found_in(stream).events == [b"needle 1", b"needle 2\nmore"]
    assert found_in(*bytewise(stream)).events == [b"needle 1", b"needle 2\nmore"]


def test_only_data_lines_are_shown() -> None:
    stream = b": needle\nevent: x\nid: 1\ndata: needle\nretry: 5\n\n"
    assert found_in(stream).events == [b"needle"]


def test_the_last_event_may_lack_its_empty_line() -> None:
    assert found_in(b"data: a\n\ndata: needle").events == [b"needle"]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert found_in(b"\xef\xbb\xbfdata: needle\n\n").events == [b"needle"]


def test_a_word_split_between_chunks_is_found() -> None:
    assert found_in(b"data: nee", b"dle\n", b"\n").events == [b"needle"]


def test_a_whole_chunk_with_only_the_dull_form_is_skipped() -> None:
    assert found_in(b"data: needle0\n\n").events == []
    assert found_in(b"data: needle0 needle\n\n").events == [b"needle0 needle"]


def test_of_an_event_over_the_limit_only_the_tail_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "EVENT_BYTES_MAX", 64)
    monkeypatch.setattr(sse, "TAIL_BYTES", 20)
    stream = b"data: " + b"x" * 300 + b" needle end\n\ndata: needle\n\n"
    for chunks in ([stream], bytewise(stream), [stream[:100], stream[100:]]):
        found = found_in(*chunks)
        assert found.tails == [b"xxxxxxxxx needle end"]
        assert found.events == [b"needle"]


def test_a_stream_without_an_end_is_held_only_up_to_the_limit() -> None:
    found = Found()
    for _ in range(64):
        found.feed(b"x" * 65_536)
    assert found._held is not None
    assert len(found._held) <= sse.EVENT_BYTES_MAX + 65_536


pieces = st.sampled_from(
    [b"data:", b"data: ", b"needle", b"needle0", b"\n", b"\r", b"\r\n", b"\n\n", b":", b"x", b"y" * 30]
)


@settings(max_examples=300)
@given(stream=st.lists(pieces, max_size=30).map(b"".join), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_the_result_does_not_depend_on_the_splitting(stream: bytes, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "EVENT_BYTES_MAX", 48)
        patch.setattr(sse, "TAIL_BYTES", 16)
        borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
        chunks = [stream[start:end] for start, end in pairwise(borders)]
        whole, split, single = found_in(stream), found_in(*chunks), found_in(*bytewise(stream))
        # A dull event may be shown or skipped; that alone is allowed to differ.
        for part in (split, single):
            assert [event for event in part.events if event.count(b"needle") > event.count(b"needle0")] == [
                event for event in whole.events if event.count(b"needle") > event.count(b"needle0")
            ]
            assert [t for t in part.tails if t.count(b"needle") > t.count(b"needle0")] == [
                t for t in whole.tails if t.count(b"needle") > t.count(b"needle0")
            ]


def test_the_payloads_of_a_whole_stream_come_in_order() -> None:
    stream = b": hi\r\n\r\nevent: message\r\ndata: one\r\n\r\ndata: two\r\n\r\nid: 7\r\ndata:\r\n\r\ndata: three"
    assert list(event_payloads(stream)) == [b"one", b"two", b"three"]
