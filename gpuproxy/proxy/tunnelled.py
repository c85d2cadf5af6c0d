"""The part of an exchange that has become a tunnel: from the upstream's 101 to the receipt."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError
from gpuproxy.link.wallet import Outcome
from gpuproxy.proxy import tunnel, websocket
from gpuproxy.proxy.answer import Answer
from gpuproxy.proxy.exchange_state import DONE, READ_BUFFER
from gpuproxy.proxy.limits import unknown_limits

if TYPE_CHECKING:
    from gpuproxy.proxy.upstream import UpstreamConnection


class Tunnelled(Answer):
    """Joins an exchange's two connections."""

    __slots__ = ()

    def switch_protocols(self, connection: "UpstreamConnection") -> None:
        """The upstream agreed to switch: pass its 101 on and join both sides byte by byte."""
        call, handler = self._call, self._handler
        if call is not None and handler is not None:  # first of all: should it fail, the call is refused as a whole
            self._reader = handler.reader(call, 101, websocket.KIND)
        self.has_sent_head = True
        self._status = 101
        self._first_byte_ns = time.monotonic_ns()
        downstream = self.downstream
        head = connection.head
        if self._generation >= 0:
            self._report(head, self._first_byte_ns)  # a tunnel may last for days: its endpoint is well now
        self._write(
            b"%bConnection: Upgrade\r\nUpgrade: %b\r\nX-Request-Id: %b\r\n\r\n"
            % (head.start, head.upgrade, self.request_id.encode())
        )
        held, downstream.after_upgrade = downstream.after_upgrade or b"", b""
        connection.exchange = None
        self.upstream = None
        downstream.current = None
        self.plane.downstreams.discard(downstream)
        downstream.unblock_reading(READ_BUFFER)
        self.plane.outbox.flush()
        watch = websocket.watch(self, self._reader, self._bill)
        join = tunnel.join if watch is None else watch.join
        ends = join(downstream.transport, connection.transport, self._end_tunnel)
        self._collected = None
        self.plane.tunnels[self] = ends
        connection.origin.forget(connection)
        if downstream.is_write_blocked:
            ends[0].pause_writing()  # it was told before it was an end, and is not told again
        if held:
            ends[0].data_received(held)
        if connection.tunnel_bytes:
            ends[1].data_received(connection.tunnel_bytes)

    @property
    def has_limit(self) -> bool:
        """Tell whether the tokens of this call count against a limit."""
        return self._tokens is not None

    def count(self, used: int, told: Callable[[], None]) -> bool:
        """Count the tokens that answers have used by now; end the tunnel if the limit has no more.

        False: control is asked, and `told` is called when it has answered.
        """
        if self._tokens is None:  # the end has counted
            return True
        purse, most, _ = self._tokens
        more = min(used - most, purse.limit)

        def counted(outcome: Outcome) -> None:
            if outcome == "taken":
                purse.taken(more)
                if self.state == DONE:
                    purse.uncount(more, purse.lease_id)  # the end has counted it too
                else:
                    self._tokens = purse, most + more, purse.lease_id
            elif self.state != DONE:
                self.cut_off(purse.refusal() if outcome == "refused" else unknown_limits())
            told()

        if more <= 0:
            return True
        if not purse.take(more, counted):
            return False
        self._tokens = purse, most + more, purse.lease_id
        return True

    def tend_tunnel(self, ends: tunnel.Ends, now_s: float) -> None:
        """End the tunnel if it is silent for too long, or its key may do nothing any more."""
        grant = self._grant
        if max(end.last_byte_s for end in ends) < now_s - self.stream_idle_s():
            ends[0].close()
        elif grant is not None and not self.plane.admission.is_good(grant):
            self.cut_off(GatewayError("UNAUTHORIZED", "this API key is expired or revoked"))

    def _end_tunnel(self) -> None:
        ends = self.plane.tunnels.pop(self, None)
        if ends is not None:
            self.request_bytes, self._response_bytes = ends[0].byte_count, ends[1].byte_count
        self._finish("cut" if self._error else "ok")
