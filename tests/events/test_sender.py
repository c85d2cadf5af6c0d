"""Sending: what is owed arrives, once it can; a receiver that misbehaves harms nobody but itself."""

import asyncio
import base64
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update
from standardwebhooks import Webhook, WebhookVerificationError
from yarl import URL

from gpuproxy import resolver
from gpuproxy.access.accounts import create_user
from gpuproxy.access.keyring import fresh_keyring
from gpuproxy.config import Webhooks
from gpuproxy.events.deliveries import MOVES, WAITS_S, Outcome, after, claim, settle, wait_after
from gpuproxy.events.outbox import DATA_BYTES_MAX, record
from gpuproxy.events.post import REST_S_MAX, Bounds, Poster, rest_asked
from gpuproxy.events.sender import Sender, context_of
from gpuproxy.events.signing import new_secret
from gpuproxy.events.webhooks import (
    OLD_SECRETS_MAX,
    Draft,
    add_webhook,
    change_webhook,
    remove_webhook,
    replace_secret,
    replay,
)
from gpuproxy.guard import Guard
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import deliveries, events, webhooks

from .receiver import Receiver
from .test_signing import verifies

SECRET = "webhook-secret-for-verification"
KEYRING = fresh_keyring()
EVENTS_COUNT = int(os.environ.get("GPUPROXY_PROOF_WEBHOOKS", "60"))  # the large proof: 1000


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Posters:
    """Has little patience with a try that hangs, and much with all others: this machine may be busy."""

    def __init__(self, receiver: Receiver, allow: tuple[str, ...]) -> None:
        self._receiver = receiver
        self._short, self._long = (Poster(Bounds(s, s, 30.0, {}, Guard(allow))) for s in (0.3, 30.0))
        self.early: Counter[str] = Counter()  # how often patience ended before the receiver had the try

    async def post(self, url: str, headers: dict[str, str], body: bytes) -> Outcome:
        path, event_id = URL(url).path, headers["webhook-id"]
        if "/hang" not in path or not self._receiver.is_due(path, event_id):
            return await self._long.post(url, headers, body)
        before = self._receiver.tries[path, event_id]
        outcome = await self._short.post(url, headers, body)
        self.early[path] += self._receiver.tries[path, event_id] == before
        return outcome

    def close(self) -> None:
        self._short.close()
        self._long.close()


class World:
    """A store, a receiver, a sender and its clock."""

    def __init__(self, store: Store, receiver: Receiver, allow: tuple[str, ...] = ("127.0.0.0/8",)) -> None:
        self.store, self.receiver, self.clock = store, receiver, Clock()
        self.users: dict[str, str] = {}
        self.settings = Webhooks()
        self.posters = Posters(receiver, allow)
        self.sender = Sender(store, KEYRING, self.posters, self.settings, self.clock)

    async def webhook(self, path: str, email: str = "ann@example.com", names: tuple[str, ...] = ("*",)) -> str:
        if email not in self.users:
            self.users[email] = (await create_user(self.store, email)).id
        webhook_id = f"whk_{path.strip('/')}_{email}"
        url = path if "://" in path else f"{self.receiver.url}{path}"
        draft = Draft(webhook_id, "events", url, names, "", KEYRING.seal(SECRET.encode(), context_of(webhook_id)))
        async with self.store.writing() as connection:
            await add_webhook(connection, self.users[email], draft, 1_000)
        return webhook_id

    async def happen(self, name: str = "instance.created", email: str = "ann@example.com", n: int = 0) -> str:
        async with self.store.writing() as connection:
            return await connection.run_sync(record, name, self.users[email], {"n": n})

    async def pass_over(self) -> None:
        """Send all that is due now."""
        while await self.sender.send_due():
            await self.sender.idle()

    async def live_on(self) -> None:
        """Let time pass, half an hour beyond each moment when something is due, until nothing is left to do."""
        while True:
            await self.pass_over()
            due_at = await self.scalar(
                select(func.min(deliveries.c.due_at)).where(deliveries.c.state.in_(("pending", "sending")))
            )
            if due_at is None:
                return
            self.clock.ahead += max(due_at - self.clock(), timedelta()) + timedelta(minutes=30)

    async def scalar(self, query: Any) -> Any:
        async with self.store.reading() as connection:
            return await connection.scalar(query)

    async def states(self, path: str) -> Counter[tuple[str, int]]:
        """Count the deliveries to a path by state and attempts."""
        query = (
            select(deliveries.c.state, deliveries.c.attempts)
            .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
            .where(webhooks.c.url == f"{self.receiver.url}{path}")
        )
        async with self.store.reading() as connection:
            return Counter((row.state, row.attempts) for row in (await connection.execute(query)).all())


