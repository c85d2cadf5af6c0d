"""Control's end of the link and workers that met it, for the tests of both."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from gpuproxy.link.messages import (
    Authorize,
    FrameReader,
    FromControl,
    FromWorker,
    Hello,
    Prices,
    decode_from_control,
    frame,
)
from gpuproxy.link.server import LinkServer
from gpuproxy.types import Grant

DIGEST = bytes(range(32))
GRANT = Grant("k1", "u1")


class Worker:
    """A worker's end: says messages, hears messages; those that tell prices it keeps apart."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()
        self._heard: list[FromControl] = []
        self.prices: list[Prices] = []

    def say(self, *messages: FromWorker) -> None:
        self._writer.write(b"".join(frame(message) for message in messages))

    def babble(self, data: bytes) -> None:
        self._writer.write(data)

    async def hear(self) -> FromControl:
        """Return the next message; EOFError when the link ends."""
        async with asyncio.timeout(5):
            while not self._heard:
                data = await self._reader.read(65_536)
                if not data:
                    raise EOFError
                messages = list(map(decode_from_control, self._frames.feed(data)))
                self.prices += [message for message in messages if isinstance(message, Prices)]
                self._heard += [message for message in messages if not isinstance(message, Prices)]
        return self._heard.pop(0)

    async def leave(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class Site:
    """A running link server and the workers that met it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: Callable[[bytes], Awaitable[Grant | None]] = self._grant
        self.server = LinkServer(lambda digest: self.answer(digest), timeout_s=0.2, remember_s=60)
        self.workers: list[Worker] = []

    async def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        await self.server.start(listener)

    async def link(self, epoch: str = "") -> Worker:
        """Return a worker that has said who it is, and heard nothing yet."""
        worker = Worker(*await asyncio.open_unix_connection(self.path))
        self.workers.append(worker)
        worker.say(Hello(len(self.workers) - 1, os.getpid(), epoch))
        return worker

    async def worker(self, epoch: str = "") -> Worker:
        """Return a worker that has heard all that is said to each."""
        worker = await self.link(epoch)
        worker.say(Authorize(0, bytes(32)))
        await worker.hear()
        return worker

    async def stop(self) -> None:
        await self.server.close()
        for worker in self.workers:
            await worker.leave()

    async def _grant(self, digest: bytes) -> Grant | None:
        return GRANT if digest == DIGEST else None
