"""The parsed heads of requests and answers, and the memory of the last one on a connection.

Peers that keep a connection send nearly the same head again and again. A connection remembers the last head it
parsed as two byte strings, before and after the digits of Content-Length. A message whose head equals them to the
byte and that has come whole, in one piece, needs no parser: the parser has accepted these very bytes before, and
between whole messages it has no state. Everything else goes to the parser. This saves a quarter of a small call.
"""

import http
import re
from typing import TYPE_CHECKING

from gpuproxy.proxy.headers import Field, join_fields, without_nominated

if TYPE_CHECKING:
    from gpuproxy.proxy.traced import Inherited

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in http.HTTPStatus
}


def status_line(status: int) -> bytes:
    """Return the first line of an answer with its line end."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,12})\r\n", re.IGNORECASE)
_DIGITS_MAX = 12  # of a Content-Length remembered
_CHANCES = 8  # misses in a row before a connection stops remembering: its heads differ, and each try costs a little


class RequestHead:
    """What the head of a request says. Not changed after it is parsed: exchanges may share one.

    ``blocks`` keeps what has been rendered from it for upstreams, by whether an uncompressed answer is asked for;
    ``needs_body`` what the handler said of its method and path; ``inherited`` what it says of a trace.
    """

    __slots__ = (
        "accept_encoding",
        "blocks",
        "connection",
        "credential",
        "expects_continue",
        "fields",
        "host",
        "inherited",
        "is_chunked",
        "is_http_1_0",
        "is_upgrade",
        "keeps_alive",
        "method",
        "needs_body",
        "own_fields",
        "proxied_fields",
        "request_id",
        "target",
        "upgrade",
        "via",
    )

    def __init__(self, target: bytes) -> None:
        self.method = b""
        self.target = target
        self.fields: list[Field] = []  # end-to-end ones
        self.own_fields: list[Field] | None = None  # meant for the gateway: reach control, never an upstream
        self.proxied_fields: list[Field] | None = None  # what a trusted proxy in front says of the client
        self.host = b""
        self.credential = b""
        self.connection = b""
        self.via = b""
        self.accept_encoding = b""
        self.upgrade = b""
        self.request_id = ""
        self.is_chunked = False
        self.is_http_1_0 = False
        self.is_upgrade = False
        self.expects_continue = False
        self.keeps_alive = True
        self.needs_body: bool | None = None
        self.inherited: Inherited | None = None
        self.blocks: dict[bool, bytes] = {}

    @property
    def byte_count(self) -> int:
        """About how many bytes the head has."""
        return len(self.target) + sum(len(name) + len(value) + 4 for name, value in self.fields)

    @property
    def is_plain(self) -> bool:
        """Tell whether the message needs nothing of the parser but its length."""
        special = self.is_chunked or self.is_http_1_0 or self.upgrade or self.expects_continue or self.request_id
        return self.keeps_alive and not special


class AnswerHead:
    """What the head of an answer says. Not changed after it is parsed: answers may share one."""

    __slots__ = (
        "coding",
        "connection",
        "content_type",
        "fields",
        "has_buffering_field",
        "is_chunked",
        "keeps_alive",
        "kind",
        "lines",
        "start",
        "status",
        "upgrade",
    )

    def __init__(self) -> None:
        self.status = 0
        self.fields: list[Field] = []
        self.connection = b""
        self.coding = b""  # of the content, empty if it has none
        self.content_type = b""
        self.upgrade = b""
        self.is_chunked = False
        self.has_buffering_field = False
        self.keeps_alive = False
        # made by `finish`
        self.kind = b""  # the content type in lower case
        self.lines = b""  # the end-to-end fields as they go to the client
        self.start = b""  # the status line and these

    def finish(self) -> None:
        """Drop what Connection names, tell buffering proxies in front to pass events on, render."""
        if self.connection:
            self.fields = without_nominated(self.fields, self.connection)
        self.kind = self.content_type.lower()
        if not self.has_buffering_field and self.kind.startswith(b"text/event-stream"):
            self.fields.append((b"X-Accel-Buffering", b"no"))
        self.lines = join_fields(self.fields)
        self.start = status_line(self.status) + self.lines


class Memory:
    """The last head of a connection. `length` is valid after `recall` found something."""

    __slots__ = (
        "_chances",
        "_digits",
        "_digits_value",
        "_prefix",
        "_prefix_size",
        "_suffix",
        "_suffix_size",
        "head",
        "length",
    )

    def __init__(self) -> None:
        self.head: RequestHead | AnswerHead | None = None
        self.length = -1  # of the body; -1 when the head has no Content-Length
        self._prefix = self._suffix = b""
        self._prefix_size = self._suffix_size = 0
        self._digits = b"\r"  # seen last, and their value; at first what no digits are, not even missing ones
        self._digits_value = 0
        self._chances = _CHANCES

    def recall(self, data: bytes) -> bytes | None:
        """Return the body if `data` is exactly one message with the head remembered, else None."""
        at = self._prefix_size
        if not at or not data.startswith(self._prefix):
            return None
        suffix_size = self._suffix_size
        if not suffix_size:
            self.length = -1
            return b"" if len(data) == at else None
        end = data.find(b"\r", at)
        digits = data[at:end]
        start = end + suffix_size
        if digits != self._digits:
            if not digits.isdigit() or len(digits) > _DIGITS_MAX:
                return None
            self._digits = digits
            self._digits_value = int(digits)
        if not data.startswith(self._suffix, end):
            return None
        self.length = length = self._digits_value
        if len(data) != start + length:
            return None
        self._chances = _CHANCES
        return data[start:]

    def learn(self, data: bytes, head: RequestHead | AnswerHead, length: int) -> None:
        """Remember the head at the start of `data`; `length` is its Content-Length, -1 for none."""
        if self._chances == 0:
            return
        self._chances -= 1
        self._prefix = self._suffix = b""
        self._prefix_size = self._suffix_size = 0
        end = data.find(b"\r\n\r\n") + 4
        if self._chances == 0 or end < 4 or data[0] in b"\r\n":  # empty lines before a head are no part of it
            self.head = None
            return
        if length < 0:
            self._prefix = data[:end]
        elif (match := _LENGTH.search(data, 0, end)) is not None:
            self._prefix, self._suffix = data[: match.start(1)], data[match.end(1) : end]
        self._prefix_size, self._suffix_size = len(self._prefix), len(self._suffix)
        self.head = head
