"""Reads requests from a client: parses heads strictly, hands bodies on.

What a client may send is bounded here: head bytes, field count, time. A head that is not plain HTTP/1.x is refused
and the connection closed; nothing of it has reached an upstream by then.
"""

import asyncio
from typing import TYPE_CHECKING

import httptools

from gpuproxy.codec.key import PREFIX as KEY_PREFIX
from gpuproxy.errors import GatewayError
from gpuproxy.proxy.exchange import Exchange
from gpuproxy.proxy.exchange_state import READ_BUFFER
from gpuproxy.proxy.headers import (
    ACCEPT_ENCODING,
    API_KEY,
    BEARER,
    CODING,
    CONNECTION,
    DROP,
    EXPECT,
    HOST,
    INVALID,
    LENGTH,
    OWN,
    PROXIED,
    REQUEST_ID,
    SUBPROTOCOL,
    UPGRADE,
    VENDOR_KEY,
    VIA,
    classify_request,
    hosts_seen,
    is_valid_host,
    is_valid_request_id,
    request_rules,
    without_key_items,
)
from gpuproxy.proxy.heads import Memory, RequestHead

if TYPE_CHECKING:
    from gpuproxy.proxy.worker import Plane

URL_BYTES_MAX = 8_192
SERVED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
LEARNED_BYTES_MAX = 8_192  # messages up to this are worth remembering the head of


