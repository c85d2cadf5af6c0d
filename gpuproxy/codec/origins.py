"""Which web pages may call MCP servers, and the fields that let them read an answer (Fetch Standard, CORS protocol).

Comparing Origin with Host would be no check: a page whose name was bound to our address has both right.
"""

import re
from collections.abc import Iterable

_LOOPBACK = re.compile(rb"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?\Z")
_EXPOSED = b"Mcp-Session-Id, WWW-Authenticate, Retry-After, X-Request-Id"


class Origins:
    """The origins that may call. Those of this machine may if the gateway listens for this machine only."""

    def __init__(self, listed: Iterable[str], is_local: bool) -> None:
        self._listed = frozenset(origin.encode() for origin in listed)
        self._is_local = is_local

    def allow(self, origin: bytes) -> bool:
        """Tell whether pages of this origin may call."""
        return origin in self._listed or b"*" in self._listed or (self._is_local and bool(_LOOPBACK.match(origin)))


def refusal_of(origin: bytes) -> str:
    """Return what is said to a page that may not call."""
    return f"pages of {origin[:100].decode('latin-1')!r} may not call; list it in [mcp] allowed_origins"


def readable(origin: bytes) -> list[tuple[bytes, bytes]]:
    """Return the fields that let a page of this origin read an answer."""
    return [
        (b"Access-Control-Allow-Origin", origin),
        (b"Access-Control-Expose-Headers", _EXPOSED),
        (b"Vary", b"Origin"),
    ]
