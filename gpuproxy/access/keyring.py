"""The gateway's own secrets: what signs access tokens, and what seals replies kept in the store.

They come from the variable that ``[auth] jwt_secret_env`` names, or from ``jwt.key`` in the data directory, which is
made once with mode 0600. Several may stand there, one after another: the first is used, all are still believed, so
that a secret can be replaced without logging anybody out. Whoever has one can be anybody: keep them out of the store.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from gpuproxy.errors import ConfigError
from gpuproxy.observe.logs import get_logger

SECRET_BYTES_MIN = 32  # RFC 7518 §3.2: a key for HS256 is at least as long as the hash
SECRETS_MAX = 8
FILE_NAME = "jwt.key"
NONCE_BYTES = 12

logger = get_logger(__name__)


class Keyring:
    """Secrets, the one in use first, each known by a name that does not give it away."""

    def __init__(self, given: tuple[bytes, ...]) -> None:
        self.secrets = {_name_of(secret): secret for secret in given}
        self.newest = _name_of(given[0])

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """Encrypt what only the same `context` shall open (AES-256-GCM)."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # slow to import, seldom needed

        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + AESGCM(_sealing_key(self.secrets[self.newest])).encrypt(nonce, plain, context)

    def unseal(self, sealed: bytes, context: bytes) -> bytes | None:
        """Return what was sealed; None if it was changed, meant for another context, or its secret is gone."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce, hidden = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        for secret in self.secrets.values():
            with suppress(InvalidTag):
                return AESGCM(_sealing_key(secret)).decrypt(nonce, hidden, context)
        return None

    def session_keys(self) -> tuple[bytes, ...]:
        """Return keys made from the secrets, in their order, for what workers seal: they need not know the secrets."""
        return tuple(hmac.digest(secret, b"gpuproxy sealed sessions", sha256) for secret in self.secrets.values())


def fresh_keyring() -> Keyring:
    """Return a keyring of one new secret, for who keeps nothing over a restart."""
    return Keyring((_new_secret(),))


def load_keyring(variable: str, data_dir: Path, environment: Mapping[str, str] = os.environ) -> Keyring:
    """Return the secrets in `variable`, or if that is empty those in the file, which is made if it is not there.

    Raises ConfigError for a variable that is not set and for a secret that is too short.
    """
    if variable:
        return _parsed(environment.get(variable, "").encode(), f"auth.jwt_secret_env: {variable}")
    path = data_dir / FILE_NAME
    if not path.exists():
        _make_file(path)
    if path.stat().st_mode & 0o077:
        logger.warning("the secret that signs tokens can be read by others; chmod 600 it", path=str(path))
    return _parsed(path.read_bytes(), str(path))


def _parsed(text: bytes, place: str) -> Keyring:
    given = tuple(text.split())
    if not given:
        raise ConfigError([f"{place} holds no secret; put the output of: openssl rand -hex 32"])
    if len(given) > SECRETS_MAX or min(len(secret) for secret in given) < SECRET_BYTES_MIN:
        remedy = f"write 1 to {SECRETS_MAX} of at least {SECRET_BYTES_MIN} characters, the one in use first"
        raise ConfigError([f"{place} holds a secret that is too short, or too many; {remedy}"])
    return Keyring(given)


def _make_file(path: Path) -> None:
    """Write the file whole or not at all; of several processes that do so at once, one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{FILE_NAME}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(_new_secret() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def _new_secret() -> bytes:
    return secrets.token_hex(SECRET_BYTES_MIN).encode()


def _name_of(secret: bytes) -> str:
    return hmac.digest(secret, b"gpuproxy key id", sha256).hex()[:16]


def _sealing_key(secret: bytes) -> bytes:
    return hmac.digest(secret, b"gpuproxy sealed replies", sha256)
