"""The field traceparent: what is exactly as the standard writes it counts, everything else is none."""

import pytest

from gpuproxy.codec.traceparent import Context, parse, render

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
VALID = b"00-%b-%b-01" % (TRACE, SPAN)


@pytest.mark.parametrize(
    ("value", "is_sampled"),
    [
        (VALID, True),
        (VALID[:-2] + b"00", False),
        (VALID[:-2] + b"03", True),
        (VALID[:-2] + b"fe", False),
        (b"01" + VALID[2:], True),
        (b"cc" + VALID[2:] + b"-what-will-be", True),
    ],
    ids=["sampled", "not sampled", "with a flag of level 2", "with flags to come", "version 1", "with more behind"],
)
def test_a_valid_field_names_trace_and_span(value: bytes, is_sampled: bool) -> None:
    assert parse(value) == Context(TRACE.decode(), SPAN.decode(), is_sampled)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        b"ff" + VALID[2:],
        b"0" + VALID[2:],
        b"0g" + VALID[2:],
        VALID.replace(TRACE, b"0" * 32),
        VALID.replace(SPAN, b"0" * 16),
        VALID.replace(TRACE, TRACE.upper()),
        VALID.replace(TRACE, TRACE[1:]),
        VALID.replace(SPAN, SPAN + b"0"),
        VALID.replace(b"-", b"_"),
        VALID[:-1],
        VALID + b"-",
        VALID + b"-more",
        b"01" + VALID[2:] + b"more",
        VALID + b"\n",
        b" " + VALID,
        VALID + b", " + VALID,
    ],
    ids=str,
)
def test_a_field_that_is_not_valid_is_none(value: bytes) -> None:
    assert parse(value) is None


def test_what_is_rendered_is_valid() -> None:
    assert render(TRACE.decode(), int(SPAN, 16), True) == VALID
    assert parse(render("1" * 32, 1, False)) == Context("1" * 32, "0" * 15 + "1", False)
