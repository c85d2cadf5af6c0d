"""A call of an envelope to a server that knows sessions only: one is begun for it and ended after it.

The call was tried without a session first. A server that refuses it as one of an older revision does is then asked as
clients ask it (MCP 2026-07-28, Versioning): to begin a session, to hear that it has begun, and for what is wanted.
Nothing was done when it refused, so the call is done once.
"""

from collections.abc import Callable

import msgspec

from gpuproxy.plugin import HeaderList, Sequel, UpstreamRequest, event_payloads, mcp_codec

REVISION = "2025-11-25"  # the newest with sessions; a server that speaks an older one says so
REFUSING = (400, 404)
# What a server says that has understood the call (JSON-RPC 2.0 §5.1; MCP 2026-07-28, Error Codes): asking in another
# way would not help.
UNDERSTOOD = frozenset((-32700, -32601, -32602, -32603, *range(-32039, -32019)))

Step = Callable[[int, HeaderList, bytes], UpstreamRequest | None]

_decode_code = msgspec.json.Decoder(int).decode


class Handshake:
    """What follows the first answer. `message` is the call as an older revision has it, `headers` what all need."""

    def __init__(self, message: mcp_codec.Fields, headers: HeaderList) -> None:
        self._message = message
        self._headers = headers
        self._step: Step = self._begin
        self.farewell = b""

    def next(self, status: int, fields: HeaderList, body: bytes) -> UpstreamRequest | None:
        """Return what to send next, None if this answer is the caller's."""
        return self._step(status, fields, body)

    def _begin(self, status: int, fields: HeaderList, body: bytes) -> UpstreamRequest | None:
        if status not in REFUSING or _fault_of(body) in UNDERSTOOD:
            return None
        about = {"protocolVersion": REVISION, "capabilities": {}, "clientInfo": {"name": "gpuproxy", "version": "1"}}
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": about}
        return self._request(mcp_codec.encode(message), self._agree)

    def _agree(self, status: int, fields: HeaderList, body: bytes) -> UpstreamRequest | None:
        version = mcp_codec.text_of(mcp_codec.object_of(_response(body), "result"), "protocolVersion")
        if status >= 300 or not mcp_codec.is_revision(version):
            return None
        session = next((value for name, value in fields if name.lower() == b"mcp-session-id"), b"")
        self._headers = [*self._headers, (b"MCP-Protocol-Version", version.encode())]
        if not session:
            return self._call(status, fields, body)  # it keeps no session, so there is none to begin
        self._headers.append((b"Mcp-Session-Id", session))
        self.farewell = b"DELETE"
        return self._request(b'{"jsonrpc":"2.0","method":"notifications/initialized"}', self._call)

    def _call(self, status: int, fields: HeaderList, body: bytes) -> UpstreamRequest | None:
        return self._request(mcp_codec.encode(self._message), self._end)

    def _end(self, status: int, fields: HeaderList, body: bytes) -> UpstreamRequest | None:
        return None

    def _request(self, body: bytes, step: Step) -> UpstreamRequest:
        self._step = step
        return UpstreamRequest(body=body, headers=self._headers, sequel=self)


def _response(body: bytes) -> mcp_codec.Fields:
    return mcp_codec.first_response([body] if body.lstrip()[:1] == b"{" else event_payloads(body))


def _fault_of(body: bytes) -> int:
    error = mcp_codec.object_of(_response(body), "error")
    try:
        return _decode_code(error["code"]) if "code" in error else 0
    except mcp_codec.UNREADABLE:
        return 0


_: type[Sequel] = Handshake
