"""What a group of MCP servers says itself, in JSON-RPC."""

from collections.abc import Mapping

import aiohttp
from aiohttp import web
from msgspec import Raw

from gpuproxy.codec.mcp import Fields, encode
from gpuproxy.control.mcp_inner import Told
from gpuproxy.control.respond import request_id_of

UNREACHABLE = -32066  # as calls to a single server have it


class RpcError(Exception):
    """Ends a call with an error: the group's own, or what a server said, as it stands."""

    def __init__(
        self,
        status: int,
        code: int,
        message: str,
        rpc_id: Raw | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._status = status
        self._code = code
        self._message = message
        self._rpc_id = rpc_id
        self._headers = headers or {}
        self._told: Told | None = None

    @classmethod
    def of(cls, told: Told) -> "RpcError":
        """Return the failure that passes on what a server said."""
        failure = cls(told.status, 0, "")
        failure._told = told
        return failure

    def answer(self, request: web.Request) -> web.Response:
        """Return it as it goes to the client."""
        if self._told is not None:
            return verbatim(self._told)
        detail = {"code": self._code, "message": self._message, "data": {"request_id": request_id_of(request)}}
        body = encode({"jsonrpc": "2.0", "id": self._rpc_id, "error": detail})
        return web.Response(status=self._status, body=body, content_type="application/json", headers=self._headers)


def unreached(error: aiohttp.ClientError, rpc_id: Raw | None = None) -> RpcError:
    """Return the failure that tells that a server did not answer."""
    return RpcError(502, UNREACHABLE, f"the server cannot be reached: {error}", rpc_id)


def responded(message: Fields, result: Mapping[str, object]) -> web.Response:
    """Return a result."""
    body = encode({"jsonrpc": "2.0", "id": message.get("id"), "result": result})
    return web.Response(body=body, content_type="application/json")


def verbatim(told: Told) -> web.Response:
    """Return what a server said, as it stands."""
    return web.Response(status=told.status, headers=_without_session(told), body=told.body)


def in_company(response: web.Response, told: Told) -> web.Response:
    """Return the response with the fields that a server's answer had for the client's browser."""
    for name, value in told.headers.items():
        if name.lower().startswith("access-control-") or name.lower() == "vary":
            response.headers[name] = value
    return response


def accepted() -> web.Response:
    """Return the answer to what gets none."""
    return web.Response(status=202)


def _without_session(told: Told) -> dict[str, str]:
    return {name: value for name, value in told.headers.items() if name.lower() != "mcp-session-id"}
