"""Limits in a worker: shared by the keys of a user, raised by those who may, of tokens as of requests."""

import asyncio
import time
from collections import defaultdict

import pytest

from gpuproxy.ledger.rates import Window
from gpuproxy.ledger.slots import Slots
from gpuproxy.link.messages import HeldCredit, HeldStreams, Lease, Leased, Return

from .conftest import Serve
from .harness import CHAT, OK, RAW, Gateway, request, until
from .test_tunnels import SWITCH, UPGRADE
from .wire import Wire

BODY = b'{"model":"m","max_tokens":10}'
ANSWER = b'{"usage":{"prompt_tokens":5,"completion_tokens":4}}'
JSON_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


class Counter:
    """Control's side: hands out what the last minute leaves."""

    def __init__(self, gateway: Gateway, **limits: int) -> None:
        self.limits = limits
        self.windows: dict[tuple[str, str, str], Window] = defaultdict(Window)
        self.gate = asyncio.Event()
        self.gate.set()
        self.back: list[int] = []
        gateway.link_server.lessor = self

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        await self.gate.wait()
        limit = max(self.limits[ask.kind], ask.limit)
        window, now_ns = self.windows[ask.kind, ask.user_id, ask.key_id], 1
        entry = window.grant((epoch, ask.id), limit, ask.least, ask.wanted, now_ns)
        return Leased(ask.id, entry.amount, 1 << 61, limit, window.left(limit, now_ns), 1 << 61)

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        """Nothing: no streams are counted."""

    def take_back(self, epoch: str, returned: Return) -> None:
        self.back.append(returned.amount)
        window = self.windows[returned.kind, returned.user_id, returned.key_id]
        window.take_back((epoch, returned.lease_id), returned.amount)


async def _statuses(gateway: Gateway, keys: list[bytes], *fields: bytes) -> list[int]:
    """Call once with each key, in turn."""
    found = []
    for key in keys:
        client = await gateway.ask(request(b"GET " + RAW + b"/x", *fields, key=key, id=b""))
        answer = asyncio.create_task(client.answer())
        await until(lambda done=answer.done: done() or not gateway.raw.is_untouched(), "a call")
        if not answer.done():
            upstream = await gateway.raw.accept()
            await upstream.read_head()
            await upstream.send(OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
            upstream.close()
        found.append((await answer).status)
        client.close()
    return found


async def test_keys_without_a_limit_of_their_own_share_that_of_their_user(serve: Serve) -> None:
    gateway = await serve()
    Counter(gateway, requests=3)
    keys = [gateway.keys.add(rpm=3, is_rpm_shared=True) for _ in range(2)]
    own = gateway.keys.add(rpm=3)
    assert await _statuses(gateway, [*keys, *keys, own]) == [200, 200, 200, 429, 200]


async def test_the_override_raises_up_to_the_ceiling_of_the_key_and_no_further(serve: Serve) -> None:
    gateway = await serve()
    Counter(gateway, requests=2)
    key = gateway.keys.add(rpm=2, rpm_ceiling=4)
    raised = await _statuses(gateway, [key] * 5, b"X-Rate-Limit-Override: 1000")
    assert raised == [200] * 4 + [429]
    assert await _statuses(gateway, [key]) == [429]


async def test_the_override_of_who_has_no_ceiling_is_ignored(serve: Serve) -> None:
    gateway = await serve()
    Counter(gateway, requests=1)
    key = gateway.keys.add(rpm=1)
    assert await _statuses(gateway, [key] * 2, b"X-Rate-Limit-Override: 1000") == [200, 429]


@pytest.mark.parametrize("wish", [b"0", b"odd", b"2147483649", b"-1"])
async def test_an_override_that_is_no_number_is_refused(serve: Serve, wish: bytes) -> None:
    gateway = await serve()
    Counter(gateway, requests=1)
    key = gateway.keys.add(rpm=1, rpm_ceiling=4)
    assert await _statuses(gateway, [key], b"X-Rate-Limit-Override: " + wish) == [400]


async def test_tokens_are_counted_with_the_most_and_corrected_when_the_call_ends(serve: Serve) -> None:
    gateway = await serve()
    most = len(BODY) + 10
    counter = Counter(gateway, tokens=most + 9)
    key = gateway.keys.add(tpm=most + 9)
    for _ in range(2):
        client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key, id=b""))
        upstream = await gateway.llm.accept()
        await upstream.read_head()
        other = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key, id=b""))
        assert (await other.answer()).status == 429
        await upstream.send(JSON_OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
        await client.answer()
        upstream.close()
        await until(lambda: most - 9 in counter.back, "what was not used")
        counter.back.clear()
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["type"]) == (429, "rate_limit_error")


@pytest.mark.parametrize("used", [80, 1_000], ids=["within", "over"])
async def test_tokens_beyond_the_most_are_counted_too(serve: Serve, used: int) -> None:
    gateway = await serve()
    counter = Counter(gateway, tokens=100)
    key = gateway.keys.add(tpm=100)
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    told = ANSWER.replace(b":4", b":%d" % used)
    await upstream.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told)
    )
    assert (await client.answer()).status == 200
    (window,) = counter.windows.values()
    await until(lambda: window.left(100, 1) == max(0, 100 - 5 - used), "what was used beyond")
    await client.send(request(b"POST " + CHAT, body=BODY, key=key))
    assert (await client.answer()).status == 429


