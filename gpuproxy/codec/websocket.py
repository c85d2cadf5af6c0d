"""WebSocket frames as bytes: where frames and messages end, what messages say, how one is closed (RFC 6455 §5).

Nothing here changes what is forwarded. A message may come in several frames with control frames between them, a frame
in any number of pieces; what is made of them does not depend on how they were split. Messages that are compressed or
too long are not held, but counted.
"""

from collections.abc import Callable
from functools import lru_cache

MESSAGE_BYTES_MAX = 1_048_576  # usage events repeat what was said, without the audio
CLOSE_REASON_BYTES_MAX = 123  # RFC 6455 §5.5
POLICY_VIOLATION, TRY_LATER, GOING_AWAY = 1008, 1013, 1001  # RFC 6455 §7.4.1; 1013 of the IANA registry

TEXT, BINARY = 1, 2
_FIN, _RSV, _MASK = 0x80, 0x70, 0x80
_WHOLE_TEXT = _FIN | TEXT
_HEAD_BYTES_MAX = 14
_LONG_BYTES = 4_096  # from here on tables are quicker than one long number


class MessageReader:
    """Watches one direction of a connection and hands over each whole message of the wanted kinds, unmasked."""

    __slots__ = (
        "_head",
        "_is_amid",
        "_is_control",
        "_is_held",
        "_is_last",
        "_key",
        "_kinds",
        "_left",
        "_limit_bytes",
        "_message",
        "_size",
        "_take",
        "unread_count",
    )

    def __init__(
        self,
        take: Callable[[bytes], object],
        kinds: tuple[int, ...] = (TEXT,),
        limit_bytes: int = MESSAGE_BYTES_MAX,
    ) -> None:
        self._take = take
        self._kinds = kinds
        self._limit_bytes = limit_bytes
        self._head = b""  # the beginning of a frame's head
        self._left = 0  # bytes of the frame that are still to come
        self._key = b""
        self._is_last = self._is_control = False  # of the frame
        self._is_amid = self._is_held = False  # of the message
        self._message: list[bytes] = []
        self._size = 0
        self.unread_count = 0  # messages of the wanted kinds that could not be handed over

    @property
    def is_between_frames(self) -> bool:
        """Tell whether a frame of somebody else may follow here."""
        return not self._left and not self._head

    def rest_of_frame(self, data: bytes) -> int:
        """Return how many bytes of `data`, which comes next, belong to the frame that has begun."""
        if not self._head:
            return min(self._left, len(data))
        head = self._head + data[:_HEAD_BYTES_MAX]
        head_size, length = _measure(head)
        if not head_size:
            return len(data)
        return min(head_size - len(self._head) + length, len(data))

    def feed(self, data: bytes) -> None:
        """Look at the next bytes. One whole text message in one frame, the common case, is handed over as it is."""
        if data[:1] == b"\x81" and not self._left and not self._head and not self._is_amid:
            head_size, length = _measure(data)
            if head_size and len(data) == head_size + length <= self._limit_bytes and data[1] < _MASK:
                if TEXT in self._kinds:
                    self._take(data[head_size:])
                return
        self._cut(data)

    def _cut(self, data: bytes) -> None:
        at, size = 0, len(data)
        while at < size:
            if not self._left:
                before = len(self._head)
                head = self._head + data[at : at + _HEAD_BYTES_MAX - before]
                head_size, length = _measure(head)
                if not head_size:
                    self._head = head
                    return
                at += head_size - before
                self._head = b""
                self._begin(head[:head_size], length)
            end = min(size, at + self._left)
            if self._is_held and not self._is_control and end > at:
                self._hold(data[at:end])
            self._left -= end - at
            at = end
            if not self._left:
                self._end()

    def _hold(self, piece: bytes) -> None:
        """Keep a piece, unmasked as it comes: no read costs more for a message being long."""
        if self._key:
            key = self._key
            turn = len(piece) % 4
            piece = unmasked(piece, key)
            self._key = key[turn:] + key[:turn]
        self._message.append(piece)

    def _begin(self, head: bytes, length: int) -> None:
        kind = head[0] & 0x0F
        self._is_last = bool(head[0] & _FIN)
        self._is_control = kind >= 8
        self._key = head[-4:] if head[1] & _MASK else b""
        self._left = length
        if self._is_control:
            return
        if kind:  # else it goes on with the message
            self._is_held = kind in self._kinds and not head[0] & _RSV
            if kind in self._kinds and not self._is_held:
                self.unread_count += 1
            self._size = 0
            self._message = []
        self._size += length
        if self._is_held and self._size > self._limit_bytes:
            self._is_held = False
            self._message = []
            self.unread_count += 1

    def _end(self) -> None:
        if self._is_control:
            return
        self._is_amid = not self._is_last
        if not self._is_held:
            return
        if self._is_last:
            message = b"".join(self._message)
            self._message = []
            self._is_held = False
            self._take(message)


def _measure(head: bytes) -> tuple[int, int]:
    """Return the size of a frame's head and of its payload; 0 for a head that is not whole yet."""
    if len(head) < 2:
        return 0, 0
    length = head[1] & 0x7F
    size = 2
    if length == 126:
        size = 4
        length = int.from_bytes(head[2:4], "big")
    elif length == 127:
        size = 10
        length = int.from_bytes(head[2:10], "big")
    if head[1] & _MASK:
        size += 4
    return (size, length) if len(head) >= size else (0, 0)


def unmasked(payload: bytes, key: bytes) -> bytes:
    """Return the payload without its mask, or with it. About 2 ns a byte."""
    size = len(payload)
    if size > _LONG_BYTES:
        changed = bytearray(payload)
        for at in range(4):
            changed[at::4] = payload[at::4].translate(_mask_table(key[at]))
        return bytes(changed)
    mask = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")


@lru_cache(256)
def _mask_table(byte: int) -> bytes:
    return bytes(value ^ byte for value in range(256))


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a server's frame that closes the connection; a long reason is cut."""
    text = reason.encode()[:CLOSE_REASON_BYTES_MAX].decode("utf-8", "ignore").encode()
    return b"\x88%c%b%b" % (2 + len(text), code.to_bytes(2, "big"), text)
