"""The ends a transcript is written from: plain sockets that send and expect exact bytes."""

import asyncio
import contextlib
import json
import re
import select
import socket
import struct
import time
from typing import Any

from msgspec import Struct

WAIT_S = 5.0  # a wait this long has failed; nothing here waits for time to pass
CHUNK_BYTES = 262_144


class Answer(Struct):
    """An answer as a client reads it. `is_whole` tells that its framing ended as announced."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes
    is_whole: bool

    def field(self, name: bytes) -> bytes | None:
        """Return the value of a field by its lower-case name, None if absent; fails if it is there twice."""
        values = [value for other, value in self.fields if other.lower() == name]
        assert len(values) < 2, values
        return values[0] if values else None

    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)


_ADDED = re.compile(
    rb"(via|x-forwarded-\w+|x-request-id|accept-encoding|content-length|transfer-encoding):", re.IGNORECASE
)


def _in_order(head: bytes) -> list[bytes]:
    lines = head.split(b"\r\n")
    return [line for line in lines if not _ADDED.match(line)] + sorted(line for line in lines if _ADDED.match(line))


class Wire:
    """One end of a TCP (or Unix) connection. `held` is what was received and not yet looked at."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.held = b""
        self.is_ended = False
        self.was_reset = False

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        async with asyncio.timeout(WAIT_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def send_what_fits(self, data: bytes) -> int:
        """Send until the kernel takes no more; return the bytes taken."""
        sent = 0
        try:
            while sent < len(data):
                sent += self.sock.send(data[sent:])
        except (BlockingIOError, ConnectionError):
            pass
        return sent

    async def receive(self) -> bool:
        """Receive something more into `held`; False at the end of the stream."""
        if self.is_ended:
            return False
        try:
            async with asyncio.timeout(WAIT_S):
                data = await asyncio.get_running_loop().sock_recv(self.sock, CHUNK_BYTES)
        except ConnectionError:
            self.was_reset, data = True, b""
        self.is_ended = not data
        self.held += data
        return bool(data)

    def take(self, count: int) -> bytes:
        """Take bytes off what is held."""
        data, self.held = self.held[:count], self.held[count:]
        return data

    async def expect(self, expected: bytes) -> None:
        """Receive exactly these bytes next."""
        try:
            while len(self.held) < len(expected) and expected.startswith(self.held):
                if not await self.receive():
                    break
        except TimeoutError:
            pass
        assert self.take(len(expected)) == expected

    async def expect_request(self, expected: bytes) -> None:
        """Receive this request next; only the fields a gateway adds may come in any order."""
        head, _, body = expected.partition(b"\r\n\r\n")
        assert _in_order(await self.read_head()) == _in_order(head + b"\r\n\r\n")
        if body:
            await self.expect(body)

    async def read(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end of the stream."""
        parts = [self.held]
        size, self.held = len(self.held), b""
        while size < count and await self.receive():
            parts.append(self.held)
            size += len(self.held)
            self.held = b""
        self.held = b"".join(parts)
        return self.take(count)

    async def read_head(self) -> bytes:
        """Return a head with its empty line, or what came before the end of the stream."""
        while b"\r\n\r\n" not in self.held:
            if not await self.receive():
                return self.take(len(self.held))
        return self.take(self.held.index(b"\r\n\r\n") + 4)

    async def read_to_end(self) -> bytes:
        """Return everything up to the end of the stream."""
        while await self.receive():
            pass
        return self.take(len(self.held))

    async def expect_end(self) -> None:
        """Expect the end of the stream and nothing before it."""
        assert await self.read_to_end() == b""

    async def expect_gone(self, within_s: float = WAIT_S) -> None:
        """Expect the other side to go, by an end or a reset; bytes before it are not looked at."""
        began_s = time.monotonic()
        await self.read_to_end()
        assert time.monotonic() - began_s < within_s

    async def expect_reset(self) -> None:
        """Expect the stream to be aborted, which nobody can take for its end."""
        await self.read_to_end()
        assert self.was_reset, "closed, but not aborted"

    async def answer(self, method: bytes = b"GET") -> Answer:
        """Read one answer to `method` by its framing."""
        head = await self.read_head()
        assert head.endswith(b"\r\n\r\n"), head
        line, *lines = head[:-4].split(b"\r\n")
        pairs = [text.partition(b": ") for text in lines]
        found = Answer(int(line.split(b" ", 2)[1]), [(name, value) for name, _, value in pairs], b"", True)
        if method == b"HEAD" or found.status in (204, 304) or found.status < 200:
            return found
        length = found.field(b"content-length")
        if found.field(b"transfer-encoding") == b"chunked":
            found.body, found.is_whole = await self._read_chunks()
        elif length is not None:
            found.body = await self.read(int(length))
            found.is_whole = len(found.body) == int(length)
        else:
            found.body = await self.read_to_end()
            found.is_whole = not self.was_reset
        return found

    async def _read_chunks(self) -> tuple[bytes, bool]:
        body = b""
        while True:
            while b"\r\n" not in self.held:
                if not await self.receive():
                    return body, False
            size = int(self.take(self.held.index(b"\r\n") + 2), 16)
            chunk = await self.read(size + 2)
            if len(chunk) < size + 2:
                return body + chunk, False
            assert chunk[-2:] == b"\r\n"
            body += chunk[:-2]
            if not size:
                return body, True

    def is_silent(self) -> bool:
        """Tell whether nothing waits to be received, not even an end."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not self.held and not poll.poll(0)

    def end(self) -> None:
        """Send the end of the stream, go on reading."""
        with contextlib.suppress(OSError):  # the other side has reset it
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close."""
        self.sock.close()

    def reset(self) -> None:
        """Abort: the other side sees a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Listener:
    """A scripted server: the test accepts each connection and plays its part."""

    def __init__(self, path: str = "", port: int = 0) -> None:
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind(path or ("127.0.0.1", port))
        self.sock.listen(128)
        self.port: int = 0 if path else self.sock.getsockname()[1]
        self.wires: list[Wire] = []

    async def accept(self) -> Wire:
        """Take in the next connection."""
        async with asyncio.timeout(WAIT_S):
            sock, _ = await asyncio.get_running_loop().sock_accept(self.sock)
        wire = Wire(sock)
        self.wires.append(wire)
        return wire

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def is_untouched(self) -> bool:
        """Tell whether no connection waits to be accepted."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the listener and all it accepted."""
        self.sock.close()
        for wire in self.wires:
            wire.close()
