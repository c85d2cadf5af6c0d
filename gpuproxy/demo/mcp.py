"""The demo's MCP server on Streamable HTTP, with two tools, for clients of both eras.

Revisions up to 2025-11-25 open a session with `initialize` and carry its id. 2026-07-28 is stateless: every
POST says in ``params._meta`` which revision it speaks and mirrors method and name in headers, which must
agree with the body. Answers are plain JSON; there is nothing to push, so GET is 405, which clients expect.
"""

import base64
import binascii
import json
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from gpuproxy import __version__

SESSION_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26")  # newest first
STATELESS_VERSIONS = ("2026-07-28",)
SESSIONS_MAX = 1_000  # the oldest is forgotten; its client is told 404 and begins again
SESSION_HEADER = "Mcp-Session-Id"
META = "io.modelcontextprotocol/"

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
HEADER_MISMATCH, UNSUPPORTED_VERSION = -32020, -32022
STATELESS_STATUS = {METHOD_NOT_FOUND: 404}  # every other error of a stateless call is 400

SERVER = {"name": "gpuproxy-demo-tools", "version": __version__}
INSTRUCTIONS = "add sums two numbers; roll_dice rolls dice."
CACHEABLE = {"ttlMs": 60_000, "cacheScope": "public"}

TOOLS: list[dict[str, Any]] = [
    {
        "name": "add",
        "description": "Add two numbers.",
        "inputSchema": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
        "outputSchema": {
            "type": "object",
            "properties": {"sum": {"type": "number"}},
            "required": ["sum"],
        },
    },
    {
        "name": "roll_dice",
        "description": "Roll dice and return what each shows.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "count": {"type": "integer", "minimum": 1, "maximum": 100, "default": 1},
                "sides": {"type": "integer", "minimum": 2, "maximum": 1000, "default": 6},
            },
        },
        "outputSchema": {
            "type": "object",
            "properties": {"rolls": {"type": "array", "items": {"type": "integer"}}},
            "required": ["rolls"],
        },
    },
]


