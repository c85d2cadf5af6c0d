"""The management API: its answers, its errors, its health, its usage, its socket."""

import asyncio
import shutil
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestClient
from postgres import who_waits
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from gpuproxy import __version__, config
from gpuproxy.access.accounts import create_key, create_user, revoke_key, set_active
from gpuproxy.control import changes as control_changes
from gpuproxy.control.app import application
from gpuproxy.control.changes import KEPT, ChangeFeed
from gpuproxy.control.metrics import GAUGES_READ
from gpuproxy.control.parts import CONFIG, INGEST, STOPPING
from gpuproxy.fleet.moves import announce
from gpuproxy.fleet.parts import Fleet
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.link.server import LinkServer
from gpuproxy.proxy.journal import frame
from gpuproxy.store import engine
from gpuproxy.store.engine import Store, connect_postgresql, open_store
from gpuproxy.store.schema import api_keys, changes
from gpuproxy.types import Receipt

Client = TestClient[web.Request, web.Application]
EMAIL = "ann@example.com"


@pytest.fixture
async def client(store: Store, aiohttp_client: Callable[[web.Application], Awaitable[Client]]) -> Client:
    return await aiohttp_client(application(store, asyncio.Event()))


@pytest.fixture
async def key(store: Store, tmp_path: Path) -> str:
    """Return the key of a user with three calls."""
    user = await create_user(store, EMAIL)
    secret, made = await create_key(store, EMAIL)
    ingest = Ingest(store, tmp_path / "journal")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "a.log").write_bytes(frame([_receipt(n, user.id, made.id) for n in range(3)]))
    await ingest.ingest_once()
    ingest.close()
    return secret


def _receipt(number: int, user_id: str, key_id: str) -> Receipt:
    return Receipt(
        f"r{number}", "q", 10**18 + number, 1, 1, user_id, key_id, "openinference", "llm", "m1", "POST", "/v1/x",
        200, "ok", "", 100, 1_000, 10, 4, 20, "provider", 1, False,
    )  # fmt: skip


async def _error(answer: Any) -> tuple[int, str, str]:
    body = await answer.json()
    assert set(body) == {"error", "code", "request_id"}
    return answer.status, body["code"], body["error"]