@pytest.fixture
async def world(store: Store) -> AsyncIterator[World]:
    async with Receiver().running() as receiver:
        world = World(store, receiver)
        yield world
        await world.sender.close()


async def test_an_event_is_told_to_who_asked_for_it_under_the_name_they_used(world: World) -> None:
    await world.webhook("/ok-all")
    await world.webhook("/ok-alias", names=("payment.success",))
    await world.webhook("/ok-other", names=("instance.created",))
    await world.webhook("/ok-stranger", "bob@example.com")
    event_id = await world.happen("payment.completed", n=7)
    await world.pass_over()
    (all_of, alias) = sorted(world.receiver.taken)[::-1]
    assert (all_of.path, alias.path) == ("/ok-all", "/ok-alias")
    assert (all_of.told["event"], alias.told["event"]) == ("payment.completed", "payment.success")
    assert {all_of.id, alias.id} == {event_id}
    assert all_of.told["data"] == {"n": 7, "user_id": world.users["ann@example.com"]}
    assert all(verifies(each.body, SECRET) for each in world.receiver.taken)


async def test_an_event_whose_cause_fails_is_told_to_nobody(world: World) -> None:
    await world.webhook("/ok")
    with pytest.raises(ZeroDivisionError):
        await _fail_after_recording(world)
    await world.pass_over()
    assert await world.scalar(select(func.count()).select_from(deliveries)) == 0
    assert world.receiver.tried == []


async def _fail_after_recording(world: World) -> None:
    async with world.store.writing() as connection:
        await connection.run_sync(record, "payment.failed", world.users["ann@example.com"], {})
        _ = 1 // 0


async def test_a_webhook_that_is_being_deleted_fails_no_event(world: World) -> None:
    going, _ = await world.webhook("/ok-going"), await world.webhook("/ok")
    async with world.store.writing() as connection:
        await remove_webhook(connection, world.users["ann@example.com"], going)
        happening = asyncio.create_task(world.happen())
        _, waiting = await asyncio.wait([happening], timeout=0.3)
        assert waiting  # for the row, or for the only writer
    await happening
    await world.pass_over()
    assert [each.path for each in world.receiver.taken] == ["/ok"]


async def test_exactly_the_right_ones_arrive(world: World) -> None:
    """Receivers that take, fail, hang, redirect, reset, say gone; over 75 hours of the sender's clock."""
    kinds = ("/ok", "/fail3", "/fail9", "/hang1", "/redirect", "/gone", "/reset2", "/busy1", "/hang", "/fail")
    weights = {"/ok": 12, "/fail3": 3}
    paths = [f"{kind}-{n}" for kind in kinds for n in range(weights.get(kind, 1))]
    for number, path in enumerate(paths):
        await world.webhook(path, f"user{number}@example.com")
    for n in range(EVENTS_COUNT):
        await world.happen(email=f"user{n % len(paths)}@example.com", n=n)
    expected = {path: [n for n in range(EVENTS_COUNT) if n % len(paths) == i] for i, path in enumerate(paths)}
    await world.live_on()
    for path, sent in expected.items():
        kind = path.split("-")[0]
        taken = sorted(each.told["data"]["n"] for each in world.receiver.of(path))
        ends_well = kind in ("/ok", "/fail3", "/fail9", "/hang1", "/reset2", "/busy1")
        assert taken == (sent if ends_well else []), path
        needed = {"/ok": 1, "/fail3": 4, "/fail9": 10, "/reset2": 3, "/busy1": 2}
        states = await world.states(path)
        if kind == "/gone":
            assert {state for state, _ in states} <= {"dead", "cancelled"}
            assert states.total() == len(sent)
        elif kind == "/hang1":
            tries = sum(attempts * count for (_, attempts), count in states.items())
            assert {state for state, _ in states} == {"delivered"}
            assert 2 * len(sent) <= tries <= 2 * len(sent) + world.posters.early[path]
        else:
            state = "delivered" if ends_well else "dead"
            assert states == {(state, needed.get(kind, len(WAITS_S) + 1)): len(sent)}, path
    assert world.receiver.canary_count == 0
    assert all(verifies(each.body, SECRET) for each in world.receiver.taken)


