"""Who listens to events now: each event is encoded once and put into the bounded queues of those it concerns.

No task waits for an event: who owns a queue is told to go on, and writes. One that only listens holds next to nothing.
"""

from collections import deque
from datetime import UTC
from functools import lru_cache
from typing import Protocol

import msgspec

from gpuproxy.events.catalogue import channel_of, socket_type
from gpuproxy.events.stream import Event

QUEUE_TEXTS_MAX = 256
QUEUE_BYTES_MAX = 262_144

_encode = msgspec.json.Encoder().encode


class Writer(Protocol):
    """Who owns a queue."""

    def go_on(self) -> None:
        """Write what waits, as far as that is possible now."""


class Consumer:
    """One listener. `user_id` is None until it has shown a credential. `is_over` when it read too slowly."""

    __slots__ = ("_bytes", "_writer", "channels", "is_over", "queue", "user_id")

    def __init__(self, writer: Writer) -> None:
        self.user_id: str | None = None
        self.channels: frozenset[str] = frozenset()
        self.queue: deque[str] | None = None  # None: empty; an empty deque has 760 bytes
        self.is_over = False
        self._writer = writer
        self._bytes = 0

    def push(self, text: str) -> None:
        """Put a text behind those that wait."""
        if self.is_over:
            return
        self._bytes += len(text)
        waiting = self.queue = self.queue or deque()
        if len(waiting) >= QUEUE_TEXTS_MAX or self._bytes > QUEUE_BYTES_MAX:
            self.is_over = True
            self.clear()
        else:
            waiting.append(text)
        self._writer.go_on()

    def pop(self) -> str:
        """Take the text that waits longest; there must be one."""
        assert self.queue is not None
        text = self.queue.popleft()
        self._bytes -= len(text)
        self.queue = self.queue or None
        return text

    def clear(self) -> None:
        """Forget what waits."""
        self.queue, self._bytes = None, 0


class Hub:
    """All consumers of one node."""

    def __init__(self) -> None:
        self._by_channel: dict[str, set[Consumer]] = {}
        self._by_user: dict[str, set[Consumer]] = {}

    def publish(self, event: Event) -> None:
        """Queue an event for everybody it concerns who subscribed to its channel."""
        channel = channel_of(event.name)
        concerned = self._by_channel if event.user_id is None else self._by_user
        listening = [each for each in concerned.get(event.user_id or channel, ()) if channel in each.channels]
        if listening:
            text = text_of(event)
            for consumer in listening:
                consumer.push(text)

    def subscribe(self, consumer: Consumer, channel: str) -> None:
        """Let a consumer hear of a channel."""
        consumer.channels = _shared(consumer.channels | {channel})
        self._by_channel.setdefault(channel, set()).add(consumer)

    def unsubscribe(self, consumer: Consumer, channel: str) -> None:
        """Let it hear no more."""
        consumer.channels = _shared(consumer.channels - {channel})
        _discard(self._by_channel, channel, consumer)

    def identify(self, consumer: Consumer, user_id: str | None) -> None:
        """Let a consumer hear of a user's own events; None: of nobody's."""
        if consumer.user_id is not None:
            _discard(self._by_user, consumer.user_id, consumer)
        consumer.user_id = user_id
        if user_id is not None:
            self._by_user.setdefault(user_id, set()).add(consumer)

    def remove(self, consumer: Consumer) -> None:
        """Forget a consumer."""
        self.identify(consumer, None)
        for channel in tuple(consumer.channels):
            self.unsubscribe(consumer, channel)


def text_of(event: Event) -> str:
    """Return what is sent over ``/ws``."""
    timestamp = event.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {"type": socket_type(event.name), "payload": event.data, "id": event.id, "timestamp": timestamp}
    return _encode(fields).decode()


@lru_cache(maxsize=256)
def _shared(channels: frozenset[str]) -> frozenset[str]:
    """Return one object for all that are equal: there are few sets of channels and thousands of consumers."""
    return channels


def _discard(sets: dict[str, set[Consumer]], name: str, consumer: Consumer) -> None:
    found = sets.get(name)
    if found is not None:
        found.discard(consumer)
        if not found:
            del sets[name]
