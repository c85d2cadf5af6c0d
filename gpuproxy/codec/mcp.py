"""What MCP's messages are made of, for all who read or change them: fields of JSON as bytes, names in headers.

A message is decoded one level deep; what stands in its fields passes as it was written.
"""

import re
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterable

import msgspec
from msgspec import Raw

STATELESS_SINCE = "2026-07-28"  # revisions from this one on know no sessions, and say in headers what a message asks
HEADER_MISMATCH = -32020
UNREADABLE = (ValueError, RecursionError)

Fields = dict[str, Raw]

encode = msgspec.json.Encoder().encode
decode_fields = msgspec.json.Decoder(Fields).decode
is_revision = re.compile(r"\d{4}-\d\d-\d\d").fullmatch
_decode_text = msgspec.json.Decoder(str).decode
_ENCODED = re.compile(r"=\?base64\?([A-Za-z0-9+/]*={0,2})\?=")


def raw(value: object) -> Raw:
    """Return a value as JSON."""
    return Raw(encode(value))


def text_of(fields: Fields, name: str) -> str:
    """Return a field that is text, empty if it is not."""
    try:
        return _decode_text(fields[name]) if name in fields else ""
    except UNREADABLE:
        return ""


def object_of(fields: Fields, name: str) -> Fields:
    """Return a field that is an object, empty if it is not."""
    try:
        return decode_fields(fields[name]) if name in fields else {}
    except UNREADABLE:
        return {}


def response_in(payload: bytes) -> Fields | None:
    """Return the fields of a JSON-RPC response, None for anything else."""
    try:
        message = decode_fields(payload)
    except UNREADABLE:
        return None
    return message if "method" not in message and ("result" in message or "error" in message) else None


def first_response(payloads: Iterable[bytes]) -> Fields:
    """Return the fields of the first JSON-RPC response among messages, empty if there is none."""
    return next((found for payload in payloads if (found := response_in(payload)) is not None), {})


def mirrored_name(name: str) -> str:
    """Return a name as headers mirror it: visible ASCII as it is, the rest as ``=?base64?…?=``."""
    is_plain = name.isascii() and name.isprintable() and name == name.strip()
    if is_plain and not (name.startswith("=?base64?") and name.endswith("?=")):
        return name
    return f"=?base64?{b64encode(name.encode()).decode()}?="


def unmirrored_name(value: str) -> str | None:
    """Return the name that a header mirrors; None for one that cannot be decoded."""
    match = _ENCODED.fullmatch(value)
    if match is None:
        return value
    try:
        return a2b_base64(match[1], strict_mode=True).decode()
    except (Base64Error, ValueError):
        return None
