"""The client library: one gateway, one key, its calls as plain methods.

`Client` is a thin layer over httpx, `AsyncClient` has the same methods over aiohttp. Answers are the gateway's JSON as
it came; failures are exceptions of `errors`, each with the gateway's code. What did not happen, or cannot happen twice,
is tried again a few times, after the wait the gateway asks for. Nothing of the server is imported.
"""

from typing import TYPE_CHECKING, Any

from gpuproxy.client.errors import (
    AuthenticationError,
    ConflictError,
    ConnectionFailedError,
    GatewayFaultError,
    GpuproxyError,
    InstanceFailedError,
    InsufficientCreditsError,
    InvalidAnswerError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    TimedOutError,
    UnavailableError,
    UpstreamError,
)

if TYPE_CHECKING:
    from gpuproxy.client.asynchronous import AsyncClient, AsyncProxyStream
    from gpuproxy.client.sync import Client, ProxyStream

__all__ = [
    "AsyncClient",
    "AsyncProxyStream",
    "AuthenticationError",
    "Client",
    "ConflictError",
    "ConnectionFailedError",
    "GatewayFaultError",
    "GpuproxyError",
    "InstanceFailedError",
    "InsufficientCreditsError",
    "InvalidAnswerError",
    "InvalidRequestError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProxyStream",
    "RateLimitedError",
    "TimedOutError",
    "UnavailableError",
    "UpstreamError",
]


def __getattr__(name: str) -> Any:
    """Import httpx or aiohttp only for who uses it."""
    if name in ("Client", "ProxyStream"):
        from gpuproxy.client import sync

        return getattr(sync, name)
    if name in ("AsyncClient", "AsyncProxyStream"):
        from gpuproxy.client import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module 'gpuproxy.client' has no attribute {name!r}")
