"""Endpoints that answered 429 with Retry-After: they get no calls for so long, from no worker.

A limit of requests is that of one model or credential, so the breaker of the URL, which other models share, is not
concerned. As with breakers the last endpoint is never given up.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuproxy.proxy.endpoint import Endpoint


class Resting:
    """The endpoints that rest, and until when."""

    def __init__(self) -> None:
        self._until_s: dict[Endpoint, float] = {}

    def __contains__(self, endpoint: "Endpoint") -> bool:
        return endpoint in self._until_s

    def add(self, endpoint: "Endpoint", until_s: float) -> None:
        """Let it rest."""
        self._until_s[endpoint] = until_s
        endpoint.refresh()

    def sweep(self, now_s: float) -> None:
        """Take back those that have rested."""
        for endpoint in [endpoint for endpoint, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[endpoint]
            endpoint.refresh()

    def clear(self) -> None:
        """Forget all: others take their places."""
        self._until_s.clear()