async def test_health_has_the_shape_of_the_guide(client: Client) -> None:
    answer = await client.get("/health")
    body = await answer.json()
    assert datetime.fromisoformat(body.pop("timestamp")).tzinfo is not None
    assert body == {
        "status": "ok",
        "version": __version__,
        "services": {
            "database": "healthy",
            "redis": "not_configured",
            "vast_ai": "not_configured",
            "io_net": "not_configured",
        },
    }


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_store_that_is_away_degrades_health_but_not_readiness(
    store: Store, client: Client, tmp_path: Path
) -> None:
    await take_away(store, tmp_path)
    body = await (await client.get("/health")).json()
    assert (body["status"], body["services"]["database"]) == ("degraded", "unhealthy")
    assert (await client.get("/health/ready")).status == 200


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_store_that_is_away_makes_no_key_invalid(
    store: Store, client: Client, key: str, tmp_path: Path
) -> None:
    await take_away(store, tmp_path)
    answer = await client.get("/api/v1/user/usage", headers={"X-API-Key": key})
    assert await _error(answer) == (503, "UNAVAILABLE", "the store is away")
    assert answer.headers["Retry-After"] == "2"


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("word", ["pg_terminate_backend", "pg_cancel_backend"])
async def test_a_store_that_breaks_off_is_away_and_no_fault_of_the_gateway(
    store: Store, client: Client, key: str, word: str
) -> None:
    other = await connect_postgresql(store)
    try:
        async with other.transaction():
            await other.execute("LOCK TABLE receipts IN ACCESS EXCLUSIVE MODE")
            asked = asyncio.create_task(client.get("/api/v1/user/usage", headers={"X-API-Key": key}))
            await other.execute(f"SELECT {word}($1)", await who_waits(store))
            assert await _error(await asked) == (503, "UNAVAILABLE", "the store is away")
    finally:
        await other.close()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_who_waits_in_vain_for_what_another_has_locked_is_told_so(
    store: Store, client: Client, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 100)
    impatient = open_store(store.engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    async with store.writing() as connection:
        await connection.execute(text("LOCK TABLE receipts IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            async with impatient.reading() as other:
                await other.execute(text("SELECT 1 FROM receipts"))
    await impatient.close()


async def take_away(store: Store, directory: Path) -> None:
    """Put a folder where the database was."""
    await store.close()
    (directory / "gpuproxy.db").rename(directory / "away")
    (directory / "gpuproxy.db").mkdir()


async def test_a_stopping_gateway_is_alive_but_not_ready(client: Client) -> None:
    assert (await client.get("/health/ready")).status == 200
    client.app[STOPPING].set()
    answer = await client.get("/health/ready")
    assert await _error(answer) == (503, "UNAVAILABLE", "the gateway is stopping")
    assert answer.headers["Retry-After"] == "5"
    assert (await client.get("/health/live")).status == 200


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_store_that_answers_and_takes_nothing_is_degraded(store: Store, client: Client, tmp_path: Path) -> None:
    ingest = Ingest(store, tmp_path)
    with pytest.warns(DeprecationWarning, match="Changing state"):  # as the process does before it serves
        client.app[INGEST] = ingest
    assert (await (await client.get("/health")).json())["status"] == "ok"
    ingest.is_failing = True
    answer = await client.get("/health")
    body = await answer.json()
    assert (answer.status, body["status"], body["services"]["database"]) == (200, "degraded", "degraded")


async def test_without_room_for_receipts_the_gateway_is_unhealthy(client: Client) -> None:
    limit = client.app[CONFIG].journal.bytes_max
    client.app[GAUGES_READ].set("gpuproxy_journal_bytes", lambda: {(): float(limit)})
    assert (await client.get("/health")).status == 200
    client.app[GAUGES_READ].set("gpuproxy_journal_bytes", lambda: {(): limit + 1.0})
    await refuses_calls(client)


async def test_without_a_free_block_on_the_disk_too(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    await refuses_calls(client)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_while_what_the_disk_refused_is_not_stored_too(store: Store, client: Client, tmp_path: Path) -> None:
    ingest = Ingest(store, tmp_path)
    with pytest.warns(DeprecationWarning, match="Changing state"):
        client.app[INGEST] = ingest
    (tmp_path / "a-1.log").touch(0o400)
    ingest._discover()
    await refuses_calls(client)
    ingest.close()


async def refuses_calls(client: Client) -> None:
    answer = await client.get("/health")
    body = await answer.json()
    assert (answer.status, body["status"], body["services"]["journal"]) == (503, "unhealthy", "unhealthy")
    assert (await _error(await client.get("/health/ready")))[:2] == (503, "JOURNAL_FULL")
    assert (await client.get("/health/live")).status == 200


async def test_the_root_tells_name_and_version(client: Client) -> None:
    assert await (await client.get("/")).json() == {"name": "gpuproxy", "version": __version__}


async def test_no_answer_tells_what_it_is_built_with(client: Client) -> None:
    for path in ("/", "/nix", "/ws"):
        assert (await client.get(path)).headers["Server"] == "gpuproxy"


async def test_an_unknown_path_is_an_error_in_the_one_shape(client: Client) -> None:
    answer = await client.get("/api/v1/nix", headers={"X-Request-Id": "abc"})
    assert await answer.json() == {"error": "no path /api/v1/nix", "code": "NOT_FOUND", "request_id": "abc"}
    assert answer.status == 404


async def test_a_wrong_method_is_told_the_right_ones(client: Client) -> None:
    answer = await client.post("/health")
    assert answer.headers["Allow"] == "GET,HEAD"
    assert await _error(answer) == (405, "METHOD_NOT_ALLOWED", "/health serves GET, HEAD, not POST")


async def test_a_request_without_an_id_gets_one(client: Client) -> None:
    body = await (await client.get("/nix")).json()
    assert uuid.UUID(body["request_id"])


async def test_an_unexpected_failure_is_logged_once_and_tells_the_client_nothing(
    store: Store, aiohttp_client: Callable[[web.Application], Awaitable[Client]]
) -> None:
    async def broken(_request: web.Request) -> web.Response:
        raise RuntimeError("the secret inner state")

    app = application(store, asyncio.Event())
    app.router.add_get("/broken", broken)
    client = await aiohttp_client(app)
    with capture_logs() as lines:
        answer = await client.get("/broken", headers={"X-Request-Id": "abc"})
    assert [(line["event"], line["request_id"], line["exc_info"]) for line in lines] == [
        ("request failed", "abc", True)
    ]
    status, code, message = await _error(answer)
    assert (status, code) == (500, "INTERNAL")
    assert "secret" not in message


@pytest.mark.parametrize(
    "header", [("X-API-Key", "{}"), ("Authorization", "Bearer {}"), ("authorization", "bearer  {}")]
)
async def test_usage_is_shown_to_the_owner_of_the_key(client: Client, key: str, header: tuple[str, str]) -> None:
    answer = await client.get("/api/v1/user/usage", headers={header[0]: header[1].format(key)})
    body = await answer.json()
    assert (answer.status, body["status"]) == (200, "success")
    assert body["data"] == {name: value for name, value in body.items() if name not in ("data", "status")}
    assert (body["requests"], body["input_tokens"], body["cached_tokens"], body["output_tokens"]) == (3, 30, 12, 60)
    assert (body["cost"], body["cost_nanousd"], body["by_model"][0]["cost"]) == (0, 0, 0)
    assert [each["model"] for each in body["by_model"]] == ["m1"]


async def test_usage_can_be_narrowed_and_grouped(client: Client, key: str) -> None:
    headers = {"X-API-Key": key}
    query = {"since": "2001-09-09T01:46:40Z", "until": "2001-09-10", "group_by": "day"}
    body = await (await client.get("/api/v1/user/usage", params=query, headers=headers)).json()
    assert [(group["day"], group["requests"]) for group in body["groups"]] == [("2001-09-09", 3)]
    for query, count in (({"since": "2001-09-10"}, 0), ({"since": "9999-12-31"}, 0), ({"until": "9999-12-31"}, 3)):
        narrowed = await (await client.get("/api/v1/user/usage", params=query, headers=headers)).json()
        assert narrowed["requests"] == count


async def test_calls_are_listed_newest_first_with_their_count(client: Client, key: str) -> None:
    body = await (await client.get("/api/v1/user/usage/calls?limit=2", headers={"X-API-Key": key})).json()
    assert ([call["id"] for call in body["data"]], body["count"], body["status"]) == (["r2", "r1"], 2, "success")


@pytest.mark.parametrize(
    "path",
    [
        "usage?since=yesterday", "usage?until=2024-13-01", "usage?group_by=user", "usage/calls?limit=0",
        "usage/calls?limit=1001", "usage/calls?limit=-1", "usage/calls?limit=x", "usage/calls?limit=",
        "usage/calls?limit=%C2%B2", "usage/calls?limit=99999999999999",
        "usage/calls?limit=0000000011000000", f"usage/calls?limit={'1' * 5_000}",
    ],
)  # fmt: skip
async def test_a_bad_parameter_is_named(client: Client, key: str, path: str) -> None:
    answer = await client.get(f"/api/v1/user/{path}", headers={"X-API-Key": key})
    status, code, message = await _error(answer)
    assert (status, code) == (422, "UNPROCESSABLE")
    assert message.startswith(path.partition("?")[2].partition("=")[0])


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-API-Key": "gp_x"}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer "}, {"X-API-Key": "\xe4"}],
)
async def test_who_shows_no_valid_key_is_refused(client: Client, headers: dict[str, str]) -> None:
    answer = await client.get("/api/v1/user/usage", headers=headers)
    status, code, _ = await _error(answer)
    assert (status, code, answer.headers["WWW-Authenticate"]) == (401, "UNAUTHORIZED", "Bearer")


async def test_a_revoked_key_is_refused_at_once(client: Client, store: Store, key: str) -> None:
    async with store.reading() as connection:
        key_id = await connection.scalar(text("SELECT id FROM api_keys"))
    await revoke_key(store, key_id)
    answer = await client.get("/api/v1/user/usage", headers={"X-API-Key": key})
    assert (await _error(answer))[:2] == (401, "UNAUTHORIZED")


async def test_health_needs_no_key_and_minds_no_wrong_one(client: Client) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        for headers in ({}, {"X-API-Key": "gp_wrong"}, {"Authorization": "Basic x"}):
            assert (await client.get(path, headers=headers)).status == 200


async def test_a_stopping_gateway_says_goodbye_on_its_sockets(client: Client) -> None:
    async with client.ws_connect("/ws") as socket:
        await client.app.shutdown()
        message = await socket.receive()
    assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)


