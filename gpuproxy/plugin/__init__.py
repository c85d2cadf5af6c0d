"""The one door for plugins: the contracts they fill, the nouns they see, and the registry.

A plugin is a module with ``def register(registry: Registry) -> None``, named by an entry point of the group
``gpuproxy.plugins`` and switched on in config.toml under ``[plugins] enabled``. Plugins import this module
and nothing else of gpuproxy. A wrong one stops the start with its name and the remedy.
"""

from gpuproxy.codec.sse import TAIL_BYTES, EventFilter, event_payloads
from gpuproxy.errors import CODES, Code, GatewayError, PluginError
from gpuproxy.plugin.protocol import (
    Call,
    HeaderList,
    Intent,
    ProtocolHandler,
    UpstreamRequest,
    UsageReader,
)
from gpuproxy.plugin.registry import GROUP, Registry, load_plugins
from gpuproxy.types import Usage

__all__ = [
    "CODES",
    "GROUP",
    "TAIL_BYTES",
    "Call",
    "Code",
    "EventFilter",
    "GatewayError",
    "HeaderList",
    "Intent",
    "PluginError",
    "ProtocolHandler",
    "Registry",
    "UpstreamRequest",
    "Usage",
    "UsageReader",
    "event_payloads",
    "load_plugins",
]
