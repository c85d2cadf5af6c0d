"""WebSocket frames for tests, built by the book and not by the code that reads them."""

import struct

TEXT = 1


def frame(payload: bytes, kind: int = TEXT, is_last: bool = True, key: bytes = b"", reserved: int = 0) -> bytes:
    """Return one frame as RFC 6455 §5.2 draws it."""
    size = len(payload)
    mask = 0x80 if key else 0
    head = bytes([(0x80 if is_last else 0) | reserved | kind])
    if size < 126:
        head += bytes([mask | size])
    elif size < 65_536:
        head += bytes([mask | 126]) + struct.pack(">H", size)
    else:
        head += bytes([mask | 127]) + struct.pack(">Q", size)
    return head + key + (bytes(byte ^ key[at % 4] for at, byte in enumerate(payload)) if key else payload)
