"""Protocol "https": any HTTP call to any target, untouched.

It has no mount: calls come as envelopes, to ``/upstreams/{name}`` or to an instance. The one thing it adds is
the Content-Type of an envelope's JSON body, as an HTTP client library would.
"""

import msgspec

from gpuproxy.plugin import (
    Call,
    GatewayError,
    Intent,
    ProtocolHandler,
    Registry,
    UpstreamRequest,
    UsageReader,
)
from gpuproxy_plugins.envelope import content_type_if_absent


class Https:
    """Passes calls through as they are."""

    name: str = "https"
    mounts: tuple[str, ...] = ()

    def needs_body(self, method: bytes, path: bytes) -> bool:
        """Never: the destination is given."""
        return False

    def inspect(self, call: Call) -> Intent:
        """Return an empty intent; nothing comes in by a mount."""
        return Intent()

    def describe(self, call: Call) -> Intent:
        """Return an empty intent; nothing here is metered."""
        return Intent()

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        """Name the type of an envelope's JSON body if the caller did not."""
        if not call.is_envelope:
            return UpstreamRequest()
        return UpstreamRequest(headers=content_type_if_absent(call))

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        """Return None: no answer is looked at."""
        return None

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Return the answer as it is."""
        return content_type, body

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        """Return the gateway's own error object."""
        return msgspec.json.encode({"error": error.message, "code": error.code, "request_id": request_id})


def register(registry: Registry) -> None:
    """Offer the protocol."""
    registry.protocol(Https())


_: type[ProtocolHandler] = Https
