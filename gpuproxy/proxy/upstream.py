"""One connection to an upstream: sends a request, parses the answer strictly, hands it to its exchange.

Rules kept here (spec numbers from the HTTP gateway duties): an answer is read only while an exchange waits for
it (D21); extra bytes after an answer, or a framing we do not fully understand, end the connection (D9, R26);
1xx answers are heads of their own (D13); a close-delimited answer ends at end of file.

Requests leave at the end of a loop turn (see `Outbox`). What is read from a connection before that, in the turn that
chose it, was sent by the upstream unasked: such a connection is dropped and the request goes out on another.
"""

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, Protocol, cast

import httptools

from gpuproxy.proxy.headers import (
    BUFFERING,
    CODING,
    CONNECTION,
    CONTENT_TYPE,
    ENCODING,
    LENGTH,
    UPGRADE,
    classify_response,
    response_rules,
)
from gpuproxy.proxy.heads import AnswerHead, Memory, RequestHead
from gpuproxy.proxy.tunnel import reset

if TYPE_CHECKING:
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.worker import Plane

FIELDS_MAX = 256  # of an answer's head
HEAD_BYTES_MAX = 262_144  # of an answer's head; of chunk extensions and trailers, which the parser gathers
LEARNED_BYTES_MAX = 16_384  # answers up to this are worth remembering the head of
INTERIM_MAX = 16  # 1xx answers before the final one


class UpstreamFaultError(Exception):
    """The upstream's bytes are not an answer we can pass on; the message says why."""


class Asker(Protocol):
    """Who waits for an answer: an exchange, or a probe."""

    plane: "Plane"
    head: RequestHead
    has_sent_head: bool
    is_received: bool  # all that is sent upstream is there
    sent_method: bytes

    def relay(self, connection: "UpstreamConnection") -> None:
        """Take what one read brought: head, body bytes, the end."""

    def relay_interim(self, head: AnswerHead) -> None:
        """Take a 1xx answer."""

    def switch_protocols(self, connection: "UpstreamConnection") -> None:
        """Take the connection: what follows is no HTTP."""

    def upstream_lost(self, connection: "UpstreamConnection") -> None:
        """Be told that the connection is gone before the end of the answer."""

    def upstream_faulted(self, connection: "UpstreamConnection", reason: str) -> None:
        """Be told that what came is no answer."""

    def block_upload(self) -> None:
        """Send no more for now."""

    def unblock_upload(self) -> None:
        """Go on sending."""