class RequestReader(asyncio.Protocol):
    """The reading half of a client connection; `Downstream` is the rest of it.

    `current` is the exchange being answered, `receiving` the one whose body arrives.
    """

    __slots__ = (
        "_fault",
        "_feed",
        "_field_count",
        "_head_bytes",
        "_head_count",
        "_ignores_upgrade",
        "_is_between",
        "_is_deaf",
        "_is_primed",
        "_last_head",
        "_length",
        "_memory",
        "_parser",
        "_parsing",
        "_special_bytes",
        "_stray_bytes",
        "after_upgrade",
        "current",
        "deadline_s",
        "is_trusted",
        "plane",
        "receiving",
    )

    deadline_s: float
    is_trusted: bool

    def __init__(self, plane: "Plane") -> None:
        self.plane = plane
        self.current: Exchange | None = None
        self.receiving: Exchange | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._feed = self._parser.feed_data
        self._parsing: RequestHead | None = None
        self._last_head: RequestHead | None = None
        self._memory = Memory()
        self._length = -1
        self._head_count = 0
        self._ignores_upgrade = False
        self._is_primed = False
        self._field_count = 0
        self._special_bytes = 0
        self._stray_bytes = 0  # of a body, but none of it: chunk extensions and trailers, which the parser gathers
        self._head_bytes = 0
        self._is_between = True  # the parser has begun no message: only then may a remembered head stand in for it
        self._is_deaf = False
        self._fault: GatewayError | None = None
        self.after_upgrade: bytes | None = None

    def new_exchange(self, head: RequestHead, content_length: int) -> Exchange:
        """Make the exchange for a head."""
        raise NotImplementedError

    def admit(self, exchange: Exchange) -> None:
        """Start the exchange or queue it."""
        raise NotImplementedError

    def refuse_malformed(self, error: GatewayError) -> None:
        """Refuse what cannot be parsed."""
        raise NotImplementedError

    def block_reading(self, reason: int) -> None:
        """Stop reading for a while."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        """Parse; complete heads start or queue exchanges from within."""
        if self._is_deaf:
            if self.after_upgrade is not None:
                self._hold_tunnel_bytes(data)
            return
        is_start = self._is_between and self._head_bytes == 0
        if is_start and (body := self._memory.recall(data)) is not None:
            self._take_whole(body)
            return
        receiving, size = self.receiving, 0
        if receiving is None:
            self._head_bytes += len(data)
        else:
            size = receiving.request_bytes
        count = self._head_count
        try:
            self._feed(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self.refuse_malformed(self._fault or _parse_fault(error))
        else:
            if self._head_bytes:
                self._await_head(len(data))
            elif receiving is not None:
                self._bound_stray_bytes(receiving, size, len(data))
            elif is_start and self._head_count == count + 1 and self._is_between:
                head = self._last_head
                if head is not None and head.is_plain and len(data) <= LEARNED_BYTES_MAX:
                    self._memory.learn(data, head, self._length)

    def _bound_stray_bytes(self, exchange: Exchange, size: int, byte_count: int) -> None:
        if self.receiving is not exchange or exchange.request_bytes != size:
            self._stray_bytes = 0
            return
        self._stray_bytes += byte_count
        limit_bytes = self.plane.limits.head_bytes_max
        if self._stray_bytes > limit_bytes:
            self.refuse_malformed(GatewayError("HEAD_TOO_LARGE", f"a trailer or extension is over {limit_bytes} bytes"))

    def _await_head(self, byte_count: int) -> None:
        if self._head_bytes == byte_count and self.current is None:
            self.deadline_s = self.plane.now_s + self.plane.timeouts.head_s
        if self._head_bytes > self.plane.limits.head_bytes_max:
            self.refuse_malformed(head_too_large(self.plane.limits.head_bytes_max))

    def _take_whole(self, body: bytes) -> None:
        # one whole request with a head that was parsed before
        memory = self._memory
        exchange = self.new_exchange(memory.head, memory.length)  # type: ignore[arg-type]  # learned here
        exchange.is_received = True
        exchange.request_bytes = len(body)
        exchange.held_body = [body]
        if self.current is None:
            self.current = exchange
            exchange.start()
        else:
            self.admit(exchange)

    def _after_upgrade(self, rest: bytes) -> None:
        if not self._ignores_upgrade:
            self._is_deaf = True
            self.after_upgrade = b""
            self._hold_tunnel_bytes(rest)
            return
        # llhttp takes an Upgrade for the end of HTTP, and skips the body of its request. One that is not taken is
        # an ordinary request (Java's client offers h2c on its first POST): go on with a parser in the right state.
        self._ignores_upgrade = False
        head = self._last_head
        assert head is not None
        framing = b"Transfer-Encoding: chunked\r\n" if head.is_chunked else b""
        if self._length >= 0:
            framing = b"Content-Length: %d\r\n" % self._length
        self._parser = httptools.HttpRequestParser(self)
        self._feed = self._parser.feed_data
        self._is_primed = True
        self._feed(b"POST / HTTP/1.1\r\nHost: x\r\n%b\r\n" % framing)
        self._is_primed = False
        if rest:
            self.data_received(rest)

    def _hold_tunnel_bytes(self, data: bytes) -> None:
        assert self.after_upgrade is not None
        self.after_upgrade += data
        if len(self.after_upgrade) > self.plane.limits.write_buffer_bytes:
            self.block_reading(READ_BUFFER)

    def on_message_begin(self) -> None:
        """Note that a message has begun; some 50 ns for each that is parsed."""
        self._is_between = False

    def on_url(self, url: bytes) -> None:
        """Take (a piece of) the request target: a head has begun."""
        head = self._parsing
        if head is None:
            if self._is_primed:
                return
            self._parsing = RequestHead(url)
            self._length = -1
            self._field_count = self._special_bytes = 0
        else:
            head.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Sort one field by its rule."""
        head = self._parsing
        if head is None:  # a trailer: dropped, RFC 9110 §6.5.1
            return
        rule = request_rules.get(name)
        if rule is None:
            rule = classify_request(name)
        if not rule:
            head.fields.append((name, value))
            return
        self._field_count += 1
        self._special_bytes += len(name) + len(value)
        if rule == HOST:
            if head.host:
                self._refuse_head("BAD_REQUEST", "the head has two Host fields")
            head.host = value or b" "
        elif rule == LENGTH:
            try:
                self._length = int(value)
            except ValueError:  # Python reads no number of over 4,300 digits, zeros included
                self._refuse_head("BAD_REQUEST", f"Content-Length has {len(value)} digits")
        elif rule == API_KEY:
            self._take_credential(head, name, value, value)
        elif rule == ACCEPT_ENCODING:
            earlier = head.accept_encoding
            head.accept_encoding = b"%b, %b" % (earlier, value) if earlier else value
        elif rule == BEARER:
            self._take_credential(head, name, value, value[7:].strip() if value[:7].lower() == b"bearer " else b"")
        elif rule == CONNECTION:
            head.connection = b"%b, %b" % (head.connection, value) if head.connection else value
        elif rule != DROP:
            self._take_rare(head, rule, name, value)

    def _take_rare(self, head: RequestHead, rule: int, name: bytes, value: bytes) -> None:
        if rule == OWN:
            head.own_fields = [*(head.own_fields or ()), (name, value)]
        elif rule == PROXIED:
            if self.is_trusted:
                head.proxied_fields = [*(head.proxied_fields or ()), (name, value)]
        elif rule == VIA:
            head.via = head.via + b", " + value if head.via else value
        elif rule == REQUEST_ID:
            if is_valid_request_id(value):
                head.request_id = value.decode("ascii")
        elif rule == CODING:
            if head.is_chunked or value.lower() != b"chunked":
                shown = value[:40].decode("latin-1")
                self._refuse_head("NOT_IMPLEMENTED", f"Transfer-Encoding {shown!r}; only one chunked is served")
            head.is_chunked = True
        elif rule == EXPECT:
            if value.lower() != b"100-continue":
                shown = value[:40].decode("latin-1")
                self._refuse_head("EXPECTATION_FAILED", f"Expect {shown!r}; only 100-continue is served")
            head.expects_continue = True
        elif rule == UPGRADE:
            head.upgrade = value
        elif rule == SUBPROTOCOL:
            self._take_subprotocols(head, name, value)
        elif rule == VENDOR_KEY and value.startswith(KEY_PREFIX):
            self._take_credential(head, b"X-API-Key", value, value)
        elif rule == VENDOR_KEY:
            head.fields.append((name, value))
        elif rule == INVALID:
            shown = name[:60].decode("latin-1")
            self._refuse_head("BAD_REQUEST", f"field name {shown!r} has an underscore; use '-'")

    def _take_subprotocols(self, head: RequestHead, name: bytes, value: bytes) -> None:
        kept, keys = without_key_items(value)
        for key in keys:
            self._take_credential(head, b"X-API-Key", key, key)
        if kept:
            head.fields.append((name, kept))

    def _take_credential(self, head: RequestHead, name: bytes, value: bytes, credential: bytes) -> None:
        if head.own_fields is None:
            head.own_fields = [(name, value)]
        else:
            head.own_fields.append((name, value))
        if head.credential and credential and credential != head.credential:
            self._refuse_head("BAD_REQUEST", "the head carries different credentials; send one")
        head.credential = credential or head.credential

    def on_headers_complete(self) -> None:
        """Check what the parser does not, then start the exchange or queue it."""
        if self._is_primed:
            return
        parser = self._parser
        limits = self.plane.limits
        head, self._parsing = self._parsing, None
        assert head is not None
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                self._refuse_head("HTTP_VERSION", f"HTTP/{version} is not served; use HTTP/1.1")
            self._check_http_1_0(head)
        if self._field_count + len(head.fields) > limits.header_count_max:
            self._refuse_head("HEAD_TOO_LARGE", f"the head has over {limits.header_count_max} fields")
        if len(head.target) > URL_BYTES_MAX:
            self._refuse_head("URI_TOO_LONG", f"the request target is over {URL_BYTES_MAX} bytes")
        if self._head_bytes > limits.head_bytes_max and head.byte_count + self._special_bytes > limits.head_bytes_max:
            self._fault = head_too_large(limits.head_bytes_max)
            raise self._fault
        self._head_bytes = 0
        self._head_count += 1
        self._last_head = head
        head.method = method = parser.get_method()
        head.keeps_alive = parser.should_keep_alive()
        if head.target[:1] != b"/":
            self._take_other_form(head)
        if head.host not in hosts_seen and not (head.is_http_1_0 and not head.host):
            self._check_host(head.host)
        if method == b"CONNECT" or method == b"TRACE":
            self._refuse_head("METHOD_NOT_ALLOWED", f"{method.decode()} is not served", SERVED_METHODS)
        if head.upgrade:
            self._check_upgrade(head)
        self.receiving = exchange = self.new_exchange(head, self._length)
        self.admit(exchange)

    def _check_http_1_0(self, head: RequestHead) -> None:
        head.is_http_1_0 = True
        head.expects_continue = False
        if head.is_chunked:
            self._refuse_head("BAD_REQUEST", "HTTP/1.0 has no Transfer-Encoding")

    def _check_host(self, host: bytes) -> None:
        if not is_valid_host(host):
            self._refuse_head("BAD_REQUEST", "Host is not valid" if host else "the head needs one valid Host field")

    def _check_upgrade(self, head: RequestHead) -> None:
        if not self._parser.should_upgrade():
            return
        is_websocket = head.upgrade.strip().lower() == b"websocket" and head.method == b"GET"
        head.is_upgrade = is_websocket and not head.is_chunked and self._length <= 0
        if head.is_upgrade:
            head.keeps_alive = False  # what follows is no HTTP, whatever the upstream answers
        else:
            self._ignores_upgrade = True

    def _take_other_form(self, head: RequestHead) -> None:
        # absolute-form must be accepted; its authority replaces Host (RFC 9112 §3.2.2)
        scheme, mark, rest = head.target.partition(b"://")
        if not mark or scheme.lower() not in (b"http", b"https"):
            self._refuse_head("BAD_REQUEST", "the request target must be a path or an http(s) URL")
        end = min(at for at in (rest.find(b"/"), rest.find(b"?"), len(rest)) if at >= 0)
        if head.host:
            head.host = rest[:end]
        path = rest[end:]
        head.target = path if path.startswith(b"/") else b"/" + path

    def _refuse_head(self, code: str, message: str, allow: str = "") -> None:
        self._fault = GatewayError(code, message, allow=allow)
        raise self._fault

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body to its exchange."""
        self.receiving.take_body(body)  # type: ignore[union-attr]  # llhttp: after the head, before the end

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._ignores_upgrade:  # so says llhttp; see `_after_upgrade`
            return
        self._is_between = True
        exchange, self.receiving = self.receiving, None
        assert exchange is not None
        exchange.is_received = True
        exchange.end_body()


def head_too_large(limit_bytes: int) -> GatewayError:
    """Return the refusal of a head over the limit."""
    return GatewayError("HEAD_TOO_LARGE", f"the head is over {limit_bytes} bytes")


def _parse_fault(error: httptools.HttpParserError) -> GatewayError:
    cause = error.__context__
    if cause is not None and not isinstance(cause, httptools.HttpParserError):
        raise cause
    return GatewayError("BAD_REQUEST", f"the request is not valid HTTP/1.1 ({str(error).lower()[:100]})")
