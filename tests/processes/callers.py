"""Clients that tell exactly what a connection brought: a whole answer, none at all, or a part of one."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from gateways import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
STREAM = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
HELD = {**STREAM, "user": "held"}
CALL_S = 15.0
COUNT_DIGITS = 10  # at the end of a request id; before them stands what tells its worker from every other


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    request_id: str
    body: bytes
    closes: bool

    @property
    def worker(self) -> str:
        """Name the worker that gave the request its id."""
        return self.request_id[:-COUNT_DIGITS]

    @property
    def code(self) -> str:
        """Return the gateway's error code."""
        told = json.loads(self.body)
        error = told["error"]
        return str(error["code"] if isinstance(error, dict) else told["code"])


class ClosedError(Exception):
    """The connection ended, or could not be made, before a byte of the answer."""


class CutError(Exception):
    """The connection ended within an answer."""


class Caller:
    """One client connection, kept alive; opened again when the gateway closed it between two calls."""

    def __init__(self, port: int, key: str) -> None:
        self.key = key
        self.worker = ""  # that answered on this connection, "" before the first answer
        self.reopened_count = 0
        self.is_sent = asyncio.Event()
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: dict[str, Any] = CHAT) -> Answer:
        """Make a chat call."""
        return await self.call(b"POST /v1/chat/completions", json.dumps(body).encode())

    async def get(self, path: str) -> Answer:
        """Ask the management plane."""
        return await self.call(b"GET %b" % path.encode(), b"")

    async def call(self, what: bytes, body: bytes) -> Answer:
        """Make a call. Raises ClosedError only for a connection that was new, and CutError."""
        while True:
            is_new = self._streams is None
            try:
                async with asyncio.timeout(CALL_S):
                    await self.send(what, body)
                    answer = await self.receive()
            except ClosedError:
                await self.close()
                if is_new:
                    raise
                self.reopened_count += 1
            except BaseException:
                await self.close()
                raise
            else:
                if answer.closes:
                    await self.close()
                return answer

    async def connect(self) -> asyncio.StreamReader:
        """Open the connection without a word."""
        if self._streams is None:
            self.worker = ""
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                raise ClosedError(f"cannot connect: {error}") from error
        return self._streams[0]

    async def send(self, what: bytes, body: bytes) -> None:
        """Send a request."""
        await self.connect()
        assert self._streams is not None
        fields = b"Host: gateway\r\nX-API-Key: %b\r\nContent-Length: %d\r\n" % (self.key.encode(), len(body))
        self._streams[1].write(b"%b HTTP/1.1\r\n%b\r\n%b" % (what, fields, body))
        self.is_sent.set()

    async def receive(self) -> Answer:
        """Read an answer. Raises ClosedError or CutError."""
        assert self._streams is not None
        reader = self._streams[0]
        try:
            first = await reader.readexactly(1)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ClosedError(str(error) or "closed") from error
        try:
            return await self._rest(reader, first)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise CutError(str(error)) from error

    async def _rest(self, reader: asyncio.StreamReader, first: bytes) -> Answer:
        head = first + await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode("latin-1").lower().split("\r\n")[1:-2])
        self.worker = fields["x-request-id"][:-COUNT_DIGITS]
        if "content-length" in fields:
            body = await reader.readexactly(int(fields["content-length"]))
        else:
            body = await _chunks(reader)
        closes = fields.get("connection") == "close"
        return Answer(int(head.split(b" ", 2)[1]), fields["x-request-id"], body, closes)

    async def close(self) -> None:
        """Close the connection."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()
            with suppress(OSError):
                await streams[1].wait_closed()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert await reader.readexactly(2) == b"\r\n"
    return body


class Failure(NamedTuple):
    """A call that brought no whole answer, and the worker the connection was with, "" if none had answered."""

    worker: str
    reason: str


class Load:
    """Clients that call in a row until told to stop. Keeps every answer and every failure."""

    def __init__(self, port: int, key: str) -> None:
        self.answers: list[Answer] = []
        self.failures: list[Failure] = []
        self._port = port
        self._key = key
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    @property
    def faults(self) -> Counter[str]:
        """Count what went wrong, by kind."""
        wrong = (f"{answer.status} {answer.body.decode()}" for answer in self.answers if answer.status != 200)
        return Counter([*wrong, *(failure.reason for failure in self.failures)])

    def add(
        self,
        count: int,
        work: Callable[[Caller], Any] = Caller.post,
        is_kept_alive: bool = True,
        pause_s: float = 0.0,
    ) -> None:
        """Let `count` more clients begin; with `is_kept_alive` false each call is on a new connection."""
        self._tasks += [asyncio.create_task(self._client(work, is_kept_alive, pause_s)) for _ in range(count)]

    async def _client(self, work: Callable[[Caller], Any], is_kept_alive: bool, pause_s: float) -> None:
        caller = Caller(self._port, self._key)
        while not self._is_over:
            try:
                self.answers.append(await work(caller))
            except (ClosedError, CutError, TimeoutError) as error:
                self.failures.append(Failure(caller.worker, repr(error)))
                await asyncio.sleep(0.01)
            if not is_kept_alive:
                await caller.close()
            await asyncio.sleep(pause_s)
        await caller.close()

    async def __aenter__(self) -> "Load":
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Let every client finish its call."""
        self._is_over = True
        await asyncio.gather(*self._tasks)


async def all_refused(callers: list[Caller], timeout_s: float) -> float:
    """Wait until every caller is told 401, and return how many seconds that took."""
    begun_s = time.monotonic()
    while {(await caller.post()).status for caller in callers} != {401}:
        assert time.monotonic() - begun_s < timeout_s, f"the key is still good after {timeout_s:g} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun_s
