"""Protocol "mcp": Model Context Protocol over Streamable HTTP, all revisions.

``/mcp/{server}`` is the base URL of the upstream of that name, for unmodified SDK clients. Bodies and streams pass
untouched: resumption, server requests and cancellation stay between client and server. Of a server with several URLs
each session stays at the one that began it; see `mcp_transit`. Only envelope calls are completed and their answers
collapsed to the one JSON-RPC response. `mcp_meter` reads along what is asked and what became of it.
"""

from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from gpuproxy.plugin import (
    Call,
    GatewayError,
    HeaderList,
    Intent,
    ProtocolHandler,
    Registry,
    Seal,
    Station,
    UpstreamRequest,
    UsageReader,
    Visit,
    event_payloads,
    mcp_codec,
)
from gpuproxy_plugins.mcp_completion import complete
from gpuproxy_plugins.mcp_meter import (
    NAME_CHARACTERS_MAX,
    JsonOutcome,
    RpcError,
    StreamOutcome,
    asked_for,
    mirrored,
    shown,
)
from gpuproxy_plugins.mcp_origins import Origins, origin_of, readable
from gpuproxy_plugins.mcp_tools import ToolLists, bound, kept, tools_in
from gpuproxy_plugins.mcp_transit import ADDRESS, MOUNT, Transits, at_target

METADATA = b"/.well-known/oauth-protected-resource"  # RFC 9728 §3
DEFAULT_PATH = b"/mcp"  # where both official SDKs' servers listen; used when a target URL has no path

# JSON-RPC codes of the gateway's own errors. JSON-RPC 2.0 §5.1 leaves -32000…-32099 to servers; MCP and its
# SDKs use -32000…-32002, -32020…-32022 and -32042 of these, so -32060 and on are taken, by HTTP status.
_INVALID_REQUEST = -32600
_INTERNAL = -32603
RPC_CODES = {
    "INVALID_JSON": -32700,
    "INTERNAL": _INTERNAL,
    "UNAUTHORIZED": -32061,
    "INSUFFICIENT_CREDITS": -32062,
    "BUDGET_EXCEEDED": -32062,
    "FORBIDDEN": -32063,
    "TARGET_FORBIDDEN": -32063,
    "NOT_FOUND": -32064,
    "UNKNOWN_MODEL": -32064,
    "UNKNOWN_UPSTREAM": -32064,
    "RATE_LIMITED": -32065,
    "UPSTREAM_UNREACHABLE": -32066,
    "UPSTREAM_INVALID": -32066,
    "UNAVAILABLE": -32067,
    "UPSTREAM_BUSY": -32067,
    "JOURNAL_FULL": -32067,
    "REQUEST_TIMEOUT": -32068,
    "UPSTREAM_TIMEOUT": -32068,
}


