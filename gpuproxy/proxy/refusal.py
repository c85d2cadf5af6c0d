"""How the gateway's own answers look on the wire: errors, and the JSON it writes itself."""

import math

import msgspec

from gpuproxy.errors import CODES, GatewayError
from gpuproxy.proxy.heads import status_line

_encode = msgspec.json.Encoder().encode


def body_of(error: GatewayError, request_id: str) -> bytes:
    """Return the body that tells about `error` where no protocol has a dialect of its own."""
    return _encode({"error": error.message, "code": error.code, "request_id": request_id})


def fields_of(error: GatewayError, attempt_count: int = 0) -> bytes:
    """Return the header lines an error brings along: when to come back, how to log in, whether to retry at all.

    ``retry-after-ms`` and ``x-should-retry`` are obeyed by OpenAI's and Anthropic's SDKs. A call that was sent in vain
    more than once is not to be multiplied by the client's own tries.
    """
    lines = _allow(error)
    wait_s = error.retry_after_s
    if wait_s is not None:
        lines += b"Retry-After: %d\r\n" % math.ceil(wait_s)
        if wait_s % 1:
            lines += b"retry-after-ms: %d\r\n" % math.ceil(wait_s * 1000)
    if error.code == "UNAUTHORIZED":
        lines += b"WWW-Authenticate: Bearer\r\n"
    if not CODES[error.code].is_retryable or attempt_count > 1:
        lines += b"x-should-retry: false\r\n"
    elif wait_s is not None:  # nothing was done, and when to come back is known
        lines += b"x-should-retry: true\r\n"
    return lines


def json_answer(status: int, body: bytes, request_id: str, fields: bytes, has_body: bool = True) -> bytes:
    """Return a whole answer; one to HEAD tells the length but has no body."""
    return b"%bContent-Type: application/json\r\nContent-Length: %d\r\nX-Request-Id: %b\r\n%b\r\n%b" % (
        status_line(status),
        len(body),
        request_id.encode(),
        fields,
        body if has_body else b"",
    )


def head_refusal(error: GatewayError, request_id: str) -> bytes:
    """Return the answer to a head that never became an exchange; the connection closes after it."""
    fields = _allow(error) + b"Connection: close\r\n"
    return json_answer(error.status, body_of(error, request_id), request_id, fields)


def _allow(error: GatewayError) -> bytes:
    return b"Allow: %b\r\n" % error.allow.encode() if error.allow else b""
