"""OAuth 2.0 protected resource metadata (RFC 9728): where an MCP client without a key can get one.

Without ``[mcp] authorization_servers`` there is nothing to tell, and the paths are not found: clients take metadata
that names no such server for broken (MCP 2025-11-25, Authorization, requires one), and a client that is not sent
looking reports a plain 401.
"""

import msgspec
from aiohttp import web
from msgspec import Struct

from gpuproxy.control.here import base_url
from gpuproxy.control.parts import CONFIG
from gpuproxy.errors import GatewayError

WELL_KNOWN = "/.well-known/oauth-protected-resource"
MCP = "/api/v1/gpu/proxy/mcp"


class Resource(Struct):
    """What is protected, by whom, and how its tokens are sent."""

    resource: str
    authorization_servers: list[str]
    bearer_methods_supported: list[str]


async def show(request: web.Request) -> web.Response:
    """Tell which authorization servers give out keys for this gateway."""
    return _metadata(request, "")


async def show_server(request: web.Request) -> web.Response:
    """Tell the same of one MCP server, whether there is one of this name or not."""
    return _metadata(request, f"{MCP}/{request.match_info['id']}")


def _metadata(request: web.Request, path: str) -> web.Response:
    config = request.app[CONFIG]
    servers = list(config.mcp.authorization_servers)
    if not servers:
        raise GatewayError("NOT_FOUND", "keys are not given out by OAuth here; see [mcp] authorization_servers")
    fields = {"Access-Control-Allow-Origin": "*"}  # pages of any origin may read it: it is the same for all
    resource = Resource(base_url(request) + path, servers, ["header"])
    return web.json_response(body=msgspec.json.encode(resource), headers=fields)
