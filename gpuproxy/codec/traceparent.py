"""The field ``traceparent`` (W3C Trace Context): which trace a call belongs to, and which span it came from.

A field that is not exactly as the standard writes it counts as none: the call begins a trace of its own.
"""

import re
from typing import NamedTuple

SAMPLED = 1

_VERSION_0_BYTES = 55
_FORM = rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
_match = re.compile(_FORM).fullmatch


class Context(NamedTuple):
    """The caller's span: `trace_id` has 32 hex digits, `span_id` 16."""

    trace_id: str
    span_id: str
    is_sampled: bool


def parse(value: bytes) -> Context | None:
    """Return what the field says, None if it is not valid. Versions to come may say more at its end."""
    found = _match(value)
    if found is None or (value[:2] == b"00" and len(value) != _VERSION_0_BYTES):
        return None
    trace_id, span_id, flags = found.groups()
    return Context(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & SAMPLED))


def render(trace_id: str, span_id: int, is_sampled: bool) -> bytes:
    """Return the field's value for a call sent from the span with this id."""
    return b"00-%b-%016x-%02x" % (trace_id.encode(), span_id, is_sampled)
