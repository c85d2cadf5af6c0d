"""Access tokens: signed, short-lived, and good for one session only.

PyJWT checks form and signature (RFC 7515, 7519); algorithm and secret come from us and never from the token (RFC 8725
§3.1). The claims are then read by a closed type, since PyJWT takes ``"exp": "1e3"`` for a number. A token is as good
as its session: `gpuproxy.access.callers` asks the store, so logging out or a new password ends it at once.
"""

import json
import time
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import Struct

from gpuproxy.access.keyring import Keyring
from gpuproxy.errors import GatewayError

ALGORITHM = "HS256"
ISSUER = "gpuproxy"
AUDIENCE = "gpuproxy-management"
KIND = "access"
COOKIE = "cookie"  # of a browser's session: as good, but never taken where a header carries it
LEEWAY_S = 30  # two machines' clocks may differ by this
TOKEN_CHARACTERS_MAX = 2_048  # ours have 450


class Claims(Struct, frozen=True):
    """What an access token says; times are unix seconds, `sid` is the session."""

    sub: str
    sid: str
    jti: str
    iat: int
    nbf: int
    exp: int
    iss: str
    aud: str
    typ: str


def claims_for(user_id: str, session_id: str, lifetime_s: float, kind: str = KIND) -> Claims:
    """Return the claims of a new token that is good from now on."""
    now_s = int(time.time())
    return Claims(user_id, session_id, str(uuid4()), now_s, now_s, now_s + int(lifetime_s), ISSUER, AUDIENCE, kind)


def sign(keyring: Keyring, claims: Claims) -> str:
    """Return the token that carries these claims. Cost: 20 µs."""
    import jwt  # 130 ms to import

    secret = keyring.secrets[keyring.newest]
    return jwt.encode(msgspec.to_builtins(claims), secret, ALGORITHM, headers={"kid": keyring.newest})


def looks_like_token(credential: str) -> bool:
    """Tell a token from an API key, which has no dots."""
    return credential.count(".") == 2


def read(keyring: Keyring, token: str, kind: str = KIND) -> Claims:
    """Return the claims of a token of this kind that we made and whose time has not passed.

    Raises GatewayError UNAUTHORIZED.
    """
    if len(token) > TOKEN_CHARACTERS_MAX:
        raise _unauthorized()
    try:
        claims = msgspec.convert(_payload(keyring, token), Claims)
    except (ValueError, RecursionError):  # msgspec's errors and json's are ValueErrors
        raise _unauthorized() from None
    now_s = time.time()
    is_ours = (claims.iss, claims.aud, claims.typ) == (ISSUER, AUDIENCE, kind)
    if not is_ours or claims.nbf > now_s + LEEWAY_S or claims.exp <= now_s - LEEWAY_S:
        raise _unauthorized()
    return claims


def _payload(keyring: Keyring, token: str) -> Any:
    import jwt

    try:
        name = jwt.get_unverified_header(token).get("kid")
        secret = keyring.secrets.get(name) if isinstance(name, str) else None
        if secret is None:
            raise ValueError("signed with no secret of ours")
        verified = jwt.PyJWS().decode_complete(token, secret, algorithms=[ALGORITHM])
    except jwt.InvalidTokenError as error:
        raise ValueError("not signed by us") from error
    return json.loads(verified["payload"], object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a claim stands twice")
    return fields


def _unauthorized() -> GatewayError:
    return GatewayError("UNAUTHORIZED", "the access token is invalid, expired or revoked; log in or refresh it")
