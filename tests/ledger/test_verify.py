"""Planted faults are found, each by its rule."""

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gpuproxy.access.accounts import create_user
from gpuproxy.ledger import holds
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.verify import verify
from gpuproxy.store.engine import Store

RECEIPT = (
    "INSERT INTO receipts (id, request_id, started_ns, duration_us, first_byte_us, user_id, key_id, protocol, upstream,"
    " model, method, path, status, outcome, error, request_bytes, response_bytes, input_tokens, cached_tokens,"
    " output_tokens, usage_source, attempts, is_stream, cost_nanousd, charge_id)"
    " VALUES ('r', '', 0, 0, 0, '', '', '', '', '', '', '', 200, 'ok', '', 0, 0, 0, 0, 0, 'none', 1, false, 7, 'c')"
)


async def unguarded(store: Store, connection: AsyncConnection) -> None:
    """Take away what keeps people from doing such things."""
    if store.is_sqlite:
        for action in ("update", "delete"):
            await connection.execute(text(f"DROP TRIGGER transfers_refuse_{action}"))
        await connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        await connection.execute(text("PRAGMA defer_foreign_keys = ON"))
    else:
        await connection.execute(text("SET LOCAL session_replication_role = replica"))
        checks = "SELECT conrelid::regclass, conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0"
        for table, name in (await connection.execute(text(checks))).all():
            await connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))


@pytest.fixture
async def user_id(store: Store) -> str:
    """Add a customer with 100 nanodollars, of which 40 are held."""
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 100, "start")
    async with store.writing() as connection:
        await connection.run_sync(holds.place, made, 40, "h")
    assert await verify(store) == []
    return made


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ("UPDATE transfers SET amount_nanousd = 101", {"a balance is the sum of its transfers"}),
        ("DELETE FROM transfers", {"a balance is the sum of its transfers"}),
        (
            "UPDATE accounts SET posted_nanousd = 99 WHERE kind = 'credit'",
            {"all accounts sum to nothing", "a balance is the sum of its transfers"},
        ),
        ("UPDATE accounts SET held_nanousd = 39 WHERE kind = 'credit'", {"what is held is the sum of the holds"}),
        ("UPDATE holds SET remaining_nanousd = 41", {"what is held is the sum of the holds",
                                                    "a hold is never charged more than was held"}),
        ("UPDATE holds SET posted_nanousd = 41", {"a hold is never charged more than was held"}),
        (
            "UPDATE accounts SET held_nanousd = 101 WHERE kind = 'credit'",
            {"what is held is the sum of the holds", "no customer spends more than they have"},
        ),
        (RECEIPT, {"calls cost what was posted for them"}),
    ],
)  # fmt: skip
async def test_a_planted_fault_is_found(store: Store, user_id: str, change: str, rules: set[str]) -> None:
    async with store.writing() as connection:
        await unguarded(store, connection)
        await connection.execute(text(change))
        if store.is_sqlite:
            await connection.execute(text("PRAGMA ignore_check_constraints = OFF"))
    assert {fault.rule for fault in await verify(store)} == rules


async def test_a_missing_leg_is_found(store: Store, user_id: str) -> None:
    async with store.engine.connect() as connection:
        if store.is_sqlite:
            await connection.execute(text("ROLLBACK"))
            await connection.execute(text("PRAGMA foreign_keys = OFF"))
            await connection.execute(text("BEGIN IMMEDIATE"))
        await unguarded(store, connection)
        await connection.execute(text("UPDATE transfers SET credit_account_id = 'nowhere'"))
        await connection.execute(text("COMMIT" if store.is_sqlite else "SELECT 1"))
        if store.is_sqlite:
            await connection.execute(text("PRAGMA foreign_keys = ON"))
            await connection.execute(text("BEGIN"))
        await connection.commit()
    assert {fault.rule for fault in await verify(store)} == {
        "a transfer has two legs and an amount",
        "a balance is the sum of its transfers",
    }
