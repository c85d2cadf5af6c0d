"""An OpenTelemetry receiver: takes spans over HTTP, decodes them as the published messages, and may misbehave."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec import Struct
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Span(Struct):
    """A span as it arrived; ids in hex, `resource` and `attributes` as plain values."""

    name: str
    kind: int
    trace_id: str
    id: str
    parent_id: str
    start_ns: int
    end_ns: int
    is_error: bool
    flags: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


def decoded(body: bytes) -> list[Span]:
    """Return the spans of a request; nothing in it may be unknown to the published messages."""
    told = ExportTraceServiceRequest.FromString(body)
    assert told.SerializeToString(deterministic=True) == body
    found = []
    for part in told.resource_spans:
        resource = _plain(part.resource.attributes)
        for scope in part.scope_spans:
            assert scope.scope.name == "gpuproxy"
            found += [_span(span, resource) for span in scope.spans]
    return found


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        span.name,
        span.kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        span.flags,
        _plain(span.attributes),
        resource,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    found = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
    assert len(found) == len(attributes), "a name stands twice"
    return found


class Receiver:
    """Answers with the statuses in `answers`, then with 200. It hangs while `gate` is cleared."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []  # taken
        self.tried = 0
        self.headers: dict[str, str] = {}
        self.answers: list[int] = []
        self.retry_after = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    @property
    def spans(self) -> list[Span]:
        """Return all spans taken."""
        return [span for body in self.bodies for span in decoded(body)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Receiver"]:
        """Serve."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/traces", self._take)
        async with TestServer(app, host="127.0.0.1") as server:
            self.url = str(server.make_url("/v1/traces"))
            try:
                yield self
            finally:
                self.gate.set()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.tried += 1
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        await self.gate.wait()
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.bodies.append(body)
        headers = {"Location": self.url} if 300 <= status < 400 else {}
        if self.retry_after:
            headers["Retry-After"] = self.retry_after
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(status=status, body=answer, headers=headers, content_type="application/x-protobuf")
