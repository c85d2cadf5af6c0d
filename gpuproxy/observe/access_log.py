"""One log line for each finished call, made of its receipt when that is stored, so never without it.

Lines are written a batch at a time and past the logging library. What names a caller and what it called comes again
and again, so it is rendered once and remembered: 2 µs a line, where asking each field anew took 12.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from operator import attrgetter
from typing import get_args

import msgspec
from msgspec import Struct

from gpuproxy.types import Receipt, UsageSource

MESSAGE = "call"
LABELS = ("user_id", "key_id", "protocol", "upstream", "model", "method", "path", "status", "outcome")
WRITE_BYTES_MAX = 4_096  # PIPE_BUF: what is longer, another process's line could stand in the middle of (pipe(7))
REMEMBERED_MAX = 4_096  # then all are forgotten: paths may be any

_labels_of = attrgetter(*LABELS)
_fractions = [str(us / 1e3)[1:] for us in range(1_000)]  # of a millisecond, as a float is shown


class Form(Struct, frozen=True):
    """How a line looks: what stands around the time, a field, a value that is text, and whether empty ones are told.

    Nothing of bodies, queries or credentials is ever told.
    """

    begin: str
    behind_time: str
    field: str
    text: Callable[[str], str]
    end: str
    tells_empty: bool

    def fields(self, names: Iterable[str], values: Iterable[object]) -> str:
        """Return fields as they stand in a line."""
        pairs = zip(names, values, strict=True)
        return "".join(self.field % (name, self._value(value)) for name, value in pairs if self._is_told(value))

    def line(self, has_first_byte: bool, has_tokens: bool) -> str:
        """Return the template of a line: time, request id and labels, amounts, and what comes seldom."""
        amounts = self._template("%d%s", "duration_ms") + self._template(
            "%s", "request_bytes", "response_bytes", "attempts"
        )
        first_byte = self._template("%d%s", "first_byte_ms") if has_first_byte else ""
        tokens = self._template("%s", "input_tokens", "cached_tokens", "output_tokens") + "%s" if has_tokens else ""
        return f"{self.begin}%s.%03dZ{self.behind_time}%s%s{amounts}{first_byte}{tokens}%s{self.end}"

    def _template(self, value: str, *names: str) -> str:
        return "".join(self.field % (name, value) for name in names)

    def request_id(self, request_id: str) -> str:
        """Return the field that is another in every line."""
        return self.field % ("request_id", self.text(request_id)) if request_id or self.tells_empty else ""

    def _is_told(self, value: object) -> bool:
        return self.tells_empty or value != ""

    def _value(self, value: object) -> str:
        return self.text(value) if isinstance(value, str) else str(value)


def _plain(text: str) -> str:
    is_plain = text.isascii() and text.isprintable() and " " not in text and "=" not in text
    return text if is_plain else repr(text)


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


TEXT = Form("", f" [info     ] {MESSAGE:<30}", " %s=%s", _plain, "\n", tells_empty=False)
JSON = Form('{"level":"info","timestamp":"', f'","message":"{MESSAGE}"', ',"%s":%s', _quoted, "}\n", tells_empty=True)


class Lines:
    """Renders lines of one form, remembering what comes again."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._own_id = form.field % ("request_id", form.text("%s"))
        self._labels: dict[object, str] = {}
        self._second = -1
        self._time = ""
        self._sources = {source: form.fields(("usage_source",), (source,)) for source in get_args(UsageSource)}
        self._templates = {
            (first, tokens): form.line(first, tokens) for first in (False, True) for tokens in (False, True)
        }

    def of(self, receipt: Receipt) -> str:
        """Return what is told of a call: all that is its own put into a template at once."""
        labels, duration_us, first_byte_us = _labels_of(receipt), receipt.duration_us, receipt.first_byte_us
        request_id = receipt.request_id  # the receipt's own, made here, if the caller gave none
        second, ms = divmod((receipt.started_ns // 1_000 + duration_us) // 1_000, 1_000)
        values: tuple[object, ...] = (
            self._time if second == self._second else self._begin(second), ms,
            self._own_id % request_id if request_id == receipt.id else self._form.request_id(request_id),
            self._labels.get(labels) or self._remember(labels),
            duration_us // 1_000, _fractions[duration_us % 1_000],
            receipt.request_bytes, receipt.response_bytes, receipt.attempts,
        )  # fmt: skip
        if has_first_byte := first_byte_us >= 0:
            values += (first_byte_us // 1_000, _fractions[first_byte_us % 1_000])
        if has_tokens := receipt.output_tokens >= 0:
            source = self._sources[receipt.usage_source]
            values += (receipt.input_tokens, receipt.cached_tokens, receipt.output_tokens, source)
        rest = self._rest(receipt) if receipt.error or receipt.rpc_method or receipt.trace_id else ""
        return self._templates[has_first_byte, has_tokens] % (*values, rest)

    def _rest(self, receipt: Receipt) -> str:
        names = ("error", "rpc_method", "rpc_name", "rpc_outcome", "trace_id")
        told = [(name, value) for name in names if (value := getattr(receipt, name))]
        return self._form.fields([name for name, _ in told], [value for _, value in told])

    def _begin(self, second: int) -> str:
        self._time, self._second = datetime.fromtimestamp(second, UTC).isoformat()[:19], second
        return self._time

    def _remember(self, labels: tuple[object, ...]) -> str:
        if len(self._labels) >= REMEMBERED_MAX:
            self._labels.clear()
        told = self._labels[labels] = self._form.fields(LABELS, labels)
        return told


def access_log(is_json: bool) -> Callable[[Iterable[Receipt]], None]:
    """Return the function that writes the lines of stored receipts to standard error; nothing above level info."""
    line = Lines(JSON if is_json else TEXT).of

    def write(receipts: Iterable[Receipt]) -> None:
        if not logging.getLogger().isEnabledFor(logging.INFO):
            return
        for lines in whole_lines("".join([line(receipt) for receipt in receipts]).encode()):
            sys.stderr.buffer.write(lines)
            sys.stderr.buffer.flush()

    return write


def whole_lines(text: bytes) -> Iterator[bytes]:
    """Yield the text in pieces of whole lines, of at most WRITE_BYTES_MAX if one line is not longer."""
    start = 0
    while start < len(text):
        end = text.rfind(b"\n", start, start + WRITE_BYTES_MAX) + 1 or text.index(b"\n", start) + 1
        yield text[start:end]
        start = end
