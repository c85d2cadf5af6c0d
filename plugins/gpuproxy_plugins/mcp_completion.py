"""Completes the JSON-RPC message of an MCP envelope: adds what is absent, never overrides.

A bare ``{"method", "params"}`` becomes a request of the stateless revision 2026-07-28, which needs no
session: ``_meta`` in the params and the headers that mirror it. A caller who names a revision or a session,
or who sends `initialize`, may speak an older one and gets no such additions.
"""

import base64
import secrets
from typing import Any

import msgspec
from msgspec import Raw

from gpuproxy.plugin import Call, HeaderList
from gpuproxy_plugins.envelope import content_type_if_absent
from gpuproxy_plugins.mcp_meter import MODERN, NAME_FIELDS

Fields = dict[str, Raw]

_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"
_HANDSHAKE = ("initialize", "notifications/initialized")  # of the session-based revisions only

_encode = msgspec.json.Encoder().encode
_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_string = msgspec.json.Decoder(str).decode


def completed(call: Call) -> tuple[bytes | None, HeaderList]:
    """Return the body to send (None: as it is) and the headers to set for a posted envelope."""
    headers = content_type_if_absent(call)
    if call.header(b"accept") is None:
        headers.append((b"Accept", b"application/json, text/event-stream"))  # both, or servers answer 406
    message = _fields(call.body or b"")
    method = _string(message, "method")
    if not method or "result" in message or "error" in message:
        return None, headers  # a response, a batch, or nothing JSON-RPC: the server judges
    if "jsonrpc" not in message:
        message["jsonrpc"] = _raw("2.0")
    if "id" not in message and not method.startswith("notifications/"):
        message["id"] = _raw(f"gpuproxy-{secrets.token_hex(8)}")
    if _may_be_modern(call, method):
        headers += _modernize(call, message, method)
    return _encode(message), headers


def _may_be_modern(call: Call, method: str) -> bool:
    return (
        method not in _HANDSHAKE
        and call.header(b"mcp-protocol-version") is None
        and call.header(b"mcp-session-id") is None
    )


def _modernize(call: Call, message: Fields, method: str) -> HeaderList:
    """Put ``_meta`` into the params and return the headers that mirror it; nothing if one is no object."""
    params = _object(message, "params")
    meta = None if params is None else _object(params, "_meta")
    if params is None or meta is None:
        return []
    meta.setdefault(_VERSION_KEY, _raw(MODERN))
    meta.setdefault(_CAPABILITIES_KEY, _raw({}))
    params["_meta"] = _raw(meta)
    message["params"] = _raw(params)
    mirrored = [
        (b"MCP-Protocol-Version", _string(meta, _VERSION_KEY)),
        (b"Mcp-Method", method),
        (b"Mcp-Name", _string(params, NAME_FIELDS.get(method, ""))),
    ]
    absent = [(name, value) for name, value in mirrored if value and not call.header(name.lower())]
    return [(name, header_value(value)) for name, value in absent]


def header_value(value: str) -> bytes:
    """Return the value as MCP mirrors it: visible ASCII as it is, the rest as ``=?base64?…?=``."""
    is_plain = value.isascii() and value.isprintable() and value == value.strip()
    if is_plain and not (value.startswith("=?base64?") and value.endswith("?=")):
        return value.encode()
    return b"=?base64?" + base64.b64encode(value.encode()) + b"?="


def _raw(value: Any) -> Raw:
    return Raw(_encode(value))


def _fields(data: bytes | Raw) -> Fields:
    """Return the object's fields with their values as bytes, empty if `data` is no object."""
    try:
        return _decode_fields(data)
    except (ValueError, RecursionError):
        return {}


def _object(fields: Fields, name: str) -> Fields | None:
    """Return the field's own fields, empty if it is absent, None if it is something else."""
    if name not in fields:
        return {}
    return _fields(fields[name]) if bytes(fields[name]).startswith(b"{") else None


def _string(fields: Fields, name: str) -> str:
    """Return the field if it is a string, else an empty one."""
    try:
        return _decode_string(fields[name]) if name in fields else ""
    except (ValueError, RecursionError):
        return ""