async def test_what_any_process_revokes_reaches_the_link(store: Store, key: str) -> None:
    link = LinkServer(_nobody, 1, 60)
    feed = ChangeFeed(store, link)
    await feed.start(60)
    assert await feed.poll_once() == 0
    await set_active(store, EMAIL, False)
    assert await feed.poll_once() == 1
    assert await feed.poll_once() == 0
    assert len(link.remembered()) == 1


async def test_a_user_let_in_again_is_remembered_as_blocked_by_no_control(store: Store, key: str) -> None:
    link = LinkServer(_nobody, 1, 60)
    feed = ChangeFeed(store, link)
    await feed.start(60)
    await set_active(store, EMAIL, False)
    await feed.poll_once()
    await set_active(store, EMAIL, True)
    await feed.poll_once()
    assert link.remembered() == ()
    successor = LinkServer(_nobody, 1, 60)
    await ChangeFeed(store, successor).start(60)
    assert successor.remembered() == ()


async def test_a_key_that_expires_reaches_the_link(store: Store, key: str) -> None:
    link = LinkServer(_nobody, 1, 60)
    feed = ChangeFeed(store, link)
    await feed.start(60)
    assert await feed.poll_once() == 0
    async with store.writing() as connection:
        await connection.execute(update(api_keys).values(expires_at=datetime.now(UTC)))
    assert [await feed.poll_once() for _ in range(2)] == [1, 0]
    assert len(link.remembered()) == 1