async def test_a_client_that_leaves_while_tokens_are_asked_for_uses_none(serve: Serve) -> None:
    gateway = await serve()
    counter = Counter(gateway, tokens=100)
    key = gateway.keys.add(tpm=100)
    await gateway.warm(key)
    counter.gate.clear()
    client = await gateway.ask(request(b"POST " + CHAT, body=BODY, key=key))
    await until(lambda: bool(gateway.link._leases), "the question")
    client.close()
    await gateway.receipt()
    counter.gate.set()
    await until(lambda: len(BODY) + 10 in counter.back, "what was not used")
    assert gateway.llm.is_untouched()


STREAM_BODY = b'{"model":"m","stream":true}'


class Booth:
    """Control's side for streams: one slot book."""

    def __init__(self, gateway: Gateway, limit: int) -> None:
        self.slots = Slots(grace_s=0)
        self.limit = limit
        self.gate = asyncio.Event()
        self.gate.set()
        gateway.link_server.lessor = self

    async def grant(self, epoch: str, ask: Lease) -> Leased:
        await self.gate.wait()
        amount = self.slots.grant((ask.user_id, ask.key_id), epoch, self.limit, ask.least, ask.wanted)
        return Leased(ask.id, amount, limit=self.limit)

    def hold(self, epoch: str, told: HeldStreams | HeldCredit) -> None:
        if isinstance(told, HeldStreams):
            held = [((user_id, key_id), amount) for user_id, key_id, amount in told.held]
            self.slots.restate(epoch, held, told.is_first)

    def take_back(self, epoch: str, returned: Return) -> None:
        self.slots.take_back((returned.user_id, returned.key_id), epoch, returned.amount)


async def _open(gateway: Gateway, key: bytes, body: bytes = STREAM_BODY) -> tuple[Wire, Wire]:
    client = await gateway.ask(request(b"POST " + CHAT, body=body, key=key, id=b""))
    upstream = await gateway.llm.accept()
    await upstream.read_head()
    return client, upstream


async def test_a_stream_over_the_limit_is_refused_before_anything_goes_upstream(serve: Serve) -> None:
    gateway = await serve()
    Booth(gateway, 1)
    key = gateway.keys.add(streams=1)
    for _ in range(2):
        client, upstream = await _open(gateway, key)
        other = await gateway.ask(request(b"POST " + CHAT, body=STREAM_BODY, key=key, id=b""))
        answer = await other.answer()
        assert (answer.status, answer.field(b"retry-after")) == (429, b"1")
        assert "over 1 streams at once with this key" in answer.json()["error"]["message"]
        assert gateway.llm.is_untouched()
        await upstream.send(JSON_OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
        assert (await client.answer()).status == 200
        upstream.close()


async def test_what_is_no_stream_and_keys_without_a_limit_need_no_slot(serve: Serve) -> None:
    gateway = await serve()
    Booth(gateway, 1)
    key, free = gateway.keys.add(streams=1), gateway.keys.add()
    await _open(gateway, key)
    await _open(gateway, key, BODY)
    await _open(gateway, free)


async def test_a_client_that_leaves_gives_its_slot_back(serve: Serve) -> None:
    gateway = await serve()
    booth = Booth(gateway, 1)
    key = gateway.keys.add(streams=1)
    client, _ = await _open(gateway, key)
    client.close()
    await gateway.receipt()
    client, _ = await _open(gateway, key)
    client.close()
    await gateway.receipt(2)
    gateway.plane.limits_by_key.close()
    await until(lambda: booth.slots.left(("user", "key1"), 1) == 1, "the slot")


async def test_a_client_that_leaves_while_a_slot_is_asked_for_keeps_none(serve: Serve) -> None:
    gateway = await serve()
    booth = Booth(gateway, 1)
    key = gateway.keys.add(streams=1)
    await gateway.warm(key)
    booth.gate.clear()
    client = await gateway.ask(request(b"POST " + CHAT, body=STREAM_BODY, key=key))
    await until(lambda: bool(gateway.link._leases), "the question")
    client.close()
    await gateway.receipt()
    booth.gate.set()
    await until(lambda: not gateway.link._leases, "the answer")
    await _open(gateway, key)


async def test_a_tunnel_has_a_slot_until_it_ends(serve: Serve) -> None:
    gateway = await serve()
    Booth(gateway, 1)
    key = gateway.keys.add(streams=1)
    for number in (1, 2):
        client = await gateway.ask(request(b"GET " + RAW + b"/ws", *UPGRADE, key=key, id=b""))
        upstream = await gateway.raw.accept()
        await upstream.read_head()
        await upstream.send(SWITCH)
        assert (await client.answer()).status == 101
        other = await gateway.ask(request(b"GET " + RAW + b"/ws", *UPGRADE, key=key, id=b""))
        assert (await other.answer()).status == 429
        client.close()
        await gateway.receipt(2 * number)


async def test_a_limit_says_to_the_millisecond_when_it_is_free_again(serve: Serve) -> None:
    gateway = await serve()
    Counter(gateway, requests=1)
    key = gateway.keys.add(rpm=1)
    assert await _statuses(gateway, [key]) == [200]
    purse = next(iter(gateway.plane.limits_by_key._purses.values()))
    now_ns = time.monotonic_ns()
    # The last: as of a minute used up in a burst. Many SDKs do not wait for a minute or more, but try again at once.
    resets = ((now_ns + 3_500_000_000, 1_000, 3_500), (now_ns, 100, 100), (now_ns + 300 * 10**9, 59_900, 59_900))
    for reset_ns, least_ms, most_ms in resets:
        purse.reset_ns = reset_ns
        error = purse.refusal()
        assert error.retry_after_s is not None
        assert least_ms <= error.retry_after_s * 1000 <= most_ms
