"""A fake inference server that costs next to nothing: the upstream of the benchmarks.

It answers ``POST /v1/chat/completions`` on bare uvloop protocols: with one small JSON object, or, when the
body says ``"stream": true``, with 34 server-sent events, each its own chunk and its own write, in one of two
rhythms:

- *steps* of `STEP_S`: each step writes one event to every open stream, as an inference server with continuous
  batching does. A proxy that keeps up reads the events one by one, 34 reads for a stream.
- *burst*, when the body names the user "burst": one event per stream and turn of the event loop, as fast as
  it goes. A busy proxy finds several events in one read, the fewer reads the busier it is.

Run alone it binds a free port of the loopback interface and prints the number on a line.
"""

import asyncio
import json
import socket
from contextlib import suppress
from typing import cast

import uvloop

STEP_S = 0.002  # uvloop counts in ms; at 1 ms, 64 streams keep one core of a proxy busy
EVENT_COUNT = 34  # role, 30 tokens, finish, usage, [DONE]
_TOKEN_COUNT = EVENT_COUNT - 4
_HEAD_BYTES_MAX = 65_536

PROMPT_TOKENS = 12
COMPLETION_TOKENS = _TOKEN_COUNT
_USAGE = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
}
_COMPLETION = {
    "id": "chatcmpl-0123456789abcdef",
    "object": "chat.completion",
    "created": 1_750_000_000,
    "model": "mock-model",
    "system_fingerprint": "fp_0123456789",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello! How can I help you today?"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    chunk: dict[str, object] = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_750_000_000,
        "model": "mock-model",
        "choices": choices,
    }
    if usage is not None:
        chunk["usage"] = usage
    return b"data: " + _compact(chunk) + b"\n\n"


def _delta(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    return _event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])


def _events() -> list[bytes]:
    tokens = [_delta({"content": f" token{number}"}) for number in range(_TOKEN_COUNT)]
    first, last = _delta({"role": "assistant", "content": ""}), _delta({}, "stop")
    return [first, *tokens, last, _event([], _USAGE), b"data: [DONE]\n\n"]


def _stream_writes() -> tuple[bytes, ...]:
    """Return what each write carries: the head goes with the first event, the end with the last."""
    writes = [b"%x\r\n%b\r\n" % (len(event), event) for event in _events()]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    writes[0] = head + writes[0]
    writes[-1] += b"0\r\n\r\n"
    return tuple(writes)


def _whole(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


STREAM_BODY = b"".join(_events())
JSON_BODY = _compact(_COMPLETION)
_STREAM_WRITES = _stream_writes()
_JSON_ANSWER = _whole(b"200 OK", JSON_BODY)
_NOT_FOUND = _whole(b"404 Not Found", b'{"error":{"message":"only POST /v1/chat/completions is here"}}')
_LENGTH_REQUIRED = _whole(b"411 Length Required", b'{"error":{"message":"send a Content-Length"}}')


class _Rhythm:
    """Writes one event to every open stream in each step; a step of 0 s is a turn of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, step_s: float) -> None:
        self._loop = loop
        self._step_s = step_s
        self._due_s = 0.0
        self._streams: dict[FakeInference, int] = {}

    def add(self, stream: "FakeInference") -> None:
        if not self._streams:
            self._schedule()
        self._streams[stream] = 0

    def discard(self, stream: "FakeInference") -> None:
        self._streams.pop(stream, None)

    def _step(self) -> None:
        for stream, position in list(self._streams.items()):
            stream.write(_STREAM_WRITES[position])
            if position + 1 < EVENT_COUNT:
                self._streams[stream] = position + 1
            else:
                del self._streams[stream]
                stream.end_stream()
        if self._streams:
            self._schedule()

    def _schedule(self) -> None:
        if not self._step_s:
            self._loop.call_soon(self._step)
            return
        self._due_s = max(self._due_s + self._step_s, self._loop.time())  # steps that came late are not caught up
        self._loop.call_at(self._due_s, self._step)


class FakeInference(asyncio.Protocol):
    """One connection. Trusts its peer to speak HTTP/1.1 with Content-Length; keeps connections open."""

    def __init__(self, steps: _Rhythm, burst: _Rhythm) -> None:
        self._steps, self._burst = steps, burst
        self._held = b""
        self._is_streaming = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.write = transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        self._steps.discard(self)
        self._burst.discard(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._held = self._held + data if self._held else data
        while self._held and not self._is_streaming and self._answer_one():
            pass

    def end_stream(self) -> None:
        """The last event is written; take the next request, should it be here already."""
        self._is_streaming = False
        self.data_received(b"")

    def _answer_one(self) -> bool:
        """Answer the request at the front of what is held; False if it is not whole yet."""
        held = self._held
        end = held.find(b"\r\n\r\n")
        if end < 0:
            return self._refuse(_NOT_FOUND) if len(held) > _HEAD_BYTES_MAX else False
        head = held[: end + 2].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            return self._refuse(_LENGTH_REQUIRED if head.startswith(b"post ") else _NOT_FOUND)
        length = int(head[at + 17 : head.find(b"\r\n", at + 17)])
        if len(held) < end + 4 + length:
            return False
        body = held[end + 4 : end + 4 + length]
        self._held = held[end + 4 + length :]
        if not head.startswith(b"post /v1/chat/completions "):
            self.write(_NOT_FOUND)
        elif b'"stream": true' in body or b'"stream":true' in body:
            self._is_streaming = True
            (self._burst if b'"burst"' in body else self._steps).add(self)
        else:
            self.write(_JSON_ANSWER)
        return True

    def _refuse(self, answer: bytes) -> bool:
        """Answer what has no readable end, and close."""
        self._held = b""
        if self._transport is not None:
            self._transport.write(answer)
            self._transport.close()
        return False


async def start(listener: socket.socket) -> asyncio.Server:
    """Serve on a bound socket; the loop must be uvloop's, which writes once per turn."""
    loop = asyncio.get_running_loop()
    steps, burst = _Rhythm(loop, STEP_S), _Rhythm(loop, 0)
    return await loop.create_server(lambda: FakeInference(steps, burst), sock=listener, backlog=1024)


async def _serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = await start(listener)
        print(listener.getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        uvloop.run(_serve())