class UpstreamConnection(asyncio.Protocol):
    """A connection that is idle (``exchange is None``) or serves exactly one exchange."""

    __slots__ = (
        "_interim_count",
        "_memory",
        "_parser",
        "chosen_turn",
        "content_length",
        "exchange",
        "has_head",
        "head",
        "head_bytes",
        "idle_until_s",
        "is_babbling",
        "is_complete",
        "is_reused",
        "is_until_close",
        "on_body",
        "origin",
        "parts",
        "transport",
        "tunnel_bytes",
    )

    transport: asyncio.Transport

    def __init__(self, origin: "Origin") -> None:
        self.origin = origin
        self.exchange: Asker | None = None
        self.idle_until_s = 0.0
        self.is_reused = False
        self.chosen_turn = -1
        self.parts: list[bytes] = []  # what this read brought; the exchange takes it
        self.on_body = self.parts.append  # what the parser calls, without a frame of Python
        self._parser = httptools.HttpResponseParser(self)
        self._memory = Memory()
        # the answer at hand; `release` puts these back
        self.head = NO_HEAD
        self.content_length = -1
        self.is_complete = self.is_until_close = self.is_babbling = self.has_head = False
        self.head_bytes = self._interim_count = 0

    # -- the connection ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def release(self, now_s: float) -> None:
        """The exchange is over: keep the connection if the answer ended cleanly, else close it."""
        self.exchange = None
        if self.head.keeps_alive and self.is_complete and not self.is_babbling and not self.transport.is_closing():
            self.is_reused = True
            self.head = NO_HEAD
            self.parts.clear()
            self.content_length = -1
            self.is_complete = self.is_until_close = self.has_head = False
            self.head_bytes = self._interim_count = 0
            origin = self.origin
            self.idle_until_s = now_s + origin.keepalive_s
            origin.idle[self] = None
        else:
            self.abort()

    def abort(self) -> None:
        """Drop the connection at once; an upstream that is still at work sees a reset and stops."""
        if self.exchange is not None and not self.is_complete:
            reset(self.transport)
        self.exchange = None
        self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the pool, and the exchange if one was waiting."""
        self.origin.forget(self)
        if error is not None and self.exchange is not None and not self.exchange.is_received:
            self._read_the_rest()
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if self.is_until_close and error is None:
            self.is_complete = True
            exchange.relay(self)
        else:
            exchange.upstream_lost(self)

    def _read_the_rest(self) -> None:
        """Read what came before a write failed: the loop reads no more then. It may say why an upload is refused."""
        if self.transport.get_extra_info("ssl_object") is not None:
            return  # what is left would have to be decrypted
        fileno = self.transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):
            while self.exchange is not None and (data := os.read(fileno, 65_536)):
                self.data_received(data)

    def eof_received(self) -> bool:
        """Close; `connection_lost` tells what the end means."""
        return False

    def pause_writing(self) -> None:
        """The upstream takes no more: stop reading the upload."""
        if self.exchange is not None:
            self.exchange.block_upload()

    def resume_writing(self) -> None:
        """The upstream takes bytes again."""
        if self.exchange is not None:
            self.exchange.unblock_upload()

    @property
    def has_begun(self) -> bool:
        """Tell whether a byte of an answer has come."""
        return self.has_head or self.head_bytes > 0

    # -- the answer -------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, then let the exchange pass on whatever this read brought, in one write."""
        exchange = self.exchange
        if exchange is None or self.chosen_turn == exchange.plane.outbox.turn:  # nobody has asked
            self._drop_unasked()
            return
        is_start = not self.has_head and self.head_bytes == 0
        if is_start and (body := self._memory.recall(data)) is not None and exchange.sent_method != b"HEAD":
            self._take_whole(exchange, body)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.tunnel_bytes = data[upgrade.args[0] :]
            if exchange.head.is_upgrade:
                exchange.switch_protocols(self)
            else:
                exchange.upstream_faulted(self, "it switched protocols unasked")
            return
        except httptools.HttpParserError as error:
            self.is_babbling = True
            if not self.is_complete:
                exchange.upstream_faulted(self, _reason(error))
                return
        if self.parts or self.is_complete:
            self.head_bytes = 0
            if is_start and self.is_complete:
                self._learn(exchange, data)
            exchange.relay(self)
            return
        self.head_bytes += len(data)
        if self.head_bytes > HEAD_BYTES_MAX:
            exchange.upstream_faulted(self, f"its head, or what follows its body, is over {HEAD_BYTES_MAX} bytes")
        elif self.has_head and not exchange.has_sent_head:
            exchange.relay(self)

    def _take_whole(self, exchange: Asker, body: bytes) -> None:
        # one whole answer with a head that was parsed before
        memory = self._memory
        self.head = memory.head  # type: ignore[assignment]  # learned here
        self.content_length = memory.length
        self.has_head = self.is_complete = True
        if body:
            self.parts.append(body)
        exchange.relay(self)

    def _learn(self, exchange: Asker, data: bytes) -> None:
        head = self.head
        is_plain = head.keeps_alive and 200 <= head.status < 300 and not self._interim_count and not self.is_babbling
        if is_plain and self.content_length > 0 and len(data) <= LEARNED_BYTES_MAX and exchange.sent_method != b"HEAD":
            self._memory.learn(data, head, self.content_length)

    def _drop_unasked(self) -> None:
        exchange, self.exchange = self.exchange, None
        self.transport.abort()
        if exchange is not None:
            exchange.upstream_lost(self)

    def on_message_begin(self) -> None:
        """Stop at a second answer to one request: it is not the next caller's, and must not change the first."""
        if self.is_complete:
            self.is_babbling = True
            raise UpstreamFaultError("bytes follow its answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field. Trailers (fields after the head) are dropped, RFC 9110 §6.5.1."""
        if self.has_head:
            return
        head = self.head
        if head is NO_HEAD:
            head = self.head = AnswerHead()
        rule = response_rules.get(name)
        if rule is None:
            rule = classify_response(name)
        if not rule:
            head.fields.append((name, value))
        elif rule == LENGTH:
            try:
                self.content_length = int(value)
            except ValueError:  # Python reads no number of over 4,300 digits, zeros included
                raise UpstreamFaultError(f"its Content-Length has {len(value)} digits") from None
        elif rule == CONTENT_TYPE:
            head.content_type = value
            head.fields.append((name, value))
        elif rule == CODING:
            if head.is_chunked or value.lower() != b"chunked":
                raise UpstreamFaultError(f"transfer coding {value[:40]!r} is not supported")
            head.is_chunked = True
        elif rule == CONNECTION:
            head.connection = head.connection + b"," + value if head.connection else value
        elif rule == ENCODING:
            if value.lower() != b"identity":
                head.coding = b"%b, %b" % (head.coding, value) if head.coding else value
            head.fields.append((name, value))
        elif rule == BUFFERING:
            head.has_buffering_field = True
            head.fields.append((name, value))
        elif rule == UPGRADE:
            head.upgrade = value

    def on_headers_complete(self) -> None:
        """Settle how the body is framed."""
        parser = self._parser
        status = parser.get_status_code()
        head = self.head
        if head is NO_HEAD:
            head = self.head = AnswerHead()
        head.status = status
        if parser.get_http_version() not in ("1.1", "1.0") or status < 100:
            raise UpstreamFaultError("its answer is not HTTP/1.1")
        if len(head.fields) > FIELDS_MAX:
            raise UpstreamFaultError(f"its head has over {FIELDS_MAX} fields")
        if status < 200:
            head.finish()
            self._interim_count += 1
            if self._interim_count > INTERIM_MAX:
                raise UpstreamFaultError(f"it sent over {INTERIM_MAX} interim answers")
        elif not self.is_complete:
            self.has_head = True
            head.keeps_alive = parser.should_keep_alive()
            head.finish()
            exchange = self.exchange
            assert exchange is not None
            if exchange.sent_method == b"HEAD":
                # The parser cannot be told that no body follows: answer now and use this connection no more.
                self.is_complete = True
                head.keeps_alive = False
            elif self.content_length < 0 and not head.is_chunked and status not in (204, 304):
                self.is_until_close = True

    def on_message_complete(self) -> None:
        """The answer is whole, or an interim one is."""
        head = self.head
        if head.status >= 200:
            self.is_complete = True
        elif head.status != 101:
            self.head = NO_HEAD
            self.content_length = -1
            if self.exchange is not None and head.status != 100:  # 100 answers an Expect of ours: we send none
                self.exchange.relay_interim(head)


NO_HEAD = AnswerHead()


def _reason(error: httptools.HttpParserError) -> str:
    cause: Any = error.__context__
    if isinstance(cause, UpstreamFaultError):
        return str(cause)
    if cause is not None and not isinstance(cause, httptools.HttpParserError):
        raise cause
    return f"its answer is not valid HTTP/1.1 ({str(error).lower()[:80]})"
