"""Migrations: once, whoever asks, and equal to the schema that the code uses."""

import asyncio
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select, text

import gpuproxy.store
from gpuproxy.errors import GatewayError
from gpuproxy.events.deliveries import OldSecret, old_secrets
from gpuproxy.ledger.catalogue import list_prices
from gpuproxy.pricing import Price
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import NEWEST, migrate, upgrade
from gpuproxy.store.schema import metadata, prices, webhooks


async def test_a_second_migration_has_nothing_to_do(store_url: str) -> None:
    assert await migrate(store_url) is True
    assert await migrate(store_url) is False


def test_the_newest_revision_is_the_last_file() -> None:
    config = Config()
    config.set_main_option("script_location", f"{gpuproxy.store.__path__[0]}/migrations")
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == NEWEST


async def test_migrations_make_the_schema_the_code_uses(store: Store) -> None:
    def differences(connection: Connection) -> list[object]:
        options = {"compare_type": True, "include_name": lambda name, kind, _: not is_part(name, kind)}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    def is_part(name: str | None, kind: str) -> bool:
        return kind == "table" and (name or "").startswith("receipts_")  # of the receipts on PostgreSQL

    async with store.reading() as connection:
        assert await connection.run_sync(differences) == []


def test_processes_that_migrate_at_once_do_not_disturb_each_other(store_url: str) -> None:
    code = f"import asyncio; from gpuproxy.store.migrate import migrate; print(asyncio.run(migrate({store_url!r})))"
    command = [sys.executable, "-W", "error", "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = sorted(process.communicate()[0].strip() for process in started)
    assert told == ["False", "False", "True"]


async def test_tasks_that_migrate_at_once_do_not_disturb_each_other(store_url: str) -> None:
    assert sorted(await asyncio.gather(*(migrate(store_url) for _ in range(3)))) == [False, False, True]


async def test_a_store_of_a_newer_version_is_refused(store: Store) -> None:
    async with store.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(GatewayError, match=r"schema 9999, newer than .* update gpuproxy"):
        await upgrade(store)


async def test_prices_that_were_set_outlive_their_new_primary_key(store_url: str) -> None:
    store = open_store(store_url)
    columns = "model, upstream, valid_from_ns, input_nanousd_per_million, cached_input_nanousd_per_million"
    columns += ", output_nanousd_per_million, request_nanousd, second_nanousd, created_at"
    async with store.writing() as connection:
        await connection.run_sync(_migrate_to, "0016")
        values = "'m', 'llm', 5, 1, 2, 3, 4, 6, '2026-01-02 03:04:05.000006'"
        await connection.execute(text(f"INSERT INTO prices ({columns}) VALUES ({values})"))
    assert await upgrade(store) is True
    assert await list_prices(store) == [Price("m", "llm", 1, 2, 3, 4, 6, 5)]
    async with store.reading() as connection:
        assert await connection.scalar(select(prices.c.created_at)) == datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
    await store.close()


async def test_an_old_secret_of_a_webhook_outlives_its_column(store_url: str) -> None:
    store = open_store(store_url)
    at = "'2026-01-02 03:04:05.000006'"
    columns = (
        "id, user_id, kind, url, description, state, disabled_reason, secret, old_secret, old_secret_until, created_at"
    )
    async with store.writing() as connection:
        await connection.run_sync(_migrate_to, "0023")
        await connection.execute(text(f"INSERT INTO users VALUES ('u', 'u@example.com', false, true, {at})"))
        values = f"'w', 'u', 'events', 'https://x', '', 'enabled', '', :new, :old, {at}, {at}"
        await connection.execute(
            text(f"INSERT INTO webhooks ({columns}) VALUES ({values})"), {"new": b"n", "old": b"o"}
        )
    assert await upgrade(store) is True
    async with store.reading() as connection:
        stored = await connection.scalar(select(webhooks.c.old_secrets))
    assert old_secrets(stored) == [OldSecret(b"o", datetime(2026, 1, 2, 3, 4, 5, 6, UTC))]
    await store.close()


def _migrate_to(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", f"{gpuproxy.store.__path__[0]}/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
