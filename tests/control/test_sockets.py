"""``/ws``: who hears what, from when on, and what ends it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType, WSServerHandshakeError
from sqlalchemy import delete, insert, update

from gpuproxy.access import tokens
from gpuproxy.access.accounts import create_key, revoke_key
from gpuproxy.access.tickets import LIFETIME_S
from gpuproxy.access.tokens import LEEWAY_S
from gpuproxy.config import Config, build
from gpuproxy.control import events as control_events
from gpuproxy.control.events import watch_once
from gpuproxy.control.listener import CHANNELS_MAX, MESSAGES_PER_SECOND_MAX
from gpuproxy.control.parts import HUB, KEYRING, LISTENERS, STREAM
from gpuproxy.events.outbox import record
from gpuproxy.events.stream import BEGINNING, READ_MAX, Stream
from gpuproxy.store.schema import events, sessions, tickets

from .conftest import Api, Person

WAIT_S = 20
TICKET = "/api/v1/ws/ticket"


class Socket:
    """A client of ``/ws``."""

    def __init__(self, api: Api, socket: ClientWebSocketResponse) -> None:
        self._api = api
        self._socket = socket

    async def say(self, **message: Any) -> None:
        await self._socket.send_json(message)

    async def hear(self) -> Any:
        return await self._socket.receive_json(timeout=WAIT_S)

    async def subscribe(self, *channels: str, **more: Any) -> Any:
        await self.say(type="subscribe", channels=channels, **more)
        return await self.hear()

    async def code(self) -> int:
        """Return the code the connection is closed with, passing over what still comes."""
        while (message := await self._socket.receive(timeout=WAIT_S)).type is not WSMsgType.CLOSE:
            assert message.type is WSMsgType.TEXT
        return int(message.data)


async def happen(api: Api, name: str, user_id: str | None, **data: Any) -> str:
    async with api.store.writing() as connection:
        event_id = await connection.run_sync(record, name, user_id, data)
    await api.client.app[STREAM].poll_once()
    return event_id


@asynccontextmanager
async def connected(api: Api, path: str = "/ws", headers: dict[str, str] | None = None) -> AsyncIterator[Socket]:
    await api.client.app[STREAM].start()
    async with api.client.ws_connect(path, headers=headers) as socket:
        yield Socket(api, socket)


async def test_who_shows_nothing_hears_what_is_public_and_is_told_what_is_not(api: Api) -> None:
    async with connected(api) as socket:
        refused = await socket.subscribe("gpu_updates", "billing_events")
        assert (refused["type"], refused["payload"]["code"]) == ("error", "UNAUTHORIZED")
        assert "billing_events" in refused["payload"]["error"]
        told = {"channels": ["gpu_updates"], "last_event_id": ""}
        assert await socket.hear() == {"type": "subscribed", "payload": told}
        ann = await api.person()
        await happen(api, "payment.completed", ann.id, amount="1.00")
        event_id = await happen(api, "gpu.available", None, provider="vast.ai")
        event = await socket.hear()
        assert (event["type"], event["payload"], event["id"]) == ("gpu_available", {"provider": "vast.ai"}, event_id)


async def test_gpu_updates_can_be_made_private(
    store_url: str, api: Api, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuproxy.control.parts import CONFIG

    monkeypatch.setitem(api.client.app._state, CONFIG, build({"events": {"gpu_updates_public": False}}))
    async with connected(api) as socket:
        assert (await socket.subscribe("gpu_updates"))["payload"]["code"] == "UNAUTHORIZED"


@pytest.mark.parametrize("way", ["key", "token", "first message with key", "first message with token", "ticket"])
async def test_each_account_hears_its_own_alone_by_whatever_it_shows(api: Api, way: str) -> None:
    ann, bob = await api.person(), await api.person()
    headers = {"key": ann.by_key, "token": ann.by_token}.get(way)
    path = "/ws"
    if way == "ticket":
        status, made = await api.call("POST", TICKET, None, ann.by_token)
        assert status == 201
        path = f"/ws?ticket={made['ticket']}"
    async with connected(api, path, headers) as socket:
        if way.startswith("first"):
            await socket.say(type="auth", token=ann.api_key if way.endswith("key") else ann.access_token)
        if headers is None:
            assert await socket.hear() == {"type": "authenticated", "payload": {"user_id": ann.id}}
        await socket.subscribe("billing_events", "instance_events")
        await happen(api, "payment.completed", bob.id, whose="bob")
        await happen(api, "usage.recorded", ann.id, whose="ann")  # of another channel
        await happen(api, "payment.completed", ann.id, whose="ann")
        event = await socket.hear()
        assert (event["type"], event["payload"]) == ("payment_completed", {"whose": "ann"})


async def test_a_ticket_is_good_once_and_not_for_long(api: Api) -> None:
    ann = await api.person()
    _, used = await api.call("POST", TICKET, None, ann.by_key)
    async with connected(api, f"/ws?ticket={used['ticket']}") as socket:
        assert (await socket.hear())["type"] == "authenticated"
    _, old = await api.call("POST", TICKET, None, ann.by_key)
    async with api.store.writing() as connection:
        from datetime import timedelta

        past = tickets.c.expires_at
        row = (await connection.execute(tickets.select())).one()
        assert LIFETIME_S - 5 < (row.expires_at - api_now()).total_seconds() <= LIFETIME_S
        await connection.execute(update(tickets).values({past: row.expires_at - timedelta(seconds=LIFETIME_S)}))
    for ticket in (used["ticket"], old["ticket"], "gpw_nix"):
        async with connected(api, f"/ws?ticket={ticket}") as socket:
            assert (await socket.hear())["payload"]["code"] == "UNAUTHORIZED"
            assert (await socket.subscribe("gpu_updates"))["type"] == "subscribed"


def api_now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


async def test_a_wrong_credential_is_refused_before_the_upgrade(api: Api) -> None:
    ann = await api.person()
    key, _ = await create_key(api.store, ann.email, scopes=("inference",))
    for headers, status in (({"X-API-Key": "gp_wrong"}, 401), ({"X-API-Key": key}, 403)):
        with pytest.raises(WSServerHandshakeError) as caught:
            await api.client.ws_connect("/ws", headers=headers)
        assert caught.value.status == status


async def revoke_the_key(api: Api, ann: Person) -> None:
    await revoke_key(api.store, ann.key_id)


async def end_the_session(api: Api, ann: Person) -> None:
    async with api.store.writing() as connection:
        await connection.execute(update(sessions).values(revoked_at=api_now()))


@pytest.mark.parametrize(("by", "end"), [("by_key", revoke_the_key), ("by_token", end_the_session)])
async def test_a_revoked_credential_ends_the_stream(api: Api, by: str, end: Callable[..., Any]) -> None:
    ann = await api.person()
    async with connected(api, headers=getattr(ann, by)) as socket, connected(api) as other:
        await socket.subscribe("billing_events")
        await watch_once(api.client.app)
        await end(api, ann)
        await watch_once(api.client.app)
        await happen(api, "payment.completed", ann.id)
        assert (await socket.hear())["payload"]["code"] == "UNAUTHORIZED"
        assert await socket.code() == 1008
        assert (await other.subscribe("gpu_updates"))["type"] == "subscribed"


@pytest.mark.parametrize("way", ["token", "ticket"])
async def test_a_token_whose_time_is_over_ends_the_stream_unless_a_newer_one_came(
    api: Api, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await api.person()
    path, headers = "/ws", ann.by_token
    if way == "ticket":
        path, headers = f"/ws?ticket={(await api.call('POST', TICKET, None, ann.by_token))[1]['ticket']}", {}
    keyring = api.client.app[KEYRING]
    claims = tokens.read(keyring, ann.access_token)
    newer = tokens.sign(keyring, tokens.claims_for(ann.id, claims.sid, 10_000))
    now_s = [0.0]
    monkeypatch.setattr(control_events, "time", SimpleNamespace(time=lambda: now_s[0]))
    async with connected(api, path, headers) as socket:
        if way == "ticket":
            await socket.hear()
        await socket.subscribe("billing_events")
        now_s[0] = claims.exp + LEEWAY_S - 1
        await watch_once(api.client.app)
        await socket.say(type="auth", token=newer)
        assert await socket.hear() == {"type": "authenticated", "payload": {"user_id": ann.id}}
        now_s[0] = claims.exp + LEEWAY_S
        await watch_once(api.client.app)
        await happen(api, "payment.completed", ann.id)
        assert (await socket.hear())["type"] == "payment_completed"
        now_s[0] += 10_000
        await watch_once(api.client.app)
        assert (await socket.hear())["payload"]["code"] == "UNAUTHORIZED"
        assert await socket.code() == 1008


async def test_who_shows_another_credential_while_the_old_one_is_found_revoked_stays(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, keep = await api.person(), control_events.invalid_credentials
    async with connected(api, headers=ann.by_key) as socket:

        async def invalid_credentials(*words: Any) -> Any:
            found = await keep(*words)
            await socket.say(type="auth", token=ann.access_token)
            assert (await socket.hear())["type"] == "authenticated"
            return found

        await socket.subscribe("billing_events")
        await revoke_key(api.store, ann.key_id)
        monkeypatch.setattr(control_events, "invalid_credentials", invalid_credentials)
        await watch_once(api.client.app)
        await happen(api, "payment.completed", ann.id)
        assert (await socket.hear())["type"] == "payment_completed"


async def test_who_comes_back_hears_what_was_missed_once_and_in_order(api: Api) -> None:
    ann, bob = await api.person(), await api.person()
    first = await happen(api, "payment.completed", ann.id, n=0)
    count = READ_MAX + 50
    async with api.store.writing() as connection:
        for n in range(1, count):
            await connection.run_sync(record, "payment.completed", (ann if n % 2 else bob).id, {"n": n})
        await connection.run_sync(record, "instance.created", ann.id, {})
    async with connected(api, headers=ann.by_key) as socket:
        await socket.subscribe("billing_events", last_event_id=first)
        await happen(api, "payment.failed", ann.id, n=count)
        heard = [(await socket.hear())["payload"]["n"] for _ in range(count // 2 + 1)]
        assert heard == [*range(1, count, 2), count]


async def test_what_is_stored_and_not_yet_published_is_heard_once_by_who_comes_back(api: Api) -> None:
    ann = await api.person()
    first = await happen(api, "payment.completed", ann.id, n=0)
    async with connected(api, headers=ann.by_key) as socket:
        async with api.store.writing() as connection:
            await connection.run_sync(record, "payment.completed", ann.id, {"n": 1})
        await socket.subscribe("billing_events", last_event_id=first)
        await happen(api, "payment.completed", ann.id, n=2)
        assert [(await socket.hear())["payload"]["n"] for _ in range(2)] == [1, 2]
        await socket.say(type="ping")
        assert (await socket.hear())["type"] == "pong"


async def test_who_has_heard_nothing_yet_knows_where_to_go_on(api: Api) -> None:
    ann, bob = await api.person(), await api.person()

    async def begin(person: Person | None, *channels: str, **more: Any) -> tuple[str, list[Any]]:
        """Return from where a subscription says it begins, and what it brings."""
        async with connected(api, headers=person.by_key if person else None) as socket:
            begins = (await socket.subscribe(*channels, **more))["payload"]["last_event_id"]
            await socket.say(type="ping")
            heard = []
            while (told := await socket.hear())["type"] != "pong":
                heard.append(told["payload"])
            return begins, heard

    assert [(await begin(who, "gpu_updates"))[0] for who in (None, ann)] == ["", BEGINNING]
    await happen(api, "payment.completed", ann.id, n=0)
    assert await begin(ann, "billing_events", last_event_id=BEGINNING) == (BEGINNING, [{"n": 0}])
    offered = await happen(api, "gpu.available", None)
    assert [(await begin(who, "gpu_updates"))[0] for who in (None, bob)] == [offered, offered]
    mine = await happen(api, "payment.failed", ann.id, n=1)
    assert await begin(ann, "billing_events") == (mine, [])
    assert (await begin(bob, "billing_events", last_event_id=mine))[0] == offered
    await happen(api, "payment.failed", ann.id, n=2)
    assert await begin(ann, "billing_events", last_event_id=mine) == (mine, [{"n": 2}])
    assert (await begin(None, "gpu_updates", last_event_id=BEGINNING))[1][0]["code"] == "NOT_FOUND"


async def test_an_event_that_is_kept_no_more_is_told_and_the_present_goes_on(api: Api) -> None:
    ann, bob = await api.person(), await api.person()
    others = await happen(api, "payment.completed", bob.id)
    async with connected(api, headers=ann.by_key) as socket:
        for event_id in ("evt_gone", others):
            assert (await socket.subscribe("billing_events", last_event_id=event_id))["type"] == "subscribed"
            assert (await socket.hear())["payload"]["code"] == "NOT_FOUND"
        await happen(api, "payment.failed", ann.id)
        assert (await socket.hear())["type"] == "payment_failed"


async def test_who_leaves_while_its_message_is_at_work_is_forgotten(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, asked, answers = await api.person(), asyncio.Event(), asyncio.Event()

    async def place_of(*_: object) -> None:
        asked.set()
        await answers.wait()

    monkeypatch.setattr(api.client.app[STREAM], "place_of", place_of)
    async with asyncio.timeout(WAIT_S), connected(api, headers=ann.by_key) as socket:
        await socket.say(type="subscribe", channels=["gpu_updates"], last_event_id="evt_1")
        await asked.wait()
        (listener,) = api.client.app[LISTENERS]
        listener.socket._transport.abort()
        await listener.socket.closed()
        answers.set()
        while listener.socket._is_busy:
            await asyncio.sleep(0)
    assert not api.client.app[HUB]._by_channel


async def test_who_reads_too_slowly_is_cut_off_with_1013_and_nobody_waits_for_it(api: Api) -> None:
    ann, bob = await api.person(), await api.person()
    async with connected(api, headers=ann.by_key) as slow, connected(api, headers=bob.by_key) as other:
        for socket in (slow, other):
            await socket.subscribe("billing_events")
        (listener,) = (each for each in api.client.app[LISTENERS] if each.holder and each.holder.user_id == ann.id)
        until = time.monotonic() + WAIT_S
        while not listener._consumer.is_over:  # it does not read, and what the system buffers is finite
            for _ in range(50):
                await _happen_to(api, ann, "x" * 15_000)
            await asyncio.sleep(0)
            assert time.monotonic() < until
        await happen(api, "payment.completed", bob.id, n=1)
        assert (await other.hear())["payload"] == {"n": 1}
        assert await slow.code() == 1013


async def _happen_to(api: Api, person: Person, text: str) -> None:
    """Publish without a store: it is the reader that is tested."""
    from gpuproxy.control.parts import HUB
    from gpuproxy.events.stream import Event

    api.client.app[HUB].publish(Event(1, "evt_1", "payment.completed", person.id, {"x": text}, api_now()))
    await asyncio.sleep(0)


async def test_noise_is_complained_about_and_does_not_close(api: Api) -> None:
    async with connected(api) as socket:
        await socket.say(type="ping")
        assert (await socket.hear())["type"] == "pong"
        for noise in (
            {"type": "dance"},
            {"channels": []},
            {"type": "subscribe", "channels": []},
            {"type": "subscribe", "channels": ["x"] * (CHANNELS_MAX + 1)},
        ):
            await socket.say(**noise)
            assert (await socket.hear())["type"] == "error"
        told = await socket.subscribe("nix")
        assert (told["payload"]["code"], "gpu_updates" in told["payload"]["error"]) == ("UNKNOWN_CHANNEL", True)
        await socket.say(type="unsubscribe", channels=["gpu_updates"])
        assert (await socket.hear())["type"] == "unsubscribed"


async def test_who_talks_without_end_is_closed(api: Api) -> None:
    async with connected(api) as socket:
        for _ in range(2 * MESSAGES_PER_SECOND_MAX + 1):
            await socket.say(type="ping")
        assert await socket.code() == 1008


async def test_all_places_taken_is_told_before_the_upgrade(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuproxy.control.parts import CONFIG

    monkeypatch.setitem(api.client.app._state, CONFIG, build({"events": {"sockets_max": 1}}))
    async with connected(api) as socket:
        await socket.subscribe("gpu_updates")
        with pytest.raises(WSServerHandshakeError) as caught:
            await api.client.ws_connect("/ws")
        assert caught.value.status == 503


async def test_an_event_that_is_committed_after_a_later_one_is_published_too(api: Api) -> None:
    published: list[int] = []
    stream = Stream(api.store, lambda event: published.append(event.seq), Config().events)
    await stream.start()
    row = {"name": "gpu.available", "user_id": None, "data": {}, "at": api_now()}
    for seq in (5, 7, 6, 9, 8, 10):  # as transactions that began in order and committed so
        async with api.store.writing() as connection:
            await connection.execute(insert(events).values(seq=seq, id=f"evt_{seq}", **row))
        await stream.poll_once()
    assert published == [5, 7, 6, 9, 8, 10]
    place = await stream.place_of("evt_7", None)
    assert place is not None
    mark = stream.mark()
    assert [event.seq for event in await stream.missed(place, mark, None, ["gpu.available"])] == [6]
    assert [event.seq for event in await stream.after(7, mark, None, ["gpu.available"])] == [8, 9, 10]
    fresh = Stream(api.store, lambda event: published.append(event.seq), Config().events)
    await fresh.start()
    async with api.store.writing() as connection:
        await connection.execute(insert(events).values(seq=3, id="evt_3", **row))  # was under way when it started
    await fresh.poll_once()
    assert published[6:] == [3]
    async with api.store.writing() as connection:
        await connection.execute(delete(events))
