"""The address in the first event of an HTTP+SSE stream is replaced, and nothing else, however the stream is cut."""

from itertools import pairwise

import pytest
from gpuproxy_plugins.mcp_sse import HELD_BYTES_MAX, EndpointEditor
from hypothesis import given
from hypothesis import strategies as st

FIRST = [
    (b"event: endpoint\ndata: %b\n\n", True),
    (b"event: endpoint\r\ndata: %b\r\n\r\n", True),
    (b"event: endpoint\rdata: %b\r\r", True),
    (b"event:endpoint\ndata:%b\n\n", True),
    (b"data: %b\nevent: endpoint\n\n", True),
    (b": hello\n\n: again\r\n\r\nid: 1\nevent: endpoint\ndata: %b\nretry: 5\n\n", True),
    (b"event: message\ndata: %b\n\n", False),
    (b"data: %b\n\n", False),
    (b"id: 1\ndata:\n\nevent: endpoint\ndata: %b\n\n", False),
    (b"event: endpoint\ndata: %b\ndata: more\n\n", False),
    (b"event: endpoints\ndata: %b\n\n", False),
    (b"\n\nevent: endpoint\ndata: %b\n\n", True),
    (b"event: endpoint\ndata: %b\n", False),  # cut off: no event
]
REST = b"event: message\ndata: {}\n\n: beat\n\nevent: endpoint\ndata: /not-this\n\nid: 9\ndata:\n\n\r\n\r"
OLD, NEW = b"/messages/?session_id=1", b"/through"


def edited(pieces: list[bytes]) -> bytes:
    editor = EndpointEditor(lambda address: NEW if address == OLD else b"?")
    return b"".join(editor.edit(piece, False) for piece in pieces) + editor.edit(b"", True)


@given(st.sampled_from(FIRST), st.lists(st.integers(0, 200)))
def test_only_the_address_changes_however_the_stream_is_cut(first: tuple[bytes, bool], cuts: list[int]) -> None:
    form, is_replaced = first
    rest = b"" if form.endswith(b"%b\n") else REST
    stream = form % OLD + rest
    at = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(at)]
    assert edited(pieces) == form % (NEW if is_replaced else OLD) + rest


def test_what_follows_the_first_event_is_not_held_back() -> None:
    editor = EndpointEditor(lambda address: NEW)
    assert editor.edit(b"data: {}\n\nda", False) == b"data: {}\n\nda"
    assert editor.edit(b"ta", False) == b"ta"


def test_comments_before_the_first_event_are_not_held_back() -> None:
    editor = EndpointEditor(lambda address: NEW)
    assert editor.edit(b": beat\n\nevent:", False) == b": beat\n\n"


@pytest.mark.parametrize("piece", [b"x", b"data: "])
def test_what_has_no_end_is_let_through(piece: bytes) -> None:
    pieces = [piece * 1_000] * (HELD_BYTES_MAX // 1_000 + 2)
    editor = EndpointEditor(lambda address: NEW)
    assert b"".join(editor.edit(each, False) for each in pieces) == b"".join(pieces)
