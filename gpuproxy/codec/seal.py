"""Text that only this gateway can have written and only it can read: what a client keeps for us and brings back.

AES-256-GCM with a random nonce, written as base64url, so visible ASCII. The keys are the same in all workers and on all
nodes, and over restarts; the first one seals, all are believed. Costs 2 µs to seal or to read. `cryptography` takes
7 MB and 30 ms to import, so it is imported when it is first needed.
"""

import base64
import binascii
import secrets
from typing import TYPE_CHECKING

from gpuproxy.errors import GatewayError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12
TAG_BYTES = 16
SEALED_BYTES_MAX = 8_192  # longer text is not ours


class Seal:
    """Seals and reads by keys of 32 bytes. Without any it can do neither."""

    def __init__(self, keys: tuple[bytes, ...] = ()) -> None:
        self._keys = keys
        self._ciphers: tuple[AESGCM, ...] = ()

    def take(self, keys: tuple[bytes, ...]) -> None:
        """Go by these keys from now on, the one that seals first."""
        self._keys = keys
        self._ciphers = ()

    def warm(self) -> tuple["AESGCM", ...]:
        """Get ready, so that no call waits for it. Raises GatewayError UNAVAILABLE without a key."""
        if not self._keys:
            raise GatewayError("UNAVAILABLE", "the secrets that seal sessions are not known yet; try again", 1)
        if not self._ciphers:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._ciphers = tuple(AESGCM(key) for key in self._keys)
        return self._ciphers

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """Return `plain` as text that only the same `context` reads. Raises GatewayError UNAVAILABLE."""
        cipher = (self._ciphers or self.warm())[0]
        nonce = secrets.token_bytes(NONCE_BYTES)
        return _encoded(nonce + cipher.encrypt(nonce, plain, context))

    def unseal(self, text: bytes, context: bytes) -> bytes | None:
        """Return what was sealed, None if this text is not ours. Raises GatewayError UNAVAILABLE."""
        from cryptography.exceptions import InvalidTag

        ciphers = self._ciphers or self.warm()
        sealed = _decoded(text)
        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            return None
        for cipher in ciphers:
            try:
                return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
            except InvalidTag:
                continue
        return None


def _decoded(text: bytes) -> bytes:
    if len(text) > SEALED_BYTES_MAX:
        return b""
    try:
        sealed = base64.b64decode(text + b"=" * (-len(text) % 4), b"-_", validate=True)
    except binascii.Error:
        return b""
    return sealed if _encoded(sealed) == text else b""  # the last character may have bits that mean nothing


def _encoded(sealed: bytes) -> bytes:
    return base64.urlsafe_b64encode(sealed).rstrip(b"=")