async def test_workers_forget_machines_as_soon_as_they_have_changed(
    store: Store, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_changes, "POLL_S", 3_600.0)
    link, told, stopping = LinkServer(_nobody, 1, 60), asyncio.Event(), asyncio.Event()
    link.forget_machines = lambda user_ids: told.set()  # type: ignore[method-assign]
    feed, fleet = ChangeFeed(store, link), Fleet(store, {}, config.Fleet())
    await feed.start(60)
    fleet.written = feed.wake
    running = asyncio.create_task(feed.run(stopping))
    try:
        await asyncio.sleep(0)
        await fleet.write(announce, "a user")
        async with asyncio.timeout(10):
            await told.wait()
    finally:
        stopping.set()
        await running


async def test_a_new_control_knows_what_was_revoked_while_there_was_none(store: Store, key: str) -> None:
    await set_active(store, EMAIL, False)
    link = LinkServer(_nobody, 1, 60)
    await ChangeFeed(store, link).start(60)
    assert len(link.remembered()) == 1


async def test_changes_are_kept_for_as_long_as_a_control_looks_back(store: Store, key: str) -> None:
    await set_active(store, EMAIL, False)
    async with store.writing() as connection:
        await connection.execute(update(changes).values(at=datetime.now(UTC) - KEPT - timedelta(hours=1)))
    for remember_s, count in ((KEPT.total_seconds(), 0), (60, 1)):
        feed = ChangeFeed(store, LinkServer(_nobody, 1, 60))
        await feed.start(remember_s)
        assert await feed.forget() == count


async def _nobody(_digest: bytes) -> None:
    return None
