"""The outbox: an event and its cause, together or not at all."""

import pytest
from sqlalchemy import func, select

from gpuproxy.access.accounts import create_user
from gpuproxy.events.outbox import record
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import events


async def test_an_event_keeps_its_order_and_data(store: Store) -> None:
    user = await create_user(store, "a@example.com")
    async with store.writing() as connection:
        first = await connection.run_sync(record, "payment.completed", user.id, {"amount_usd": "1.50"})
        second = await connection.run_sync(record, "gpu.available", None, {"provider": "vast.ai"})
    async with store.reading() as connection:
        rows = (await connection.execute(select(events).order_by(events.c.seq))).all()
    assert [(row.id, row.name, row.user_id, row.data) for row in rows] == [
        (first, "payment.completed", user.id, {"amount_usd": "1.50"}),
        (second, "gpu.available", None, {"provider": "vast.ai"}),
    ]


async def test_an_event_whose_cause_fails_never_was(store: Store) -> None:
    async def fail() -> None:
        async with store.writing() as connection:
            await connection.run_sync(record, "payment.failed", None, {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    async with store.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(events)) == 0