async def test_a_receiver_that_hangs_delays_only_its_own(world: World) -> None:
    for n in range(30):
        await world.webhook(f"/hang-{n}", f"hanging{n}@example.com")
        for _ in range(5):
            await world.happen(email=f"hanging{n}@example.com")
    await world.sender.send_due()
    await world.sender.idle()  # now they are known to fail
    await world.webhook("/ok")
    world.clock.ahead += timedelta(seconds=20)
    await world.sender.send_due()
    for n in range(20):
        await world.happen(n=n)
    started = time.monotonic()
    while len(world.receiver.of("/ok")) < 20:
        await world.sender.send_due()
        await asyncio.sleep(0.005)
        assert time.monotonic() - started < 20
    assert world.receiver.hanging <= world.settings.sends_max // 2
    await world.sender.idle()


async def test_one_receiver_never_has_more_than_its_bound_of_posts(world: World) -> None:
    await world.webhook("/hang")
    for _ in range(20):
        await world.happen()
    for _ in range(5):
        await world.sender.send_due()
    assert len(world.sender._sending) == world.settings.endpoint_sends_max
    await world.sender.idle()
    world.clock.ahead += timedelta(seconds=20)
    for _ in range(5):
        await world.sender.send_due()
    assert len(world.sender._sending) == 1  # it failed
    await world.sender.idle()


async def test_gone_disables_a_webhook_and_cancels_the_rest(world: World) -> None:
    await world.webhook("/gone")
    for _ in range(9):
        await world.happen()
    await world.live_on()
    assert await world.scalar(select(webhooks.c.disabled_reason)) == "it answered 410 Gone"
    states = await world.states("/gone")
    assert sum(count for (state, _), count in states.items() if state == "cancelled") >= 5
    assert await world.scalar(select(func.count()).where(events.c.name == "webhook.disabled")) == 1
    await world.happen()
    assert sum((await world.states("/gone")).values()) == 9


async def test_a_webhook_that_moves_is_not_held_to_the_receiver_it_had(world: World) -> None:
    webhook_id, now = await world.webhook("/fail"), world.clock()
    await world.happen()
    await world.pass_over()
    assert await world.scalar(select(webhooks.c.failing_since)) is not None
    await world.happen()
    (due,) = await claim(world.store, world.clock(), timedelta(minutes=1), {webhook_id: 1})
    async with world.store.writing() as connection:
        values = {"url": f"{world.receiver.url}/ok"}
        await change_webhook(connection, world.users["ann@example.com"], webhook_id, values, None, None)
    assert await settle(world.store, due, Outcome(410, "answered 410", 1), now) == "pending"
    query = select(webhooks.c.state, webhooks.c.failing_since)
    async with world.store.reading() as connection:
        assert (await connection.execute(query)).one() == ("enabled", None)
    await world.live_on()
    assert await world.states("/ok") == {("delivered", 2): 2}


async def test_a_webhook_that_takes_nothing_for_five_days_is_disabled(world: World) -> None:
    await world.webhook("/fail")
    await world.happen()
    await world.live_on()
    assert await world.scalar(select(webhooks.c.state)) == "enabled"
    world.clock.ahead += timedelta(hours=60)
    await world.happen()
    await world.pass_over()
    assert await world.scalar(select(webhooks.c.state)) == "disabled"


async def test_a_receiver_that_asks_for_a_pause_gets_one_with_all_its_deliveries(world: World) -> None:
    webhook_id = await world.webhook("/busy1")
    await world.happen(n=1)
    await world.pass_over()
    await world.happen(n=2)
    for minutes in (0, 30, 29):
        world.clock.ahead += timedelta(minutes=minutes)
        await world.pass_over()
        assert len(world.receiver.tried) == 1
    world.clock.ahead += timedelta(minutes=2)
    await world.pass_over()  # the second is due longer, and finds it busy too
    assert [each.told["data"]["n"] for each in world.receiver.tried] == [1, 2]
    world.clock.ahead += timedelta(minutes=61)
    await world.pass_over()
    assert sorted(each.told["data"]["n"] for each in world.receiver.taken) == [1, 2]
    assert await world.scalar(select(webhooks.c.rests_until)) is not None
    async with world.store.writing() as connection:
        await change_webhook(connection, world.users["ann@example.com"], webhook_id, {}, None, True)
    assert await world.scalar(select(webhooks.c.rests_until)) is None


