"""An MCP server made of the official SDK, in the forms it can serve: with sessions, without, and over SSE."""

import threading
from typing import Annotated, Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Elicit, Resolve
from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import JSONRPCMessage
from pydantic import BaseModel

RETRY_MS = 10
OPEN = TransportSecuritySettings(enable_dns_rebinding_protection=False)


class Events(EventStore):
    """Remembers all events, so that a client may resume."""

    def __init__(self) -> None:
        self.events: list[tuple[StreamId, JSONRPCMessage | None]] = []
        self.resumed_count = 0

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Keep `message` and return its number."""
        self.events.append((stream_id, message))
        return str(len(self.events))

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send again what came after the event `last_event_id` on its stream."""
        self.resumed_count += 1
        stream = self.events[int(last_event_id) - 1][0]
        for number, (of, message) in enumerate(self.events[int(last_event_id) :], int(last_event_id) + 1):
            if of == stream and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream


class Address(BaseModel):
    """What the tool `order` asks its user."""

    city: str


async def ask_address() -> Elicit[Address]:
    """Ask the user where to."""
    return Elicit("where to?", Address)


class ToolServer:
    """Tools to try a gateway with; `cancelled` tells that the tool `wait` was left."""

    def __init__(self, name: str = "alone") -> None:
        self.name = name
        self.events = Events()
        self.cancelled = threading.Event()
        self.mcp = MCPServer("tools-of-the-tests")
        tools = self.add, self.count, self.wait, self.order, self.fail, self.polled, self.blob, self.who, self.announce
        for tool in tools:
            self.mcp.add_tool(tool)

    def app(self, **options: Any) -> Any:
        """Return the ASGI application for Streamable HTTP at /mcp."""
        return self.mcp.streamable_http_app(transport_security=OPEN, retry_interval=RETRY_MS, **options)

    def resumable_app(self) -> Any:
        """Return the same with an event store, from which clients may resume."""
        return self.app(event_store=self.events)

    def sse_app(self) -> Any:
        """Return the ASGI application for the form of 2024-11-05."""
        return self.mcp.sse_app(transport_security=OPEN)

    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def count(self, to: int, context: Context) -> str:
        """Count aloud, as progress."""
        for number in range(1, to + 1):
            await context.report_progress(number, to, f"at {number}")
        return "done"

    async def wait(self, context: Context) -> str:
        """Report once, then never end."""
        await context.report_progress(1, 2, "waiting")
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        return "never"

    async def order(self, what: str, address: Annotated[Address, Resolve(ask_address)]) -> str:
        """Order something; asks where to."""
        return f"{what} goes to {address.city}"

    async def fail(self) -> str:
        """Fail."""
        raise ValueError("it broke")

    async def polled(self, context: Context) -> str:
        """Close the stream in the middle: the client has to resume."""
        await context.report_progress(1, 2, "before")
        await context.close_sse_stream()
        await context.report_progress(2, 2, "after")
        return "resumed"

    async def blob(self, size: int) -> str:
        """Return a text of `size` characters."""
        return "x" * size

    async def who(self) -> str:
        """Tell which of several servers this is."""
        return self.name

    async def announce(self, context: Context) -> str:
        """Tell the client outside of any call that the list of tools has changed."""
        await context.session.send_tool_list_changed()
        return "told"
