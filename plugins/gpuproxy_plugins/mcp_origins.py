"""Which web pages may call MCP servers through the gateway (MCP 2025-11-25, Transports, Security Warning).

Behind the gateway a server cannot notice DNS rebinding any more, for it sees its own name in Host. So the gateway looks
at Origin itself and refuses pages that are not listed. Programs send none and pass.

Pages that may call get what browsers need (Fetch Standard, CORS protocol): an answer to the question they ask first,
without a key, and leave to read the answers and their session id.
"""

from gpuproxy.plugin import GatewayError, HeaderList, Station, Visit, web_origins

ORIGIN = b"origin"
_ASKED = b"access-control-request-"
_GRANTED = (b"access-control-allow-origin", b"access-control-allow-credentials")
_PREFLIGHT_S = 7_200  # how long browsers remember the answer; none does for longer

readable = web_origins.readable


class Origins(web_origins.Origins):
    """The origins that may call, by the configuration."""

    def __init__(self, station: Station) -> None:
        super().__init__((*station.allowed_origins, station.public_origin), station.is_local)

    def check(self, origin: bytes) -> None:
        """Raise GatewayError FORBIDDEN if pages of this origin may not call."""
        if not self.allow(origin):
            raise GatewayError("FORBIDDEN", web_origins.refusal_of(origin))

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


def made_readable(fields: HeaderList, origin: bytes) -> HeaderList:
    """Return an answer's fields with leave for this origin in the place of what the server behind would allow."""
    return [field for field in fields if field[0].lower() not in _GRANTED] + readable(origin)
