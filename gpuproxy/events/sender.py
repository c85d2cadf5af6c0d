"""Sends what webhooks are owed: looks for what is due, claims as much as there is room for, posts each.

Room is what keeps receivers apart. Nobody has more than `endpoint_sends_max` posts under way to one URL and a tenth
of all to one account's; a webhook whose last attempt failed has one, and all failing ones together have half. So a
receiver that hangs delays nobody's deliveries but its own.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol

from gpuproxy.config import Webhooks
from gpuproxy.events.deliveries import Due, Outcome, Waiting, claim, settle, waiting_webhooks
from gpuproxy.events.post import Poster
from gpuproxy.events.signing import body_of, headers_of
from gpuproxy.observe.logs import get_logger
from gpuproxy.store.engine import Store, fault_of
from gpuproxy.store.rounds import rounds, unless_unchanged

POLL_S = 0.5  # between two looks for what is new
DUE_S = 1.0  # and for what was to wait until now
BUSY_POLL_S = 0.05  # while posts are under way, for each that ends makes room
LEASE_MARGIN_S = 45.0  # over the time limit of a post: for the store to take the outcome
ACCOUNT_SHARE = 10
FAILING_SHARE = 2

logger = get_logger(__name__)


class Seal(Protocol):
    """Opens what was sealed for a context; None if it cannot."""

    def unseal(self, sealed: bytes, context: bytes) -> bytes | None: ...


def context_of(webhook_id: str) -> bytes:
    """Return what a webhook's secret is sealed for."""
    return f"webhook\n{webhook_id}".encode()


class Sender:
    """One node's sender. `now` is the clock that tells what is due."""

    def __init__(
        self,
        store: Store,
        seal: Seal,
        poster: Poster,
        settings: Webhooks,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._seal = seal
        self._poster = poster
        self._settings = settings
        self._now = now
        self._lease = timedelta(seconds=settings.timeout_s + LEASE_MARGIN_S)
        self._by_webhook: Counter[str] = Counter()
        self._by_user: Counter[str] = Counter()
        self._failing = 0
        self._sending: set[asyncio.Task[None]] = set()

    async def send_due(self) -> int:
        """Begin to send what is due and finds room; return how many. Raises what the store raises."""
        if len(self._sending) >= self._settings.sends_max:
            return 0
        waiting = {each.webhook_id: each for each in await waiting_webhooks(self._store, self._now())}
        counts = self._share(list(waiting.values()))
        claimed = await claim(self._store, self._now(), self._lease, counts) if counts else []
        for due in claimed:
            self._start(due, waiting[due.webhook_id].is_failing)
        return len(claimed)

    def _share(self, waiting: list[Waiting]) -> dict[str, int]:
        """Return how many deliveries of each webhook may begin now."""
        left, counts = self._settings.sends_max - len(self._sending), {}
        failing_left = self._settings.sends_max // FAILING_SHARE - self._failing
        account_max = max(1, self._settings.sends_max // ACCOUNT_SHARE)
        taken: Counter[str] = Counter()
        for each in waiting:
            bound = 1 if each.is_failing else self._settings.endpoint_sends_max
            room = bound - self._by_webhook[each.webhook_id]
            room = min(room, left, account_max - self._by_user[each.user_id] - taken[each.user_id])
            if each.is_failing:
                room = min(room, failing_left)
                failing_left -= max(room, 0)
            if room > 0:
                counts[each.webhook_id] = room
                taken[each.user_id] += room
                left -= room
        return counts

    def _start(self, due: Due, is_failing: bool) -> None:
        self._by_webhook[due.webhook_id] += 1
        self._by_user[due.user_id] += 1
        self._failing += is_failing
        task = asyncio.create_task(self._send(due))
        self._sending.add(task)
        task.add_done_callback(lambda done: self._end(done, due, is_failing))

    def _end(self, task: "asyncio.Task[None]", due: Due, is_failing: bool) -> None:
        self._sending.discard(task)
        self._failing -= is_failing
        for counter, name in ((self._by_webhook, due.webhook_id), (self._by_user, due.user_id)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]

    async def _send(self, due: Due) -> None:
        try:
            outcome = await self._attempt(due)
            state = await settle(self._store, due, outcome, self._now())
        except Exception as error:  # its claim runs out, and then it is sent again
            logger.error("webhook outcome not stored", delivery_id=due.id, error=fault_of(error))
        else:
            logger.info(
                "webhook sent",
                delivery_id=due.id, webhook_id=due.webhook_id, event_id=due.event_id, attempts=due.attempts,
                status=outcome.status, error=outcome.error, duration_ms=outcome.duration_ms, state=state,
            )  # fmt: skip

    async def _attempt(self, due: Due) -> Outcome:
        now, context = self._now(), context_of(due.webhook_id)
        sealed = [due.secret, *(old.sealed for old in due.old_secrets if now < old.until)]
        opened = [secret.decode() for each in sealed if (secret := self._seal.unseal(each, context)) is not None]
        if not opened:
            return Outcome(0, "its secret can be read no more: the gateway's own has changed; rotate it", 0)
        body = body_of(due.name, due.at, due.data, due.user_id, opened[0])
        return await self._poster.post(due.url, headers_of(due.event_id, now, body, opened), body)

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def run(self, stopping: asyncio.Event) -> None:
        """Send until `stopping` is set, through outages of the store; then wait for what is under way."""
        complain = partial(logger.error, "webhooks cannot be read, will go on")
        look = unless_unchanged(self._store, self.send_due, DUE_S)

        async def send() -> None:
            await (self.send_due() if self._sending else look())  # a post that ends makes room, unseen by the store

        await rounds(send, lambda: BUSY_POLL_S if self._sending else POLL_S, stopping, complain)
        await self.close()

    async def close(self) -> None:
        """Wait for what is under way, which has its bound; then leave the resolver."""
        await self.idle()
        self._poster.close()
