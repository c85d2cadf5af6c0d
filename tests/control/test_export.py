"""Exports: complete, without secrets, in little memory, and visibly broken when they break."""

import asyncio
import csv
import io
import json
import os
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from sqlalchemy import insert, select

from gpuproxy.access.accounts import create_user
from gpuproxy.control import streams
from gpuproxy.control.parts import EXPORTING
from gpuproxy.ledger import history
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.holds import place, settle
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import audit, receipts, users
from gpuproxy.types import Receipt

from .conftest import Api, Person

OWN = "/api/v1/user/export"
ALL = "/api/v1/admin/export/users"
MANY = int(os.environ.get("GPUPROXY_EXPORT_ROWS", "12000"))
MEMORY_BYTES_MAX = 4 << 20


def calls(user_id: str, count: int) -> list[dict[str, Any]]:
    texts = dict.fromkeys(Receipt.__struct_fields__, "")
    counts = {name: 0 for name, kind in Receipt.__annotations__.items() if kind in ("int", int)}
    told = {"is_stream": False, "user_id": user_id, "outcome": "ok", "model": "m", "upstream": "llm"}
    return [
        {**texts, **counts, **told, "id": f"r{n:06}", "started_ns": n // 3 * 1_000, "duration_us": 3_600_000_000}
        | {"cost_nanousd": n}
        for n in range(count)
    ]


async def add_users(store: Store, count: int) -> None:
    now = datetime.now(UTC)
    rows = [
        {"id": f"u{n:06}", "email": f"u{n}@example.com", "is_admin": False, "is_active": True, "created_at": now}
        for n in range(count)
    ]
    async with store.writing() as connection:
        await connection.execute(insert(users), rows)


async def test_an_account_is_exported_whole_and_without_secrets(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ROWS_AT_ONCE", 2)
    person, other = await api.person(), await api.person()
    for owner in (person, other):
        await credit(api.store, owner.id, 10**10, owner.id)
    async with api.store.writing() as connection:
        hold = await connection.run_sync(place, person.id, 10**9, "h")
        await connection.run_sync(settle, hold.id, 10**9, "usage")
        await connection.execute(insert(receipts), calls(person.id, 5))
    async with api.client.get(OWN, headers=person.by_key) as answer:
        body = await answer.read()
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert answer.headers["Cache-Control"] == "no-store"
    told = json.loads(body)
    data = told["data"]
    assert (told["status"], data["profile"]["email"]) == ("success", person.email)
    assert [key["id"] for key in data["api_keys"]] == [person.key_id]
    assert [use["id"] for use in data["gpu_usage"]] == [f"r{n:06}" for n in range(5)]
    assert (data["gpu_usage"][4]["duration"], data["gpu_usage"][4]["cost_nanousd"]) == (1.0, 4)
    assert [each["amount"] for each in data["transactions"]] == [-1, 10]
    assert [each["amount"] for each in data["credit_history"]] == [10]
    assert data["credits"]["credits_remaining"] == 9
    for secret in (person.api_key, person.api_key[12:], "hash", "digest", other.id):
        assert secret.encode() not in body


async def test_all_users_are_exported_in_each_format(api: Api) -> None:
    admin = await api.person(is_admin=True)
    await add_users(api.store, 250)
    await credit(api.store, "u000007", 1_500_000_000, "one")
    async with api.client.get(ALL, headers=admin.by_token) as answer:
        told = json.loads(await answer.read())
    found = {user["id"]: user for user in told["data"]}
    assert (len(told["data"]), len(found), told["status"]) == (251, 251, "success")
    assert (found["u000007"]["credits_remaining"], found["u000008"]["credits_total"]) == (1.5, 0)
    assert [key["id"] for key in found[admin.id]["api_keys"]] == [admin.key_id]
    async with api.client.get(f"{ALL}?format=ndjson", headers=admin.by_token) as answer:
        lines = (await answer.read()).splitlines()
        assert answer.content_type == "application/x-ndjson"
    assert [json.loads(line) for line in lines] == told["data"]
    async with api.client.get(f"{ALL}?format=csv", headers=admin.by_token) as answer:
        rows = list(csv.DictReader(io.StringIO(await answer.text())))
    assert [row["id"] for row in rows] == [user["id"] for user in told["data"]]
    assert next(row for row in rows if row["id"] == "u000007")["credits_remaining"] == "1.50"
    status, refused = await api.call("GET", f"{ALL}?format=xml", headers=admin.by_token)
    assert (status, "known: json, ndjson, csv" in refused["error"]) == (422, True)
    async with api.store.reading() as connection:
        noted = (await connection.execute(select(audit.c.action, audit.c.detail))).all()
    assert [tuple(row) for row in noted] == [("users.export", {"format": each}) for each in ("json", "ndjson", "csv")]


async def test_a_cell_that_a_spreadsheet_would_run_is_text(api: Api) -> None:
    await create_user(api.store, "=cmd()@example.com")
    admin = await api.person(is_admin=True)
    async with api.client.get(f"{ALL}?format=csv", headers=admin.by_token) as answer:
        assert "'=cmd()@example.com" in await answer.text()


async def read_slowly(api: Api, path: str, person: Person) -> tuple[int, int]:
    """Return the size of an export and the most memory that Python held for it."""
    tracemalloc.start()
    try:
        async with api.client.get(path, headers=person.by_token) as answer:
            size = 0
            async for piece in answer.content.iter_chunked(65_536):
                size += len(piece)
        return size, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_many_rows_need_no_more_memory_than_few(api: Api) -> None:
    admin = await api.person(is_admin=True)
    await add_users(api.store, MANY // 4)
    async with api.store.writing() as connection:
        await connection.execute(insert(receipts), calls(admin.id, MANY))
    for path, size_min in ((ALL, MANY // 4 * 200), (OWN, MANY * 200)):
        size, memory = await read_slowly(api, path, admin)
        assert (size > size_min, memory < MEMORY_BYTES_MAX) == (True, True), (size, memory)


async def test_an_export_that_fails_on_its_way_ends_visibly_broken(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(store: Store) -> AsyncIterator[list[Any]]:
        yield [streams.PIECE_BYTES * "x"] * 3
        raise OSError("the store is away")

    monkeypatch.setattr("gpuproxy.control.export._records", failing)
    admin = await api.person(is_admin=True)
    for form in ("json", "ndjson"):
        async with api.client.get(f"{ALL}?format={form}", headers=admin.by_token) as answer:
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
    assert api.client.app is not None
    assert api.client.app[EXPORTING] == set()


async def test_an_export_that_fails_at_once_is_an_error_like_any_other(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(store: Store) -> AsyncIterator[list[Any]]:
        raise OSError("the store is away")
        yield []

    monkeypatch.setattr("gpuproxy.control.export._records", failing)
    admin = await api.person(is_admin=True)
    status, told = await api.call("GET", ALL, headers=admin.by_token)
    assert (status, told["code"]) == (503, "UNAVAILABLE")


async def test_one_export_of_an_account_runs_at_a_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def waiting(store: Store) -> AsyncIterator[list[Any]]:
        entered.set()
        await go_on.wait()
        yield []

    monkeypatch.setattr("gpuproxy.control.export._records", waiting)
    admin = await api.person(is_admin=True)
    first = asyncio.create_task(api.call("GET", ALL, headers=admin.by_token))
    await entered.wait()
    status, told = await api.call("GET", OWN, headers=admin.by_token)
    assert (status, told["code"]) == (409, "CONFLICT")
    go_on.set()
    assert await first == (200, {"data": [], "status": "success"})
    assert (await api.call("GET", OWN, headers=admin.by_token))[0] == 200