@pytest.mark.parametrize(
    ("status", "text", "seconds"),
    [
        (429, "120", 120), (503, " 7 ", 7), (500, "120", 0), (200, "120", 0), (503, "", 0), (503, "soon", 0),
        (503, "-5", 0), (503, "9" * 50, REST_S_MAX), (429, "Mon, 12 Jan 2026 12:00:30 GMT", 30),
        (429, "Mon, 12 Jan 2026 11:00:00 GMT", 0), (429, "Fri, 31 Dec 9999 23:59:59 GMT", REST_S_MAX),
    ],
)  # fmt: skip
def test_retry_after_is_heeded_within_a_bound(status: int, text: str, seconds: int) -> None:
    noon_s = datetime(2026, 1, 12, 12, tzinfo=UTC).timestamp()
    assert rest_asked(status, text, noon_s) == seconds


async def test_the_largest_event_makes_less_than_20_kb(world: World) -> None:
    """Standard Webhooks wants payloads below that. Data is bounded as JSON, in which this text is as long as can be."""
    await world.webhook("/ok")
    room = DATA_BYTES_MAX - len('{"n":""}')
    async with world.store.writing() as connection:
        data = {"n": "\u20ac" * (room // 3)}
        await connection.run_sync(record, "instance.created", world.users["ann@example.com"], data)
    await world.pass_over()
    (taken,) = world.receiver.taken
    assert DATA_BYTES_MAX < len(taken.body) < 20_000


async def test_what_is_dead_can_be_replayed(world: World) -> None:
    await world.webhook("/fail10")
    await world.happen()
    await world.live_on()
    assert await world.states("/fail10") == {("dead", 10): 1}
    async with world.store.writing() as connection:
        delivery_id = await connection.scalar(select(deliveries.c.id))
        await replay(connection, world.users["ann@example.com"], str(delivery_id))
    await world.pass_over()
    assert await world.states("/fail10") == {("delivered", 1): 1}
    assert len({each.id for each in world.receiver.tried}) == 1


async def test_a_sender_that_died_is_taken_over_and_its_late_outcome_counts_for_nothing(world: World) -> None:
    webhook_id = await world.webhook("/ok")
    await world.happen()
    lease = timedelta(seconds=60)
    (lost,) = await claim(world.store, world.clock(), lease, {webhook_id: 9})
    assert await claim(world.store, world.clock(), lease, {webhook_id: 9}) == []
    await world.pass_over()
    assert world.receiver.taken == []
    world.clock.ahead += timedelta(seconds=61)
    await world.pass_over()
    assert await world.states("/ok") == {("delivered", 2): 1}
    assert await settle(world.store, lost, Outcome(500, "answered 500", 1), world.clock()) == ""
    assert await world.states("/ok") == {("delivered", 2): 1}


async def test_many_senders_send_each_delivery_once(world: World) -> None:
    await world.webhook("/ok")
    for n in range(40):
        await world.happen(n=n)
    loopback = ("127.0.0.0/8",)
    others = [
        Sender(world.store, KEYRING, Posters(world.receiver, loopback), world.settings, world.clock) for _ in range(4)
    ]
    while sum(await asyncio.gather(*(sender.send_due() for sender in others))):
        await asyncio.gather(*(sender.idle() for sender in others))
    assert sorted(each.told["data"]["n"] for each in world.receiver.taken) == list(range(40))
    for sender in others:
        await sender.close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
        "http://0x7f.1:{port}/", "http://2130706433:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/",
        "http://0:{port}/", "http://localhost.:{port}/",
    ],
)  # fmt: skip
async def test_a_url_that_leads_inside_is_never_dialled(store: Store, url: str) -> None:
    async with Receiver().running() as receiver:
        world = World(store, receiver, allow=())
        await world.webhook(url.format(port=receiver.url.rpartition(":")[2]))
        await world.happen()
        await world.pass_over()
        await world.sender.close()
        assert (receiver.tried, receiver.canary_count) == ([], 0)
        error = str(await world.scalar(select(deliveries.c.error)))
        assert "not a public address" in error or "does not resolve" in error


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_each_attempt_judges_the_name_anew_and_dials_what_it_judged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was public when the webhook was made, and leads inside later, is not dialled."""
    asked: list[str] = []
    answers = iter([["127.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["169.254.169.254"], ["::1"]])

    def look_up(host: str) -> list[str]:
        asked.append(host)
        return next(answers)

    monkeypatch.setattr(resolver, "look_up", look_up)
    await world.webhook(f"http://hooks.example:{world.receiver.url.rpartition(':')[2]}/fail1")
    await world.happen()
    for attempt in range(1, 5):
        await world.pass_over()
        assert asked == ["hooks.example"] * attempt
        assert len(world.receiver.tried) == 1  # of four, one led where it may
        world.clock.ahead += timedelta(hours=9)
    error = str(await world.scalar(select(deliveries.c.error)))
    assert "not a public address" in error


async def test_all_secrets_sign_while_they_overlap(world: World) -> None:
    webhook_id = await world.webhook("/ok")
    given = [new_secret() for _ in range(3)]

    async def replace(secret: str, overlap_s: int) -> datetime | None:
        async with world.store.writing() as connection:
            sealed = KEYRING.seal(secret.encode(), context_of(webhook_id))
            user_id = world.users["ann@example.com"]
            return (await replace_secret(connection, user_id, webhook_id, sealed, overlap_s)).old_secret_until

    async def end_overlap(place: int) -> None:
        async with world.store.writing() as connection:
            stored = list((await connection.scalars(select(webhooks.c.old_secrets))).one())
            stored[place] = {**stored[place], "until": datetime.now(UTC).isoformat()}
            await connection.execute(update(webhooks).values(old_secrets=stored))

    first_until = await replace(given[0], 7_200)
    assert await replace(given[1], 3_600) == first_until
    assert await verified_by(world, SECRET, *given[:2]) == [True, True, True]
    await end_overlap(0)
    assert await verified_by(world, SECRET, *given[:2]) == [True, False, True]
    await end_overlap(1)
    assert await verified_by(world, SECRET, *given[:2]) == [False, False, True]
    assert await replace(given[2], 0) is None
    assert await verified_by(world, SECRET, *given) == [False, False, False, True]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_the_oldest_of_many_secrets_signs_no_more(world: World) -> None:
    webhook_id = await world.webhook("/ok")
    given = [new_secret() for _ in range(OLD_SECRETS_MAX + 1)]
    for secret in given:
        async with world.store.writing() as connection:
            sealed = KEYRING.seal(secret.encode(), context_of(webhook_id))
            await replace_secret(connection, world.users["ann@example.com"], webhook_id, sealed, 3_600)
    assert await verified_by(world, SECRET, *given) == [False] + [True] * len(given)


async def verified_by(world: World, *secrets: str) -> list[bool]:
    """Let something happen and tell by which secrets a receiver with a library verifies what it gets."""
    await world.happen()
    await world.pass_over()
    taken, found = world.receiver.taken[-1], []
    for secret in secrets:
        key = secret if secret.startswith("whsec_") else base64.b64encode(secret.encode()).decode()
        try:
            Webhook(key).verify(taken.body, taken.headers)
        except WebhookVerificationError:
            found.append(False)
        else:
            found.append(True)
    return found


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_an_answer_without_end_is_not_read(world: World) -> None:
    await world.webhook("/huge")
    await world.happen()
    await world.pass_over()
    assert await world.states("/huge") == {("delivered", 1): 1}  # its head said 200


def test_the_waits_are_those_of_standard_webhooks() -> None:
    total = sum((wait_after(n, 0.5) or timedelta() for n in range(1, len(WAITS_S) + 1)), timedelta())
    assert timedelta(hours=75) < total < timedelta(hours=76)
    assert wait_after(len(WAITS_S) + 1, 0.5) is None
    assert (wait_after(1, 0.0), wait_after(1, 1.0)) == (timedelta(seconds=4), timedelta(seconds=6))


def test_a_move_that_is_not_in_the_table_is_refused() -> None:
    assert set(MOVES.values()) <= {"pending", "sending", "delivered", "dead", "cancelled"}
    for state, move in (("delivered", "claim"), ("pending", "replay"), ("dead", "fail")):
        with pytest.raises(KeyError):
            after(state, move)  # type: ignore[arg-type]
