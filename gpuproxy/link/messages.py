"""What worker and control say to each other over the link: length-prefixed MessagePack.

A frame is a 4-byte big-endian length and one message. Control answers `Authorize` with `Authorized` of the
same ``id``; `Revoke` and `Drain` are pushed. Both ends are of one version (one supervisor starts both), so
unknown messages are a fault.
"""

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from gpuproxy.types import Grant

FRAME_BYTES_MAX = 1 << 20  # a Grant is under 10 KiB; anything near this is a broken stream


class Hello(Struct, tag="hello", frozen=True):
    """First message of a worker: which slot it fills and its process id."""

    slot: int
    pid: int


class Authorize(Struct, tag="authorize", frozen=True):
    """Ask what the key with this SHA-256 digest (32 bytes) may do."""

    id: int
    digest: bytes


class Authorized(Struct, tag="authorized", frozen=True):
    """Answer to Authorize. ``grant`` is None for a key that is unknown, expired, revoked or of a blocked user."""

    id: int
    digest: bytes
    grant: Grant | None


class Unavailable(Struct, tag="unavailable", frozen=True):
    """Answer to Authorize when the store cannot be asked now; says nothing about the key."""

    id: int


class Revoke(Struct, tag="revoke", frozen=True):
    """Pushed: forget these keys at once."""

    key_ids: tuple[str, ...]


FromWorker = Hello | Authorize
FromControl = Authorized | Unavailable | Revoke

_encoder = msgspec.msgpack.Encoder()
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_from_control = msgspec.msgpack.Decoder(FromControl).decode


def frame(message: FromWorker | FromControl) -> bytes:
    """Return the message as one frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a byte stream into frame bodies; raises ValueError on a frame over FRAME_BYTES_MAX."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the body of every frame that `data` completes."""
        held = self._held + data
        start = 0
        while len(held) - start >= 4:
            size = int.from_bytes(held[start : start + 4], "big")
            if size > FRAME_BYTES_MAX:
                raise ValueError(f"link frame of {size} bytes is over the limit of {FRAME_BYTES_MAX}")
            if len(held) - start - 4 < size:
                break
            yield held[start + 4 : start + 4 + size]
            start += 4 + size
        self._held = held[start:]
