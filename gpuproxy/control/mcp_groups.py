"""Puts the groups of MCP servers into the application: their paths, and the connections they share."""

from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from gpuproxy.codec.base_url import origin_of
from gpuproxy.codec.origins import Origins, readable, refusal_of
from gpuproxy.codec.seal import Seal
from gpuproxy.config import Config
from gpuproxy.control.mcp_answers import RpcError
from gpuproxy.control.mcp_group import Group
from gpuproxy.control.mcp_inner import MCP, Inner

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ALLOWING = "Access-Control-Allow-Origin"
FORBIDDEN = -32063  # as calls to a single server have it


def add_groups(app: web.Application, config: Config, address: str, seal: Seal) -> None:
    """Serve the groups of the configuration; `address` is where the gateway itself is reached."""
    if not config.mcp_groups:
        return
    inner = Inner(address)
    origins = Origins((*config.mcp.allowed_origins, origin_of(config.server.public_url)), config.server.is_local)
    paths: set[str] = set()
    for settings in config.mcp_groups:
        group = Group(settings, inner, seal, config.limits.buffered_body_bytes_max)
        for path in (f"{MCP}/{settings.name}", f"{MCP}/{settings.name}/"):
            app.router.add_route("*", path, _for_pages_of(origins, group))
            paths.add(path)

    async def let_read(request: web.Request, response: web.StreamResponse) -> None:
        # what the group says itself too, as pages can read the answers of servers
        origin = _origin_of(request)
        if origin and request.path in paths and ALLOWING not in response.headers and origins.allow(origin):
            response.headers.update({name.decode(): value.decode("latin-1") for name, value in readable(origin)})

    async def end_streams(_app: web.Application) -> None:
        inner.closing.set()

    async def close_at_end(_app: web.Application) -> AsyncIterator[None]:
        yield
        await inner.close()

    app.on_response_prepare.append(let_read)
    app.on_shutdown.append(end_streams)
    app.cleanup_ctx.append(close_at_end)


def _for_pages_of(origins: Origins, group: Group) -> Handler:
    """Return the group's handler that refuses pages of other origins."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if (origin := _origin_of(request)) and not origins.allow(origin):
            return RpcError(403, FORBIDDEN, refusal_of(origin)).answer(request)
        return await group.handle(request)

    return handle


def _origin_of(request: web.Request) -> bytes:
    return request.headers.get("Origin", "").encode("latin-1", "replace")
