"""Which web pages may call MCP servers through the gateway (MCP 2025-11-25, Transports, Security Warning).

Behind the gateway a server cannot notice DNS rebinding any more, for it sees its own name in Host. So the gateway looks
at Origin itself and refuses pages that are not listed. Programs send none and pass. Comparing Origin with Host would
be no check: a page whose name was bound to our address has both right.

Pages that may call get what browsers need (Fetch Standard, CORS protocol): an answer to the question they ask first,
without a key, and leave to read the answers and their session id.
"""

import re

from gpuproxy.plugin import GatewayError, HeaderList, Station, Visit

ORIGIN = b"origin"
_LOOPBACK = re.compile(rb"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?\Z")
_EXPOSED = b"Mcp-Session-Id, WWW-Authenticate, Retry-After, X-Request-Id"
_ASKED = b"access-control-request-"
_GRANTED = (b"access-control-allow-origin", b"access-control-allow-credentials")
_PREFLIGHT_S = 7_200  # how long browsers remember the answer; none does for longer


class Origins:
    """The origins that may call. Those of this machine may if the gateway listens for this machine only."""

    def __init__(self, station: Station) -> None:
        self._listed = frozenset(origin.encode() for origin in (*station.allowed_origins, station.public_origin))
        self._is_local = station.is_local

    def allow(self, origin: bytes) -> bool:
        """Tell whether pages of this origin may call."""
        return origin in self._listed or b"*" in self._listed or (self._is_local and bool(_LOOPBACK.match(origin)))

    def check(self, origin: bytes) -> None:
        """Raise GatewayError FORBIDDEN if pages of this origin may not call."""
        if not self.allow(origin):
            shown = origin[:100].decode("latin-1")
            raise GatewayError("FORBIDDEN", f"pages of {shown!r} may not call; list it in [mcp] allowed_origins")

    def preflight(self, visit: Visit) -> HeaderList | None:
        """Return the answer to a browser that asks whether it may call, None for another call. Raises FORBIDDEN."""
        asked = {name.lower(): value for name, value in visit.headers if name.lower().startswith((ORIGIN, _ASKED))}
        if visit.method != b"OPTIONS" or ORIGIN not in asked or _ASKED + b"method" not in asked:
            return None
        self.check(asked[ORIGIN])
        granted = [(b"Access-Control-Allow-Headers", wanted)] if (wanted := asked.get(_ASKED + b"headers")) else []
        return [
            (b"Access-Control-Allow-Origin", asked[ORIGIN]),
            (b"Access-Control-Allow-Methods", b"GET, POST, DELETE, OPTIONS"),
            *granted,
            (b"Access-Control-Max-Age", b"%d" % _PREFLIGHT_S),
            (b"Vary", b"Origin, Access-Control-Request-Headers"),
        ]


def origin_of(headers: HeaderList) -> bytes:
    """Return the Origin field, empty if there is none."""
    return next((value for name, value in headers if name.lower() == ORIGIN), b"")


def readable(origin: bytes) -> HeaderList:
    """Return the fields that let a page of this origin read an answer."""
    return [
        (b"Access-Control-Allow-Origin", origin),
        (b"Access-Control-Expose-Headers", _EXPOSED),
        (b"Vary", b"Origin"),
    ]


def made_readable(fields: HeaderList, origin: bytes) -> HeaderList:
    """Return an answer's fields with leave for this origin in the place of what the server behind would allow."""
    return [field for field in fields if field[0].lower() not in _GRANTED] + readable(origin)
