"""The Redis that nodes share for what must be counted together; optional.

While it does not answer nobody waits for it: the first call that fails says so to all, and only `run` asks on, until
it answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as Client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gpuproxy.errors import GatewayError
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.rounds import pause

ANSWER_S = 1.0  # a grant takes 0.3 ms; who takes a second is away, and its limits are kept by shares
CONNECTIONS_MAX = 16
PROBE_S = 0.5

logger = get_logger(__name__)


class RedisAwayError(GatewayError):
    """Redis does not answer, or not what was asked for."""

    def __init__(self, cause: object) -> None:
        super().__init__("UNAVAILABLE", f"Redis does not answer: {cause}")


class Redis:
    """One Redis and whether it answers. ``redis://``, ``rediss://`` and ``unix://`` URLs are understood.

    `meet`, if set, is what `run` asks each time: whoever keeps something there makes up for what was missed.
    """

    def __init__(self, url: str) -> None:
        self.is_up = False
        self.meet: Callable[[], Awaitable[object]] | None = None
        self._pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS_MAX, timeout=ANSWER_S, socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S, retry=Retry(NoBackoff(), 0), client_name="gpuproxy",
        )  # fmt: skip
        self._client: Client = Client(connection_pool=self._pool)
        self._told_up = True

    async def evaluate(self, script: str, keys: Sequence[str], words: Sequence[str | int]) -> Any:
        """Run a script. Raises RedisAwayError, at once while Redis is known to be away."""
        if not self.is_up:
            raise RedisAwayError("it is known to be away")
        return await self.ask(script, keys, words)

    async def ask(self, script: str, keys: Sequence[str], words: Sequence[str | int]) -> Any:
        """Run a script even if Redis is known to be away. Raises RedisAwayError."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._client.eval(script, len(keys), *keys, *(str(word) for word in words))
        except (RedisError, OSError, TimeoutError) as error:
            self.is_up = False
            raise RedisAwayError(f"{type(error).__name__}: {error}") from None

    async def run(self, stopping: asyncio.Event) -> None:
        """Ask whether it answers until `stopping` is set, then close."""
        while not stopping.is_set():
            await self.probe()
            await pause(PROBE_S, stopping)
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._pool.aclose()

    async def probe(self) -> None:
        """Ask whether it answers; `run` does so twice a second."""
        try:
            if self.meet is None:
                await self.ask("return 1", (), ())
            else:
                await self.meet()
            self.is_up = True
        except RedisAwayError as error:
            self.is_up = False
            if self._told_up:
                logger.error("Redis is away, limits are kept by each node's share", cause=str(error))
            self._told_up = False
        else:
            if not self._told_up:
                logger.info("Redis is back")
            self._told_up = True
