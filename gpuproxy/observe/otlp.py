"""OpenTelemetry's protocol (OTLP 1.x) as far as spans need it: plain values in, protobuf out.

Field numbers are those of ``opentelemetry/proto/trace/v1/trace.proto``, which is stable. The messages are few and flat,
so they are written by hand: the SDK, made for spans that begin and end in its own process, needs 60 µs for a span where
this needs 10, and 15 MB. Protobuf rather than JSON, because several receivers take nothing else.
"""

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache

from msgspec import Struct

Value = str | int | float | bool

SERVER, CLIENT = 2, 3  # SpanKind
_ERROR = 2  # Status.StatusCode
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_INT64 = (1 << 64) - 1


class Span(Struct):
    """One span. Ids are numbers, ``parent_id`` 0 for none; times are in unix nanoseconds; ``flags`` as in OTLP."""

    trace_id: bytes
    span_id: int
    parent_id: int
    name: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value]
    is_error: bool = False
    flags: int = 0


def request_of(resource: Mapping[str, Value], version: str, spans: Iterable[Span]) -> bytes:
    """Return the body of a request that exports these spans."""
    attributes = b"".join(_attribute(1, key, value) for key, value in resource.items())
    scope = _text(1, "gpuproxy") + _text(2, version)
    encoded = b"".join(_message(2, _span(span)) for span in spans)
    return _message(1, _message(1, attributes) + _message(2, _message(1, scope) + encoded))


def _span(span: Span) -> bytes:
    parent = _message(4, span.parent_id.to_bytes(8, "big")) if span.parent_id else b""
    return b"".join(
        (
            _message(1, span.trace_id),
            _message(2, span.span_id.to_bytes(8, "big")),
            parent,
            _text(5, span.name),
            _number(6, span.kind),
            _tag(7, _FIXED64) + struct.pack("<Q", span.start_ns),
            _tag(8, _FIXED64) + struct.pack("<Q", span.end_ns),
            *[_attribute(9, key, value) for key, value in span.attributes.items()],
            _message(15, _number(3, _ERROR)) if span.is_error else b"",
            _tag(16, _FIXED32) + struct.pack("<I", span.flags),
        )
    )


@lru_cache(maxsize=4_096, typed=True)  # most are the same from call to call
def _attribute(number: int, key: str, value: Value) -> bytes:
    return _message(number, _text(1, key) + _message(2, _value(value)))


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return _text(1, value)
    if isinstance(value, bool):
        return _number(2, value)
    if isinstance(value, int):
        return _number(3, value)
    return _tag(4, _FIXED64) + struct.pack("<d", value)


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode(errors="replace"))


def _message(number: int, content: bytes) -> bytes:
    return _tag(number, _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value & _INT64)


@lru_cache(maxsize=64)
def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SMALL[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = [bytes((value,)) for value in range(0x80)]
