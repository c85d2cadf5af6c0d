"""The envelope: one JSON object in that names a target, one JSON object out that carries its answer (DESIGN §4).

The upstream's JSON is spliced in as raw bytes, checked but never re-encoded; text becomes a string, everything
else base64.
"""

import base64
import time
from typing import Annotated

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from gpuproxy.errors import GatewayError
from gpuproxy.plugin import UpstreamRequest
from gpuproxy.proxy.headers import Field, replace_fields
from gpuproxy.types import Usage

TRACE_CONTEXT = frozenset((b"traceparent", b"tracestate", b"baggage"))  # W3C
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Envelope(Struct, forbid_unknown_fields=True):
    """The request object. ``body`` is sent as JSON, a string as plain text; null or absent sends none."""

    protocol: str
    target_url: str
    method: str | None = None
    headers: dict[str, str] | None = None
    body: Raw = Raw(b"null")
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    stream: bool = False

    def content(self) -> bytes | None:
        """Return the bytes to send, None for no body. Raises GatewayError INVALID_JSON for a string that is none."""
        raw = bytes(self.body)
        if raw == b"null":
            return None
        if raw[:1] == b'"':
            try:
                return str(orjson.loads(raw)).encode()
            except orjson.JSONDecodeError as error:
                raise GatewayError("INVALID_JSON", f"body is not valid JSON: {error}", param="body") from None
        return raw


_decode = msgspec.json.Decoder(Envelope).decode


class _StreamWish(Struct):
    stream: bool = False


_decode_wish = msgspec.json.Decoder(_StreamWish).decode


def decode(body: bytes) -> Envelope:
    """Decode a request. Raises GatewayError INVALID_JSON or BAD_REQUEST naming the field."""
    try:
        envelope = _decode(body)
    except msgspec.ValidationError as error:
        raise GatewayError("INVALID_JSON", f"the envelope is wrong: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        place = "" if "(byte " in str(error) else f" (byte {len(body)})"
        raise GatewayError("INVALID_JSON", f"the body is not valid JSON: {error}{place}") from None
    method = (envelope.method or ("GET" if bytes(envelope.body) == b"null" else "POST")).upper()
    if method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise GatewayError("BAD_REQUEST", f"method {method[:40]!r} is not served here; use {known}", param="method")
    envelope.method = method
    return envelope


def wants_stream(envelope: Envelope) -> bool:
    """Tell whether the answer is to be passed through instead of wrapped: by the envelope or by the body's own word."""
    if envelope.method == "HEAD":  # there is nothing to pass
        return False
    if envelope.stream:
        return True
    if b'"stream"' not in bytes(envelope.body):
        return False
    try:
        return _decode_wish(envelope.body).stream
    except msgspec.MsgspecError:
        return False


def completed_fields(
    envelope: Envelope, fields: list[Field], request: UpstreamRequest, is_collected: bool
) -> list[Field]:
    """Return the caller's fields with a Content-Type for the body, and the wish for an answer that can be wrapped."""
    names = {name.lower() for name, _ in (*fields, *request.headers)}
    body = bytes(envelope.body)
    if body != b"null" and b"content-type" not in names:
        kind = b"text/plain; charset=utf-8" if body[:1] == b'"' else b"application/json"
        fields = [*fields, (b"Content-Type", kind)]
    if request.identity or (is_collected and b"accept-encoding" not in names):
        fields = replace_fields(fields, [(b"Accept-Encoding", b"identity")])
    return fields


def with_context(fields: list[Field], outer: list[Field]) -> list[Field]:
    """Return the fields for the target; if they name no trace, with the one that the call itself belongs to."""
    if any(name.lower() in TRACE_CONTEXT for name, _ in fields):
        return fields
    return fields + [field for field in outer if field[0].lower() in TRACE_CONTEXT]


class Collected:
    """An answer that is held until it is whole, within a bound of bytes and the envelope's own time."""

    __slots__ = ("_give_up_ns", "_parts", "_size", "limit_bytes")

    def __init__(self, limit_bytes: int, timeout_s: float | None, started_ns: int) -> None:
        self.limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._give_up_ns = 0 if timeout_s is None else started_ns + int(timeout_s * 1e9)

    def add(self, body: bytes) -> bool:
        """Hold the next bytes; False when they are too many."""
        self._parts.append(body)
        self._size += len(body)
        return self._size <= self.limit_bytes

    def whole(self) -> bytes:
        """Return all of it."""
        return b"".join(self._parts)

    def clear(self) -> None:
        """Forget what has come; the time goes on."""
        self._parts, self._size = [], 0

    def rest_s(self, idle_s: float) -> float:
        """Return how long to wait for the next bytes: the rest of the envelope's time, else `idle_s`."""
        if not self._give_up_ns:
            return idle_s
        return max(0.0, (self._give_up_ns - time.monotonic_ns()) / 1e9)


def combined(fields: list[Field]) -> dict[str, str]:
    """Return the fields by their names in lower case; those of one name are joined as RFC 9110 §5.3 does it."""
    found: dict[str, str] = {}
    for name, value in fields:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def wrap(
    status: int,
    headers: dict[str, str],
    content_type: bytes,
    body: bytes,
    duration_us: int,
    request_id: str,
    usage: Usage | None,
) -> bytes:
    """Return the answer object around an upstream's answer."""
    data, encoding = _spliced(content_type, body)
    return b'{"data":%b%b,"status":"success","status_code":%d,"headers":%b,"duration_ms":%.3f,"request_id":%b%b}' % (
        data,
        encoding,
        status,
        orjson.dumps(headers),
        duration_us / 1000,
        orjson.dumps(request_id),
        b"" if usage is None else b',"usage":' + _usage(usage),
    )


def _spliced(content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
    if not body:
        return b"null", b""
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind == b"application/json" or kind.endswith(b"+json"):
        try:
            orjson.loads(body)
        except orjson.JSONDecodeError:
            pass
        else:
            return body, b""
    if kind.startswith(b"text/") or kind.endswith((b"json", b"xml", b"javascript")):
        try:
            return orjson.dumps(body.decode()), b""
        except UnicodeDecodeError:
            pass
    return b'"%b"' % base64.b64encode(body), b',"encoding":"base64"'


def _usage(usage: Usage) -> bytes:
    told: dict[str, int | bool] = {
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
    if usage.source == "estimated":
        told["estimated"] = True
    return orjson.dumps(told)
