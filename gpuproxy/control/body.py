"""Bodies of the management API: decoded into closed types, whatever Content-Type says, each fault by its field."""

import re
from typing import TypeVar

import msgspec

from gpuproxy.errors import GatewayError

T = TypeVar("T")

_place = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_quoted = re.compile(r"`([^`]*)`")


def decode(kind: type[T], body: bytes) -> T:
    """Return the body as `kind`; an empty one stands for an empty object.

    Raises GatewayError INVALID_JSON for what is no JSON or of another type, UNPROCESSABLE for a field that is unknown,
    missing or out of range.
    """
    if b"\\u0000" in body:  # PostgreSQL cannot store it, and nobody means it
        raise GatewayError("UNPROCESSABLE", "the body has a NUL character in it")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise _fault(kind, str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise GatewayError("INVALID_JSON", f"the body is not JSON: {str(error)[:200]}") from None


def _fault(kind: type[object], told: str) -> GatewayError:
    """Turn msgspec's complaint into ours. It names types and fields, never values."""
    found = _place.search(told)
    place = found[1] if found else ""
    message = _place.sub("", told)
    quoted = _quoted.findall(message)
    if message.startswith("Object contains unknown field"):
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))  # type: ignore[arg-type]
        return GatewayError("UNPROCESSABLE", f"no field {quoted[0][:60]!r}; known: {known}", param=quoted[0])
    if message.startswith("Object missing required field"):
        return GatewayError("UNPROCESSABLE", f"field {quoted[0]!r} is missing", param=quoted[0])
    is_type = ", got " in message
    message = f"{place or 'body'}: {message[:1].lower()}{message[1:]}".replace("`", "")
    return GatewayError("INVALID_JSON" if is_type else "UNPROCESSABLE", message, param=place or None)
