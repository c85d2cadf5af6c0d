"""What happens to each header field on its way through: one table for requests, one for answers.

Every field name is classified once and remembered as it was spelled, so that the hot path costs one dict
look-up a field. RFC 9110 §7.6.1 (hop-by-hop), §7.6.3 (Via); framing fields are never copied but written anew.
"""

import re
from collections.abc import Iterable

from gpuproxy.errors import GatewayError

Field = tuple[bytes, bytes]

# KEEP must be 0: the hot path tests `if rule`.
KEEP = 0
DROP = 1  # hop-by-hop or never forwarded
OWN = 2  # meant for the gateway: reaches control, never an upstream
HOST = 3
LENGTH = 4
CODING = 5
CONNECTION = 6
API_KEY = 7
BEARER = 8
UPGRADE = 9
EXPECT = 10
VIA = 11
PROXIED = 12  # what a proxy in front said of the client: kept only from a trusted one
REQUEST_ID = 13
ACCEPT_ENCODING = 14
INVALID = 15
CONTENT_TYPE = 16
BUFFERING = 17
ENCODING = 18
SUBPROTOCOL = 19
VENDOR_KEY = 20  # where some vendors' SDKs put their key: it may be one of ours, or meant for the upstream

_HOP_BY_HOP = dict.fromkeys(
    (
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-authentication-info",
    ),
    DROP,
)

_REQUEST: dict[bytes, int] = {
    **_HOP_BY_HOP,
    b"host": HOST,
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"x-api-key": API_KEY,
    b"authorization": BEARER,
    b"cookie": OWN,
    b"idempotency-key": OWN,
    b"x-rate-limit-override": OWN,
    b"upgrade": UPGRADE,
    b"expect": EXPECT,
    b"via": VIA,
    b"x-forwarded-for": PROXIED,
    b"x-forwarded-proto": PROXIED,
    b"x-forwarded-host": PROXIED,
    b"x-forwarded-port": PROXIED,
    b"forwarded": PROXIED,
    b"x-real-ip": PROXIED,
    b"x-request-id": REQUEST_ID,
    b"accept-encoding": ACCEPT_ENCODING,
    b"sec-websocket-protocol": SUBPROTOCOL,
    b"api-key": VENDOR_KEY,  # Azure
    b"x-goog-api-key": VENDOR_KEY,
}

_RESPONSE: dict[bytes, int] = {
    **_HOP_BY_HOP,
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"x-request-id": REQUEST_ID,
    b"content-type": CONTENT_TYPE,
    b"x-accel-buffering": BUFFERING,
    b"content-encoding": ENCODING,
}

_INTERNAL_PREFIXES = (b"x-user-", b"x-internal-")  # names a backend may trust; a client must not forge them
_SPELLINGS_MAX = 1024  # spellings remembered a table; beyond it a name is classified anew each time

# The caches the parser callbacks read. Seeded with the usual spellings on first use.
request_rules: dict[bytes, int] = {}
response_rules: dict[bytes, int] = {}


def classify_request(name: bytes) -> int:
    """Return the rule of a request field and remember the spelling."""
    lower = name.lower()
    if b"_" in name:
        rule = INVALID  # `Content_Length` and `Content-Length` are one to many backends
    elif lower.startswith(_INTERNAL_PREFIXES):
        rule = PROXIED
    else:
        rule = _REQUEST.get(lower, KEEP)
    return _remember(request_rules, name, rule)


def classify_response(name: bytes) -> int:
    """Return the rule of an answer's field and remember the spelling."""
    return _remember(response_rules, name, _RESPONSE.get(name.lower(), KEEP))


def _remember(rules: dict[bytes, int], name: bytes, rule: int) -> int:
    if len(rules) < _SPELLINGS_MAX and len(name) <= 64:
        rules[name] = rule
    return rule


_PLAIN_CONNECTION = frozenset((b"keep-alive", b"close", b"upgrade", b"keep-alive, upgrade", b"upgrade, keep-alive"))


def without_nominated(fields: list[Field], connection: bytes) -> list[Field]:
    """Return `fields` without those that the value of Connection names (RFC 9110 §7.6.1)."""
    lower = connection.lower()
    if lower in _PLAIN_CONNECTION:
        return fields
    nominated = {token.strip() for token in lower.split(b",")}
    return [field for field in fields if field[0].lower() not in nominated]


_HEAD_FORMATS = tuple(b"%b: %b\r\n" * count for count in range(48))


def join_fields(fields: list[Field]) -> bytes:
    """Return the fields as header lines, each with its line end."""
    count = len(fields)
    if count < len(_HEAD_FORMATS):
        flat: list[bytes] = []
        for field in fields:
            flat += field
        return _HEAD_FORMATS[count] % tuple(flat)
    return b"".join([b"%b: %b\r\n" % field for field in fields])


def replace_fields(fields: list[Field], replacing: Iterable[Field]) -> list[Field]:
    """Return `fields` with those of the same names taken out and `replacing` put at the end, but for empty ones."""
    names = {name.lower() for name, _ in replacing}
    return [field for field in fields if field[0].lower() not in names] + [field for field in replacing if field[1]]


_HOST = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?\Z")
hosts_seen: set[bytes] = set()  # valid ones; the hot path looks here first


def is_valid_host(host: bytes) -> bool:
    """Tell whether a Host value is a name or address with an optional port (RFC 9112 §3.2)."""
    if not _HOST.match(host):
        return False
    if len(hosts_seen) < 256:
        hosts_seen.add(host)
    return True


_TOKEN = re.compile(rb"[!#$%&'*+.^`|~0-9A-Za-z-]+\Z")  # RFC 9110 §5.6.2 without "_", see classify_request
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\Z")


def checked_fields(given: dict[str, str]) -> list[Field]:
    """Turn headers given as JSON into fields that may go upstream. Raises GatewayError naming a bad one.

    Framing, hop-by-hop and proxy fields are refused or dropped as they would be from a client's head;
    Authorization and Cookie are kept, for here they are meant for the target.
    """
    fields: list[Field] = []
    for name_text, value_text in given.items():
        name, value = name_text.encode(), value_text.encode()
        if not _TOKEN.match(name) or not _VALUE.match(value):
            raise GatewayError(
                "BAD_REQUEST", f"headers: {name_text!r} has characters a header cannot carry", param="headers"
            )
        rule = classify_request(name)
        if rule in (KEEP, BEARER, API_KEY, VENDOR_KEY, ACCEPT_ENCODING) or name.lower() in (
            b"cookie",
            b"idempotency-key",
        ):
            fields.append((name, value.strip()))
    return fields


KEY_ITEM = b"openai-insecure-api-key."  # how browsers send a key: they can set no other field of a WebSocket


def without_key_items(value: bytes) -> tuple[bytes, list[bytes]]:
    """Return a Sec-WebSocket-Protocol value without the items that carry a key, and the keys."""
    items = [item.strip() for item in value.split(b",")]
    keys = [item[len(KEY_ITEM) :] for item in items if item.lower().startswith(KEY_ITEM)]
    if not keys:
        return value, keys
    return b", ".join(item for item in items if not item.lower().startswith(KEY_ITEM)), keys


def is_valid_request_id(value: bytes) -> bool:
    """Tell whether a client's X-Request-Id is short and plain enough to be passed on."""
    return len(value) <= 128 and value.isascii() and value.decode("ascii").isprintable() and b" " not in value
