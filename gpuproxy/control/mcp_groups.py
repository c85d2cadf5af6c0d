"""Puts the groups of MCP servers into the application: their paths, and the connections they share."""

from collections.abc import AsyncIterator

from aiohttp import web

from gpuproxy.codec.seal import Seal
from gpuproxy.config import Config
from gpuproxy.control.mcp_group import Group
from gpuproxy.control.mcp_inner import MCP, Inner


def add_groups(app: web.Application, config: Config, address: str, seal: Seal) -> None:
    """Serve the groups of the configuration; `address` is where the gateway itself is reached."""
    if not config.mcp_groups:
        return
    inner = Inner(address)
    for settings in config.mcp_groups:
        group = Group(settings, inner, seal, config.limits.buffered_body_bytes_max)
        for path in (f"{MCP}/{settings.name}", f"{MCP}/{settings.name}/"):
            app.router.add_route("*", path, group.handle)

    async def end_streams(_app: web.Application) -> None:
        inner.closing.set()

    async def close_at_end(_app: web.Application) -> AsyncIterator[None]:
        yield
        await inner.close()

    app.on_shutdown.append(end_streams)
    app.cleanup_ctx.append(close_at_end)
