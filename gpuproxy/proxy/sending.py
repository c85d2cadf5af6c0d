"""The part of an exchange that sends: the head for an upstream, a connection for it, the body piece by piece.

The methods are longer and flatter than elsewhere because each call and attribute here is paid per request.
"""

import time
from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import UpstreamRequest
from gpuproxy.proxy.attempts import Attempts
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.exchange_state import CONNECTING, CONTINUE, JOINED_BYTES_MAX, READ_BUFFER, READ_UPLOAD, SENT
from gpuproxy.proxy.headers import (
    Field,
    join_fields,
    replace_fields,
    without_nominated,
)
from gpuproxy.proxy.retry import IDEMPOTENT
from gpuproxy.proxy.route import joined_path

if TYPE_CHECKING:
    from gpuproxy.proxy.pool import Origin
    from gpuproxy.proxy.upstream import UpstreamConnection


class Sending(Attempts):
    """Sends a request upstream."""

    __slots__ = ()

    trace_lines: bytes = b""  # more than none in a `TracedExchange`

    def _forward(self, endpoint: Endpoint) -> None:
        method, path, fields, body, request = self._sending
        if request.body is not None:
            body = self._question(endpoint, body, request) if request.asks_usage else request.body
        self._endpoint = endpoint
        self._patience_s = endpoint.first_byte_s
        replica = endpoint.replica
        if replica is not None:
            if replica.is_calm:
                replica.begun_count += 1
                self._generation = replica.generation
            else:
                self._attempt_ns = time.monotonic_ns()
                self._generation = replica.begin()
            if endpoint.model and endpoint.model != self._asked:
                path, body = self._renamed(endpoint, path, body)
        if endpoint.fixed_names:
            fields = [field for field in fields if field[0].lower() not in endpoint.fixed_names]
        head = self.head
        is_plain = fields is head.fields and not request.headers
        block = head.blocks.get(request.identity) if is_plain else None
        if block is None:
            block = self._block(fields, request)
            if is_plain:
                head.blocks[request.identity] = block
        if head.is_upgrade:
            framing = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        elif body is not None:
            self._is_body_whole = True
            self.held_body = [body]
            has_length = self.has_body or self.content_length >= 0 or body
            framing = b"Content-Length: %d\r\n" % len(body) if has_length else b""
        elif self.has_body and head.is_chunked:
            framing = b"Transfer-Encoding: chunked\r\n"
        elif self.content_length >= 0:
            framing = b"Content-Length: %d\r\n" % self.content_length
        else:
            framing = b""
        base_path = endpoint.base_path
        if base_path or path[:1] != b"/":
            path = joined_path(base_path, path)
        self._head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%bX-Request-Id: %b\r\n%b\r\n" % (
            method,
            path,
            head.host if endpoint.preserves_host and head.host else endpoint.host,
            endpoint.fixed_fields,
            block,
            self.trace_lines,
            self.request_id.encode(),
            framing,
        )
        self._attempts += 1
        origin = self._origin = endpoint.origin
        if self._attempts == 1 and endpoint.destination is not None and endpoint.destination.terms.total_s:
            self.plane.bounded[self] = self.plane.now_s + endpoint.destination.terms.total_s
        connection = origin.take(self.plane.now_s)
        if connection is not None:
            self._send(connection)
        else:
            self._connect_to(origin)

    def _block(self, fields: list[Field], request: UpstreamRequest) -> bytes:
        # the lines of the upstream's head that do not change from one call with this head to the next
        head = self.head
        if self._call is not None and self._call.is_envelope:
            return b"%bVia: 1.1 gpuproxy\r\n" % join_fields(replace_fields(fields, request.headers))
        if head.connection:
            fields = without_nominated(fields, head.connection)
        if request.headers:
            fields = replace_fields(fields, request.headers)
        if request.identity and head.is_upgrade:
            fields = [field for field in fields if field[0].lower() != b"sec-websocket-extensions"]
        encoding = b"identity" if request.identity else head.accept_encoding
        return b"%b%bVia: %b1.1 gpuproxy\r\n%b" % (
            join_fields(fields),
            b"Accept-Encoding: %b\r\n" % encoding if encoding else b"",
            head.via + b", " if head.via else b"",
            self.downstream.forwarded_fields(head),
        )

    def _forward_to_control(self) -> None:
        head = self.head
        fields = [*head.fields, *head.own_fields] if head.own_fields else head.fields
        if head.expects_continue and not self.is_received:
            self._write(CONTINUE)
        self._sending = self.method, head.target, fields, None, _UNCHANGED
        plane = self.plane
        self._forward(plane.control_endpoint if self.method in IDEMPOTENT else plane.control_changes)

    def _connect_to(self, origin: "Origin") -> None:
        self.state = CONNECTING
        self.plane.spawn(self._connect(origin))

    async def _connect(self, origin: "Origin") -> None:
        try:
            connection = await origin.connect(self._endpoint.connect_s)  # type: ignore[union-attr]  # chosen
        except GatewayError as error:
            if self.state == CONNECTING:
                self._unreachable(error)
            return
        except Exception:  # of a task nobody waits for: the call would wait without end
            if self.state == CONNECTING:
                self._fail()
            return
        if self.state == CONNECTING:
            self._send(connection)
        else:  # the client left meanwhile; somebody else will want the connection
            origin.give(connection, self.plane.now_s)

    def _unreachable(self, error: GatewayError) -> None:
        # nothing was sent: another replica may take it
        is_retriable = error.code in ("UPSTREAM_UNREACHABLE", "UPSTREAM_TIMEOUT", "UPSTREAM_BUSY")
        if not is_retriable or not self._goes_elsewhere("", has_failed=error.code != "UPSTREAM_BUSY"):
            self.refuse(error)

    def _send(self, connection: "UpstreamConnection") -> None:
        plane = self.plane
        outbox = plane.outbox
        self.state = SENT
        self.upstream = connection
        connection.exchange = self
        connection.chosen_turn = outbox.turn
        if self._is_body_whole:
            body = self.held_body[0]
            if len(body) <= JOINED_BYTES_MAX:
                outbox.writes.append((connection.transport, self._head + body))
            else:
                outbox.writes.append((connection.transport, self._head))
                outbox.writes.append((connection.transport, body))
            if not outbox.is_scheduled:
                outbox.schedule()
            self.downstream.deadline_s = plane.now_s + self._patience_s
            return
        outbox.write(connection.transport, self._head)
        held, self.held_body = self.held_body, []
        self.downstream.unblock_reading(READ_BUFFER)
        for part in held:
            self._send_body(part)
        if self.is_received:
            self._end_upload()
        else:
            self.downstream.deadline_s = plane.now_s + plane.timeouts.body_idle_s

    def _send_body(self, data: bytes) -> None:
        upstream = self.upstream
        assert upstream is not None
        piece = b"%x\r\n%b\r\n" % (len(data), data) if self.head.is_chunked else data
        self.plane.outbox.write(upstream.transport, piece)
        if self.request_bytes <= JOINED_BYTES_MAX:
            self.held_body.append(data)  # in case the connection turns out to be stale
        if len(piece) > JOINED_BYTES_MAX:
            self.plane.outbox.flush()  # as in `relay`
        self.downstream.deadline_s = self.plane.now_s + self.plane.timeouts.body_idle_s

    def _end_upload(self) -> None:
        if self.head.is_chunked and self.upstream is not None:
            self.plane.outbox.write(self.upstream.transport, b"0\r\n\r\n")
        if self._call is not None:
            self._call.body_bytes = self.request_bytes
        if not self.has_sent_head:
            self.downstream.deadline_s = self.plane.now_s + self._patience_s

    def block_upload(self) -> None:
        """The upstream takes no more bytes for now."""
        self.downstream.block_reading(READ_UPLOAD)

    def unblock_upload(self) -> None:
        """The upstream takes bytes again."""
        self.downstream.unblock_reading(READ_UPLOAD)


_UNCHANGED = UpstreamRequest()
