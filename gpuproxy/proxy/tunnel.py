"""A byte tunnel between two transports, for what follows a 101 Switching Protocols.

Each end replaces the protocol of one transport. Back-pressure crosses over: a side that takes no more stops
the other side's reading. When either side closes, both are closed; `done` is called once with the byte counts.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

from gpuproxy.errors import GatewayError

FLUSH_S = 30.0  # how long a peer may take to read what is left for it

_NO_LINGER = struct.pack("ii", 1, 0)


class TunnelEnd(asyncio.Protocol):
    """One end; `peer` is the other."""

    __slots__ = ("_done", "_is_over", "byte_count", "last_byte_s", "peer", "transport")

    peer: "TunnelEnd"

    def __init__(self, transport: asyncio.Transport, done: Callable[[], None]) -> None:
        self.transport = transport
        self.byte_count = 0
        self.last_byte_s = asyncio.get_running_loop().time()
        self._done = done
        self._is_over = False

    def data_received(self, data: bytes) -> None:
        """Pass the bytes to the other side as they are."""
        self.byte_count += len(data)
        self.last_byte_s = asyncio.get_running_loop().time()
        self.peer.transport.write(data)

    def pause_writing(self) -> None:
        """This side takes no more: stop reading the other."""
        if not self.peer.transport.is_closing():
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        """This side takes bytes again."""
        if not self.peer.transport.is_closing():
            self.peer.transport.resume_reading()

    def eof_received(self) -> bool:
        """Close; what is buffered for the other side is flushed first."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Take the other side down too and report the end once."""
        self.close()

    def cut(self, error: GatewayError) -> None:
        """End both sides; of the reason nobody can be told, for what the bytes mean is not known here."""
        self.close()

    def close(self) -> None:
        """End both sides, flushing what they still hold; idempotent."""
        if not self._is_over:
            for end in (self, self.peer):
                flush(end.transport)
        self.finish()

    def finish(self) -> None:
        """Report the end, once."""
        if not self._is_over:
            self._is_over = self.peer._is_over = True
            self._done()


def flush(transport: asyncio.Transport) -> None:
    """Close a connection when its peer has read what is left, but in a while at any rate."""
    transport.close()
    if transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)


def reset(transport: asyncio.Transport) -> None:
    """Drop a connection so that the peer sees a reset; without SO_LINGER uvloop's abort ends it like a clean close."""
    raw = transport.get_extra_info("socket")
    if raw is not None and not transport.is_closing():
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


Ends = tuple[TunnelEnd, TunnelEnd]
_Pair = TypeVar("_Pair", bound=Ends)


def join(client: asyncio.Transport, upstream: asyncio.Transport, done: Callable[[], None]) -> Ends:
    """Join two transports; returns the client's end and the upstream's, whose `byte_count` is what it received."""
    return joined((TunnelEnd(client, done), TunnelEnd(upstream, done)))


def joined(ends: _Pair) -> _Pair:
    """Join two ends."""
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for end in ends:
        end.transport.set_protocol(end)
    return ends
