"""Completes the JSON-RPC message of an MCP envelope: adds what is absent, never overrides.

A bare ``{"method", "params"}`` becomes a request of the stateless revision 2026-07-28, which needs no
session: ``_meta`` in the params and the headers that mirror it. A server that refuses that is called as an older one;
see `mcp_handshake`. A caller who names a revision or a session, or who sends `initialize`, may speak an older one and
gets no such additions.
"""

import secrets

from msgspec import Raw

from gpuproxy.plugin import Call, HeaderList, UpstreamRequest, mcp_codec
from gpuproxy_plugins.envelope import content_type_if_absent
from gpuproxy_plugins.mcp_handshake import Handshake
from gpuproxy_plugins.mcp_meter import NAME_FIELDS

_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"
_HANDSHAKE = ("initialize", "notifications/initialized")  # of the session-based revisions only


def complete(call: Call, request: UpstreamRequest) -> None:
    """Set the body to send, if it changes, and the headers for a posted envelope."""
    headers = request.headers = content_type_if_absent(call)
    if call.header(b"accept") is None:
        headers.append((b"Accept", b"application/json, text/event-stream"))  # both, or servers answer 406
    message = _fields(call.body or b"")
    method = mcp_codec.text_of(message, "method")
    if not method or "result" in message or "error" in message:
        return  # a response, a batch, or nothing JSON-RPC: the server judges
    if "jsonrpc" not in message:
        message["jsonrpc"] = mcp_codec.raw("2.0")
    if "id" not in message and not method.startswith("notifications/"):
        message["id"] = mcp_codec.raw(f"gpuproxy-{secrets.token_hex(8)}")
    if _may_be_modern(call, method):
        as_older = dict(message)
        request.headers = [*headers, *_modernize(call, message, method)]
        if bytes(message.get("id", b"null")) != b"null":  # without one there is no answer to wait for
            request.sequel = Handshake(as_older, headers)
    request.body = mcp_codec.encode(message)


def _may_be_modern(call: Call, method: str) -> bool:
    return (
        method not in _HANDSHAKE
        and call.header(b"mcp-protocol-version") is None
        and call.header(b"mcp-session-id") is None
    )


def _modernize(call: Call, message: mcp_codec.Fields, method: str) -> HeaderList:
    """Put ``_meta`` into the params and return the headers that mirror it; nothing if one is no object."""
    params = _object(message, "params")
    meta = None if params is None else _object(params, "_meta")
    if params is None or meta is None:
        return []
    meta.setdefault(_VERSION_KEY, mcp_codec.raw(mcp_codec.STATELESS_SINCE))
    meta.setdefault(_CAPABILITIES_KEY, mcp_codec.raw({}))
    params["_meta"] = mcp_codec.raw(meta)
    message["params"] = mcp_codec.raw(params)
    mirrored = [
        (b"MCP-Protocol-Version", mcp_codec.text_of(meta, _VERSION_KEY)),
        (b"Mcp-Method", method),
        (b"Mcp-Name", mcp_codec.text_of(params, NAME_FIELDS.get(method, ""))),
    ]
    absent = [(name, value) for name, value in mirrored if value and not call.header(name.lower())]
    return [(name, mcp_codec.mirrored_name(value).encode()) for name, value in absent]


def _fields(data: bytes | Raw) -> mcp_codec.Fields:
    """Return the object's fields with their values as bytes, empty if `data` is no object."""
    try:
        return mcp_codec.decode_fields(data)
    except mcp_codec.UNREADABLE:
        return {}


def _object(fields: mcp_codec.Fields, name: str) -> mcp_codec.Fields | None:
    """Return the field's own fields, empty if it is absent, None if it is something else."""
    if name not in fields:
        return {}
    return _fields(fields[name]) if bytes(fields[name]).startswith(b"{") else None
