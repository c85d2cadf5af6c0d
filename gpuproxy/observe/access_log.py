"""One log line for each finished call, made of its receipt when that is stored, so never without it.

Lines are written a batch at a time and past the logging library: 2 µs a line instead of 40.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from gpuproxy.types import Receipt

MESSAGE = "call"
_encode = msgspec.json.Encoder().encode


class Line(Struct, omit_defaults=True):
    """What a line tells: nothing of bodies, queries or credentials."""

    level: str
    timestamp: str
    message: str
    request_id: str
    user_id: str
    key_id: str
    protocol: str
    upstream: str
    model: str
    method: str
    path: str
    status: int
    outcome: str
    duration_ms: float
    request_bytes: int
    response_bytes: int
    attempts: int
    first_byte_ms: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    usage_source: str | None = None
    error: str | None = None


def line_of(receipt: Receipt) -> Line:
    """Return what is told of a call."""
    is_told = receipt.output_tokens >= 0
    ended_s = receipt.started_ns / 1e9 + receipt.duration_us / 1e6
    return Line(
        "info",
        datetime.fromtimestamp(ended_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        MESSAGE,
        receipt.request_id,
        receipt.user_id,
        receipt.key_id,
        receipt.protocol,
        receipt.upstream,
        receipt.model,
        receipt.method,
        receipt.path,
        receipt.status,
        receipt.outcome,
        receipt.duration_us / 1e3,
        receipt.request_bytes,
        receipt.response_bytes,
        receipt.attempts,
        receipt.first_byte_us / 1e3 if receipt.first_byte_us >= 0 else None,
        receipt.input_tokens if is_told else None,
        receipt.cached_tokens if is_told else None,
        receipt.output_tokens if is_told else None,
        receipt.usage_source if is_told else None,
        receipt.error or None,
    )


def as_json(line: Line) -> bytes:
    """Return the line as a JSON object."""
    return _encode(line) + b"\n"


def as_text(line: Line) -> bytes:
    """Return the line as the other lines look in the text form."""
    told = [(name, getattr(line, name)) for name in Line.__struct_fields__[3:]]
    fields = " ".join(f"{name}={_shown(value)}" for name, value in told if value not in (None, ""))
    return f"{line.timestamp} [info     ] {MESSAGE:<30} {fields}\n".encode()


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text and "=" not in text else repr(text)


def access_log(is_json: bool) -> Callable[[Iterable[Receipt]], None]:
    """Return the function that writes the lines of stored receipts to standard error; nothing above level info."""
    render = as_json if is_json else as_text

    def write(receipts: Iterable[Receipt]) -> None:
        if not logging.getLogger().isEnabledFor(logging.INFO):
            return
        lines = b"".join([render(line_of(receipt)) for receipt in receipts])
        sys.stderr.buffer.write(lines)
        sys.stderr.buffer.flush()

    return write
