"""A worker's end of the link: asks control about keys and hears of revocations; reconnects by itself."""

import asyncio
from collections.abc import Callable
from typing import cast

from gpuproxy.link.messages import (
    Authorize,
    Authorized,
    FrameReader,
    Hello,
    Revoke,
    Unavailable,
    decode_from_control,
    frame,
)
from gpuproxy.observe.logs import get_logger
from gpuproxy.types import Grant

_log = get_logger("gpuproxy.link")

RECONNECT_S = 0.2
QUESTIONS_MAX = 10_000  # open at once; control answers a question in under a millisecond

Answer = Callable[[Grant | None, bool], None]


class LinkClient(asyncio.Protocol):
    """The link. `ask` calls back with (grant or None, whether control could tell)."""

    def __init__(self, path: str, hello: Hello) -> None:
        self.on_revoke: Callable[[tuple[str, ...]], None] = lambda key_ids: None
        self.on_reconnect: Callable[[], None] = lambda: None
        self.connected = asyncio.Event()
        self._path = path
        self._hello = hello
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._questions: dict[int, tuple[bytes, Answer]] = {}
        self._next_id = 0
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Keep connected until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._lost.clear()
            try:
                await loop.create_unix_connection(lambda: self, self._path)
                await self._lost.wait()
            except OSError as error:
                _log.debug("link cannot connect", reason=str(error))
            await asyncio.sleep(RECONNECT_S)

    def ask(self, digest: bytes, answer: Answer) -> int:
        """Ask about the key with this digest; while control is away the question is kept until `give_up`."""
        if len(self._questions) >= QUESTIONS_MAX:
            answer(None, False)
            return -1
        self._next_id += 1
        self._questions[self._next_id] = digest, answer
        if self._transport is not None:
            self._transport.write(frame(Authorize(self._next_id, digest)))
        return self._next_id

    def give_up(self, question: int) -> None:
        """Stop waiting for an answer and report that control could not tell."""
        self._answer(question, None, False)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce this worker and ask what is still open."""
        self._transport = cast(asyncio.Transport, transport)
        self._reader = FrameReader()
        self.connected.set()
        self._transport.write(frame(self._hello))
        for question, (digest, _) in self._questions.items():
            self._transport.write(frame(Authorize(question, digest)))
        self.on_reconnect()

    def data_received(self, data: bytes) -> None:
        """Handle every whole message."""
        for body in self._reader.feed(data):
            message = decode_from_control(body)
            match message:
                case Authorized():
                    self._answer(message.id, message.grant, True)
                case Unavailable():
                    self._answer(message.id, None, False)
                case Revoke():
                    self.on_revoke(message.key_ids)

    def connection_lost(self, error: Exception | None) -> None:
        """Keep what is open for the next connection."""
        self._transport = None
        self.connected.clear()
        self._lost.set()

    def _answer(self, question: int, grant: Grant | None, is_known: bool) -> None:
        _, answer = self._questions.pop(question, (b"", None))
        if answer is not None:
            answer(grant, is_known)