class RpcError(Exception):
    """A JSON-RPC error to answer with."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message} | ({} if data is None else {"data": data})
        self.code = code


class ToolError(Exception):
    """A tool that could not do what it was asked; told inside the result, for the model to read."""


class McpServer:
    """The endpoint and its open sessions (id → revision)."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, str] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """Return what this side serves."""
        return [web.post("/mcp", self.post), web.get("/mcp", self.get), web.delete("/mcp", self.delete)]

    async def post(self, request: web.Request) -> web.Response:
        """Answer one JSON-RPC message."""
        if not _is_own_origin(request.headers.get("Origin")):
            return _reply(None, {"error": {"code": INVALID_REQUEST, "message": "foreign Origin"}}, 403)
        if not _accepts_both(request.headers.get("Accept", "")):
            message = "Accept must allow application/json and text/event-stream"
            return _reply(None, {"error": {"code": INVALID_REQUEST, "message": message}}, 406)
        try:
            body = _message(await request.read())
        except RpcError as fault:
            return _reply(None, {"error": fault.error}, 400)
        if _is_stateless(request, body):
            return self._stateless(request, body)
        return self._in_session(request, body)

    async def get(self, request: web.Request) -> web.Response:
        """Refuse a listening stream; nothing is ever pushed."""
        raise web.HTTPMethodNotAllowed("GET", ["POST", "DELETE"])

    async def delete(self, request: web.Request) -> web.Response:
        """End a session."""
        if self._sessions.pop(request.headers.get(SESSION_HEADER, ""), None) is None:
            return web.Response(status=404, text="no such session")
        return web.Response(status=204)

    def _in_session(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        session_id = request.headers.get(SESSION_HEADER)
        if body.get("method") == "initialize" and "id" in body:
            return self._open(body)
        if session_id not in self._sessions:
            status = 404 if session_id else 400
            message = "no such session; initialize again" if session_id else f"{SESSION_HEADER} is missing"
            return _reply(body.get("id"), {"error": {"code": INVALID_REQUEST, "message": message}}, status)
        if "id" not in body or "method" not in body:
            return web.Response(status=202)
        try:
            return _reply(body["id"], {"result": _call(body, SESSION_METHODS)}, 200)
        except RpcError as fault:
            return _reply(body["id"], {"error": fault.error}, 200)

    def _open(self, body: dict[str, Any]) -> web.Response:
        wanted = _params(body).get("protocolVersion")
        version = wanted if wanted in SESSION_VERSIONS else SESSION_VERSIONS[0]
        session_id = secrets.token_hex(16)
        self._sessions[session_id] = version
        if len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        result: dict[str, Any] = {
            "protocolVersion": version,
            "capabilities": {"tools": {}},
            "serverInfo": SERVER,
            "instructions": INSTRUCTIONS,
        }
        return _reply(body["id"], {"result": result}, 200, {SESSION_HEADER: session_id})

    def _stateless(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        if "id" not in body or "method" not in body:
            return web.Response(status=202)
        try:
            _check_envelope(request, body)
            result = _call(body, STATELESS_METHODS)
        except RpcError as fault:
            return _reply(body["id"], {"error": fault.error}, STATELESS_STATUS.get(fault.code, 400))
        meta = {f"{META}serverInfo": SERVER}
        return _reply(body["id"], {"result": {**result, "resultType": "complete", "_meta": meta}}, 200)


def _message(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RpcError(PARSE_ERROR, f"invalid JSON: {error}") from error
    if not isinstance(body, dict) or body.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'expected one JSON-RPC object with "jsonrpc": "2.0"')
    if not isinstance(body.get("id"), str | int | None) or not isinstance(body.get("method", ""), str):
        raise RpcError(INVALID_REQUEST, "id must be a string or integer, method a string")
    return body


def _is_stateless(request: web.Request, body: dict[str, Any]) -> bool:
    version = request.headers.get("MCP-Protocol-Version")
    if version is not None and version not in SESSION_VERSIONS:
        return True
    meta = _params(body).get("_meta")
    return isinstance(meta, dict) and f"{META}protocolVersion" in meta


def _check_envelope(request: web.Request, body: dict[str, Any]) -> None:
    """Refuse a stateless call whose headers and body disagree (MCP 2026-07-28 Streamable HTTP)."""
    meta = _params(body).get("_meta")
    if not isinstance(meta, dict) or not {f"{META}protocolVersion", f"{META}clientCapabilities"} <= meta.keys():
        raise RpcError(INVALID_PARAMS, f"params._meta needs {META}protocolVersion and {META}clientCapabilities")
    version = meta[f"{META}protocolVersion"]
    mirrored = {"MCP-Protocol-Version": version, "Mcp-Method": body["method"]}
    if body["method"] == "tools/call":
        mirrored["Mcp-Name"] = _params(body).get("name")
    for name, value in mirrored.items():
        if _decoded(request.headers.get(name)) != value:
            raise RpcError(HEADER_MISMATCH, f"{name} does not match the body")
    if version not in STATELESS_VERSIONS:
        data = {"supported": [*STATELESS_VERSIONS, *SESSION_VERSIONS], "requested": version}
        raise RpcError(UNSUPPORTED_VERSION, f"protocol version {version} is not supported", data)


def _decoded(header: str | None) -> str | None:
    """Undo ``=?base64?…?=``, the form of values that are not ASCII."""
    if header is None or not (header.startswith("=?base64?") and header.endswith("?=")):
        return header
    try:
        return base64.b64decode(header[9:-2], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def _call(body: dict[str, Any], methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> dict[str, Any]:
    if body["method"] not in methods:
        raise RpcError(METHOD_NOT_FOUND, f"no method {body['method']!r}; known: {', '.join(methods)}")
    return methods[body["method"]](_params(body))


def _params(body: dict[str, Any]) -> dict[str, Any]:
    params = body.get("params")
    return params if isinstance(params, dict) else {}


def _ping(_: dict[str, Any]) -> dict[str, Any]:
    return {}


def _list_tools(_: dict[str, Any]) -> dict[str, Any]:
    return {"tools": TOOLS}


def _list_tools_cacheable(_: dict[str, Any]) -> dict[str, Any]:
    return {"tools": TOOLS, **CACHEABLE}


def _discover(_: dict[str, Any]) -> dict[str, Any]:
    return {
        "supportedVersions": [*STATELESS_VERSIONS, *SESSION_VERSIONS],
        "capabilities": {"tools": {}},
        "instructions": INSTRUCTIONS,
        **CACHEABLE,
    }


def _call_tool(params: dict[str, Any]) -> dict[str, Any]:
    name, arguments = params.get("name"), params.get("arguments") or {}
    if name not in IMPLEMENTATIONS:
        raise RpcError(INVALID_PARAMS, f"no tool {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    try:
        result = IMPLEMENTATIONS[name](arguments if isinstance(arguments, dict) else {})
    except ToolError as fault:
        return {"content": [{"type": "text", "text": str(fault)}], "isError": True}
    text = json.dumps(result)
    return {"content": [{"type": "text", "text": text}], "structuredContent": result, "isError": False}


def _add(arguments: dict[str, Any]) -> dict[str, Any]:
    numbers = [arguments.get(name) for name in ("a", "b")]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise ToolError("a and b must be numbers")
    total = sum(number for number in numbers if number is not None)
    if not math.isfinite(total):
        raise ToolError("the sum is out of range")
    return {"sum": total}


def _roll_dice(arguments: dict[str, Any]) -> dict[str, Any]:
    count, sides = arguments.get("count", 1), arguments.get("sides", 6)
    if type(count) is not int or not 1 <= count <= 100:
        raise ToolError("count must be an integer from 1 to 100")
    if type(sides) is not int or not 2 <= sides <= 1_000:
        raise ToolError("sides must be an integer from 2 to 1000")
    return {"rolls": [secrets.randbelow(sides) + 1 for _ in range(count)]}


IMPLEMENTATIONS = {"add": _add, "roll_dice": _roll_dice}
SESSION_METHODS = {"ping": _ping, "tools/list": _list_tools, "tools/call": _call_tool}
STATELESS_METHODS = {
    "server/discover": _discover,
    "tools/list": _list_tools_cacheable,
    "tools/call": _call_tool,
}


def _is_own_origin(origin: str | None) -> bool:
    """Refuse what a web page elsewhere sends (DNS rebinding; the specification demands it)."""
    if origin is None:
        return True
    host = origin.partition("://")[2].rpartition(":")[0] or origin.partition("://")[2]
    return host in ("localhost", "127.0.0.1", "[::1]")


def _accepts_both(accept: str) -> bool:
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    if "*/*" in kinds:
        return True
    return bool(kinds & {"application/json", "application/*"}) and bool(kinds & {"text/event-stream", "text/*"})


def _reply(
    message_id: Any, outcome: dict[str, Any], status: int, headers: dict[str, str] | None = None
) -> web.Response:
    return web.json_response({"jsonrpc": "2.0", "id": message_id, **outcome}, status=status, headers=headers)
