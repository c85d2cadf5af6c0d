"""What a webhook is sent, and the two ways its receiver can tell that it comes from here.

The body's own ``signature`` is the hex HMAC-SHA256 of the canonical body: the JSON object without that field, its keys
sorted at every depth, no white space, text as UTF-8. It stands last, so the canonical body is also what is left when
``,"signature":"…"`` is cut out. Beside it go the three headers of Standard Webhooks 1.0, whose libraries verify them
and refuse what is old.
"""

import base64
import binascii
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from gpuproxy.errors import GatewayError

PREFIX = "whsec_"
KEY_BYTES_MIN, KEY_BYTES_MAX = 24, 64  # Standard Webhooks 1.0, for the secrets it defines
KEY_BYTES = 32
TEXT_CHARACTERS_MIN, TEXT_CHARACTERS_MAX = 16, 128  # for a secret of another form


def new_secret() -> str:
    """Return a fresh secret in the form of Standard Webhooks."""
    return PREFIX + base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def check_secret(secret: str) -> None:
    """Refuse a secret that cannot sign. Raises GatewayError UNPROCESSABLE."""
    if secret.startswith(PREFIX):
        if KEY_BYTES_MIN <= len(_key_of(secret)) <= KEY_BYTES_MAX:
            return
        remedy = f"{PREFIX} is followed by base64 of {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes"
    elif TEXT_CHARACTERS_MIN <= len(secret) <= TEXT_CHARACTERS_MAX and secret.isascii() and secret.isprintable():
        return
    else:
        remedy = f"write {TEXT_CHARACTERS_MIN} to {TEXT_CHARACTERS_MAX} printable ASCII characters"
    raise GatewayError("UNPROCESSABLE", f"secret: cannot be used; {remedy}, or leave it out", param="secret")


def canonical(fields: Mapping[str, Any]) -> str:
    """Return what is signed."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def body_of(name: str, at: datetime, data: Mapping[str, Any], user_id: str, secret: str) -> bytes:
    """Return the signed body that tells of an event."""
    timestamp = at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    signed = canonical({"event": name, "timestamp": timestamp, "data": {**data, "user_id": user_id}})
    signature = hmac.digest(secret.encode(), signed.encode(), sha256).hex()
    return f'{signed[:-1]},"signature":"{signature}"}}'.encode()


def headers_of(message_id: str, sent_at: datetime, body: bytes, secrets_now: Sequence[str]) -> dict[str, str]:
    """Return the headers of Standard Webhooks, with one signature for each secret that is valid now."""
    timestamp = str(int(sent_at.timestamp()))
    signed = b".".join((message_id.encode(), timestamp.encode(), body))
    signatures = (base64.b64encode(hmac.digest(_key_of(secret), signed, sha256)).decode() for secret in secrets_now)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _key_of(secret: str) -> bytes:
    """Return the bytes that sign for Standard Webhooks; b"" for base64 that is none."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        return b""
