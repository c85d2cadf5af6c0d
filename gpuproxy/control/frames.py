"""WebSocket's frames (RFC 6455), without I/O: bytes of a client become messages, texts become bytes for it.

No extensions and no compression: deflate costs 90 kB for each client. A reader between two messages holds nothing.
"""

import base64
import binascii
import struct
from hashlib import sha1
from typing import NamedTuple

from gpuproxy.codec.websocket import BINARY, TEXT, unmasked
from gpuproxy.errors import GatewayError

MESSAGE_BYTES_MAX = 65_536
MESSAGE_FRAMES_MAX = 1_024  # a frame takes time, however small it is
CONTINUATION, CLOSE, PING, PONG = 0x0, 0x8, 0x9, 0xA
OPCODES = (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
CONTROL_BYTES_MAX = 125
NORMAL, PROTOCOL_ERROR, UNSUPPORTED, INVALID_TEXT, TOO_BIG = 1000, 1002, 1003, 1007, 1009  # RFC 6455 §7.4.1
UNSAYABLE = (1004, 1005, 1006)  # between them and 1014 all others are registered; from 3000 on they are free
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY_BYTES = 16
WEBSOCKET_VERSION = "13"


class FrameError(Exception):
    """The client breaks the protocol; `code` is what the connection is closed with."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Message(NamedTuple):
    """A whole message, or a control frame."""

    opcode: int
    data: bytes


class _Frame(NamedTuple):
    is_final: bool
    opcode: int
    data: bytes
    end: int


class FrameReader:
    """Takes bytes as they come; never holds more than a message of MESSAGE_BYTES_MAX and what came with it."""

    __slots__ = ("_begun", "_begun_bytes", "_buffer", "_opcode")

    def __init__(self) -> None:
        self._buffer = b""
        self._begun: list[bytes] | None = None  # of a message in several frames
        self._begun_bytes = 0
        self._opcode = CONTINUATION  # of that message; CONTINUATION: there is none

    def feed(self, data: bytes) -> list[Message]:
        """Return what is complete now. Raises FrameError, after which nothing more may be fed."""
        data, at, found = self._buffer + data, 0, []
        while (frame := _frame_at(data, at)) is not None:
            at = frame.end
            if (message := self._message(frame)) is not None:
                found.append(message)
        self._buffer = data[at:]
        return found

    def _message(self, frame: _Frame) -> Message | None:
        if frame.opcode >= CLOSE:
            return Message(frame.opcode, frame.data)
        if (frame.opcode == CONTINUATION) != (self._opcode != CONTINUATION):
            raise FrameError(PROTOCOL_ERROR, "a frame continues no message, or begins one inside another")
        opcode, parts = self._opcode or frame.opcode, self._begun or []
        parts.append(frame.data)
        size = self._begun_bytes + len(frame.data)
        if size > MESSAGE_BYTES_MAX or len(parts) > MESSAGE_FRAMES_MAX:
            raise FrameError(TOO_BIG, f"a message has at most {MESSAGE_BYTES_MAX} bytes in {MESSAGE_FRAMES_MAX} frames")
        if frame.is_final:
            self._begun, self._begun_bytes, self._opcode = None, 0, CONTINUATION
            return Message(opcode, b"".join(parts))
        self._begun, self._begun_bytes, self._opcode = parts, size, opcode
        return None


def _frame_at(data: bytes, at: int) -> _Frame | None:
    """Return the frame that begins at a place; None if it is not complete."""
    if len(data) < at + 2:
        return None
    first, second = data[at], data[at + 1]
    is_final, opcode, size = bool(first & 0x80), first & 0x0F, second & 0x7F
    _check(first, second, opcode, size, is_final)
    begin = at + 2 + {126: 2, 127: 8}.get(size, 0)
    if len(data) < begin:
        return None
    if size > CONTROL_BYTES_MAX:
        size = int.from_bytes(data[at + 2 : begin], "big")
    if size > MESSAGE_BYTES_MAX:
        raise FrameError(TOO_BIG, f"a message has at most {MESSAGE_BYTES_MAX} bytes")
    end = begin + 4 + size
    if len(data) < end:
        return None
    return _Frame(is_final, opcode, unmasked(data[begin + 4 : end], data[begin : begin + 4]), end)


def _check(first: int, second: int, opcode: int, size: int, is_final: bool) -> None:
    if first & 0x70 or opcode not in OPCODES:
        raise FrameError(PROTOCOL_ERROR, "a frame uses an extension nobody agreed to")
    if not second & 0x80:
        raise FrameError(PROTOCOL_ERROR, "a frame of a client must be masked")
    if opcode >= CLOSE and (size > CONTROL_BYTES_MAX or not is_final):
        raise FrameError(PROTOCOL_ERROR, "a control frame is too long or in parts")


def answering_code(data: bytes) -> int:
    """Return what a client's frame that closes is answered with: its own code, or what is wrong (RFC 6455 §7.4)."""
    code = int.from_bytes(data[:2], "big") if data else NORMAL
    if not (NORMAL <= code <= 1014 and code not in UNSAYABLE) and not 3000 <= code <= 4999:
        return PROTOCOL_ERROR
    try:
        data[2:].decode()
    except UnicodeDecodeError:
        return INVALID_TEXT
    return code


def frame(opcode: int, data: bytes) -> bytes:
    """Return a frame as a server sends it: whole and not masked."""
    size = len(data)
    if size <= CONTROL_BYTES_MAX:
        return bytes((0x80 | opcode, size)) + data
    if size <= 0xFFFF:
        return struct.pack(">BBH", 0x80 | opcode, 126, size) + data
    return struct.pack(">BBQ", 0x80 | opcode, 127, size) + data


def upgrade(version: str, key: str) -> bytes:
    """Return the head that accepts a handshake (RFC 6455 §4.2.2). Raises GatewayError UPGRADE_REQUIRED, BAD_REQUEST."""
    if version != WEBSOCKET_VERSION:
        message = f"Sec-WebSocket-Version is {version[:20]!r}; /ws speaks {WEBSOCKET_VERSION}"
        raise GatewayError("UPGRADE_REQUIRED", message)
    try:
        is_key = len(base64.b64decode(key, validate=True)) == KEY_BYTES
    except binascii.Error:
        is_key = False
    if not is_key:
        raise GatewayError("BAD_REQUEST", f"Sec-WebSocket-Key is not the Base64 of {KEY_BYTES} bytes")
    accept = base64.b64encode(sha1(key.encode() + GUID, usedforsecurity=False).digest())
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nServer: gpuproxy\r\n"
    return head + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