class Mcp:
    """Routes by server name and leaves the rest to client and server."""

    name: str = "mcp"
    mounts: tuple[str, ...] = ("mcp",)
    binds_tools: bool = True

    def __init__(self) -> None:
        self.attach(Station(Seal()))

    def attach(self, station: Station) -> None:
        """Seal sessions by what all workers have in common; let those pages call that the configuration names."""
        self._origins = Origins(station)
        self._transits = Transits(station, self._origins)
        self._has_authorization = bool(station.authorization_servers)

    def greet(self, visit: Visit) -> HeaderList | None:
        """Answer browsers that ask whether they may call."""
        return self._origins.preflight(visit)

    def refusal_fields(self, visit: Visit, error: GatewayError) -> HeaderList:
        """Let pages that may call read refusals; tell who has no key where to get one (RFC 9728 §5.1)."""
        origin = origin_of(visit.headers)
        fields = readable(origin) if origin and self._origins.allow(origin) else []
        if error.code == "UNAUTHORIZED" and self._has_authorization:
            fields.append((b"WWW-Authenticate", b'Bearer resource_metadata="%b"' % metadata_url(visit)))
        return fields

    def needs_body(self, method: bytes, path: bytes) -> bool:
        """What is posted is read whole: the message says what it asks for, and whether it begins a session."""
        return method == b"POST"

    def spares_body(self, fields: HeaderList) -> bool:
        """Tell whether the head says by itself what the call asks for."""
        return mirrored(fields) is not None

    def tools_in(self, body: bytes) -> tuple[str, ...] | None:
        """Return the tools that any server may find called in a message; None if it cannot be read."""
        tools = tools_in(body)
        return tools and tuple(tool[:NAME_CHARACTERS_MAX] for tool in tools)

    def inspect(self, call: Call) -> Intent:
        """Return the server's name and the path below its URL. Raises GatewayError NOT_FOUND."""
        if ADDRESS in call.path:
            return _metered(call, self._transits.addressed(call))
        route, mark, query = call.path.partition(b"?")
        server, slash, rest = route[5:].partition(b"/")
        if not server:
            raise GatewayError("NOT_FOUND", "the path names no MCP server; write /mcp/{server}")
        path = slash + rest if rest else b""  # a lone slash is ours, and servers would redirect it
        name = unquote_to_bytes(server).decode("utf-8", "replace")
        return _metered(call, self._transits.bound(call, Intent(upstream=name, path=path + mark + query)))

    def describe(self, call: Call) -> Intent:
        """Return what the call asks for, and the session's server, if there is one."""
        return _metered(call, at_target(call) if call.is_envelope else self._transits.bound(call, Intent()))

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        """Complete an envelope's message, headers and path; of other calls send the session as its server knows it."""
        if not call.is_envelope:
            request = intent.note or UpstreamRequest()
            return request if call.tools is None else bound(call, request)
        path = DEFAULT_PATH + call.path if call.path[:1] != b"/" else None
        request = UpstreamRequest(path=path)
        if call.method == b"POST" and call.body:
            complete(call, request)
        return request if call.tools is None else bound(call, request)

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        """Return what reads the outcome of a request; no answer tells tokens."""
        if call.note is None or not call.note.is_request:
            return None
        if content_type.startswith(b"text/event-stream"):
            return StreamOutcome()
        return JsonOutcome() if content_type.startswith(b"application/json") else None

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Turn a stream into the JSON-RPC response in it; a stream without one stays."""
        if call.tools is not None:
            body = ToolLists(kept(call)).edit(body, is_last=True)
        if content_type[:17].lower() != b"text/event-stream":
            return content_type, body
        responses = [payload for payload in event_payloads(body) if mcp_codec.response_in(payload) is not None]
        return (b"application/json", responses[-1]) if responses else (content_type, body)

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        """Return a JSON-RPC error; ``data`` carries the gateway's own code."""
        code = RPC_CODES.get(error.code, _INVALID_REQUEST if error.status < 500 else _INTERNAL)
        rpc_id = None
        if isinstance(error, RpcError):
            code, rpc_id = error.rpc_code or code, msgspec.Raw(error.rpc_id or b"null")
        detail: dict[str, Any] = {"code": code, "message": error.message}
        detail["data"] = {"code": error.code, "request_id": request_id}
        return msgspec.json.encode({"jsonrpc": "2.0", "id": rpc_id, "error": detail})


def _metered(call: Call, intent: Intent) -> Intent:
    rpc = call.note = asked_for(call)
    if rpc is not None:
        intent.rpc_method, intent.rpc_name, intent.tools = shown(rpc)
    return intent


def metadata_url(visit: Visit) -> bytes:
    """Return where the metadata of the server that was called stand, or those of the gateway for another path."""
    url = visit.base_url.encode() + METADATA
    path = visit.target.partition(b"?")[0]
    if not path.startswith(MOUNT):
        return url
    return url + MOUNT + path[len(MOUNT) :].partition(b"/")[0].translate(None, b'\\"')


def register(registry: Registry) -> None:
    """Offer the protocol."""
    registry.protocol(Mcp())


_: type[ProtocolHandler] = Mcp
