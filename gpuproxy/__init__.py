"""gpuproxy: the gateway that GPU inference runs through."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuproxy.client import AsyncClient, Client, GpuproxyError

__all__ = ["AsyncClient", "Client", "GpuproxyError", "__version__"]
__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    """Import the client library only when it is asked for: the daemon's processes start without httpx."""
    if name in ("AsyncClient", "Client", "GpuproxyError"):
        from gpuproxy import client

        return getattr(client, name)
    raise AttributeError(f"module 'gpuproxy' has no attribute {name!r}")
