"""An inference server as a process of its own, to be killed: ``python mortal.py NAME PORT`` says its port and serves.

It answers with its name; the user "mute" gets no answer, the user "half" half a stream.
"""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

EVENT = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": null}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n"


class Mortal:
    """A server process. Killed, it can be started again on its port."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        words = [sys.executable, "-S", str(Path(__file__)), self.name, str(self.port)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def await_call(self) -> None:
        """Wait until it has got a call of somebody mute or half, and has said what it will say."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"got\n"

    def kill(self) -> None:
        """Kill it as nothing else can."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


async def serve(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the calls of one connection."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        user = json.loads(await reader.readexactly(length)).get("user", "")
        if user == "half":
            writer.write(HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"))
            for _ in range(3):
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            await writer.drain()
        elif user != "mute" or name != "first":
            body = json.dumps({"served_by": name, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()
            writer.write(HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body)
            continue
        print("got", flush=True)


async def main(name: str, port: int) -> None:
    """Serve until killed."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(name, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
