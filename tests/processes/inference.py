"""A small inference server in a thread of its own, whose streams a test can hold half way."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from clients.servers import LoopThread

INPUT_TOKENS, OUTPUT_TOKENS = 12, 30
_USAGE = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS, "total_tokens": 42}


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", **fields}).encode() + b"\n\n"


JSON_BODY = json.dumps({"object": "chat.completion", "choices": [], "usage": _USAGE}).encode()
EVENTS = (
    *(_event({"choices": [{"index": 0, "delta": {"content": f" token{number}"}}]}) for number in range(4)),
    _event({"choices": [], "usage": _USAGE}),
    b"data: [DONE]\n\n",
)
STREAM_BODY = b"".join(EVENTS)

_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Inference:
    """Answers every POST as a chat completion. A stream of the user "held" waits for `release` in its middle."""

    def __init__(self) -> None:
        self.held_count = 0
        self.thread = LoopThread(self._open)
        self._gate: asyncio.Event

    def release(self) -> None:
        """Let the held streams go on."""
        self.thread.loop.call_soon_threadsafe(self._gate.set)

    def hold(self) -> None:
        """Hold streams from now on, those before go on; `held_count` starts anew."""
        self.thread.call(self._hold())

    async def _hold(self) -> None:
        self._gate.set()
        self._gate = asyncio.Event()
        self.held_count = 0

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[int]:
        self._gate = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
            connections.discard(task)
            writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in list(connections):
                task.cancel()
            await asyncio.gather(*connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            if body.get("stream"):
                await self._stream(writer, body.get("user") == "held")
            else:
                writer.write(_JSON_HEAD % len(JSON_BODY) + JSON_BODY)
                await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, is_held: bool) -> None:
        writer.write(_STREAM_HEAD)
        for number, event in enumerate(EVENTS):
            if number == 2 and is_held:
                self.held_count += 1
                await self._gate.wait()
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
