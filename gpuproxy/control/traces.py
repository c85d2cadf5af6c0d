"""Sends the spans of calls to an OpenTelemetry receiver, in batches, in the background; see `observe.spans`.

Nothing waits for a receiver: what does not fit into the queue is dropped and counted. A batch that a receiver cannot
take now is sent again until it can; one that it does not want is dropped.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from urllib.parse import unquote

import aiohttp

from gpuproxy import __version__
from gpuproxy.config import Traces
from gpuproxy.errors import ConfigError
from gpuproxy.observe.logs import get_logger
from gpuproxy.observe.otlp import request_of
from gpuproxy.observe.spans import spans_of
from gpuproxy.store.rounds import pause
from gpuproxy.types import Receipt

RETRIED = frozenset((429, 502, 503, 504))  # OTLP/HTTP, "Retryable Response Codes"
WAIT_S_MAX = 30.0
READ_BYTES = 65_536  # of an answer: nothing in it is needed, but a connection is kept only if it was read

logger = get_logger(__name__)

Count = Callable[[str, int], None]  # what became of how many calls


def headers_of(variable: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Read header fields as OpenTelemetry writes them in variables: ``name=value,name=value``, percent-encoded.

    Raises ConfigError, which does not show the value.
    """
    found = {}
    for part in environment.get(variable, "").split(",") if variable else ():
        if not part.strip():
            continue
        name, mark, value = part.partition("=")
        if not mark or not name.strip():
            raise ConfigError([f"traces.headers_env: {variable} is not of the form name=value,name=value"])
        found[unquote(name.strip())] = unquote(value.strip())
    return found


class Exporter:
    """Takes receipts from the ingest's thread, sends their spans from the loop.

    Raises ConfigError if the variable with the headers is not written as it should be.
    """

    def __init__(self, settings: Traces, node: str, environment: Mapping[str, str]) -> None:
        self.count: Count = lambda outcome, calls: None
        self._settings = settings
        self._resource = {
            "service.name": settings.service_name,
            "service.version": __version__,
            "service.instance.id": node,
        }
        self._headers = {
            "User-Agent": f"gpuproxy/{__version__}",
            **headers_of(settings.headers_env, environment),
            "Content-Type": "application/x-protobuf",
        }
        self._waiting: deque[Receipt] = deque()
        self._batch: list[Receipt] = []
        self._body = b""
        self._is_failing = False
        self._told_s = 0.0  # how long the receiver wants to be left alone
        self._session: aiohttp.ClientSession | None = None

    def add(self, receipts: Iterable[Receipt]) -> None:
        """Let the spans of these calls be sent, as far as there is room."""
        wanted = [receipt for receipt in receipts if receipt.trace is not None]
        room = self._settings.queue_max - len(self._waiting) - len(self._batch)
        self._waiting.extend(wanted[: max(0, room)])
        if len(wanted) > room:
            self.count("dropped", len(wanted) - max(0, room))

    async def run(self, stopping: asyncio.Event) -> None:
        """Send what comes until told to stop."""
        wait_s = self._settings.interval_s
        while not stopping.is_set():
            wait_s = self.pause_s(await self.send_waiting(stopping), wait_s)
            await pause(wait_s, stopping)

    def pause_s(self, is_well: bool, before_s: float) -> float:
        """Return how long to wait now: longer each time the receiver is not well, and at least as long as it says."""
        return self._settings.interval_s if is_well else min(max(before_s * 2, self._told_s), WAIT_S_MAX)

    async def send_waiting(self, stopping: asyncio.Event | None = None) -> bool:
        """Send batch by batch; False if the receiver takes none now."""
        while self._waiting or self._batch:
            if stopping is not None and stopping.is_set():
                break
            if not await self._send():
                return False
        return True

    async def close(self) -> None:
        """Send the rest, for no longer than one batch may take; nothing may run any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.timeout_s):
                await self.send_waiting()
        left = len(self._waiting) + len(self._batch)
        if left:
            self.count("dropped", left)
            logger.warning("spans are lost: the receiver did not take them before the end", calls=left)
        if self._session is not None:
            await self._session.close()

    async def _send(self) -> bool:
        if not self._batch:
            self._batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._settings.batch_max))]
            self._body = await asyncio.to_thread(self._encoded, self._batch)
        fault, is_final = await self._post(self._body)
        if fault and not self._is_failing:
            logger.warning("spans cannot be sent", endpoint=self._settings.endpoint, cause=fault)
        elif self._is_failing and not fault:
            logger.info("spans are sent again")
        self._is_failing = bool(fault)
        if is_final:
            self.count("refused" if fault else "sent", len(self._batch))
            self._batch, self._body = [], b""
        return is_final

    def _encoded(self, batch: Iterable[Receipt]) -> bytes:
        spans = (span for receipt in batch for span in spans_of(receipt))
        return request_of(self._resource, __version__, spans)

    async def _post(self, body: bytes) -> tuple[str, bool]:
        """Return what went wrong, empty for nothing, and whether the batch is done with."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
            self._session = aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
        try:
            async with self._session.post(
                self._settings.endpoint, data=body, headers=self._headers, allow_redirects=False
            ) as response:
                await response.content.read(READ_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            self._told_s = 0.0
            return f"{type(failure).__name__}: {failure}", False
        told = response.headers.get("Retry-After", "")
        self._told_s = float(told) if told.isdecimal() else 0.0
        fault = "" if 200 <= response.status < 300 else f"it answered {response.status}"
        return fault, response.status not in RETRIED
