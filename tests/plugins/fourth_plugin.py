"""A protocol written outside the package: calls go to the upstream named by a header."""

import json

from gpuproxy.plugin import (
    Call,
    GatewayError,
    Intent,
    ProtocolHandler,
    Registry,
    UpstreamRequest,
    UsageReader,
)


class Named:
    """Routes by the header X-Upstream."""

    name: str = "named"
    mounts: tuple[str, ...] = ("named",)

    def needs_body(self, method: bytes, path: bytes) -> bool:
        return False

    def inspect(self, call: Call) -> Intent:
        upstream = call.header(b"x-upstream")
        if upstream is None:
            raise GatewayError("BAD_REQUEST", "name an upstream in X-Upstream")
        return Intent(upstream=upstream.decode("latin-1"), path=call.path.removeprefix(b"/named"))

    def describe(self, call: Call) -> Intent:
        return Intent()

    def prepare(self, call: Call, intent: Intent) -> UpstreamRequest:
        return UpstreamRequest(headers=[(b"X-Named", b"1")])

    def reader(self, call: Call, status: int, content_type: bytes) -> UsageReader | None:
        return None

    def collapse(self, call: Call, content_type: bytes, body: bytes) -> tuple[bytes, bytes]:
        return content_type, body

    def refuse(self, path: bytes, error: GatewayError, request_id: str) -> bytes:
        return json.dumps({"oops": error.message, "code": error.code, "request_id": request_id}).encode()


def register(registry: Registry) -> None:
    registry.protocol(Named())


_: type[ProtocolHandler] = Named
