"""Sums of what calls used: only for whom somebody wants it, each charge in one event, whatever comes between."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from postgres import who_waits
from sqlalchemy import select, update

from gpuproxy.access.accounts import create_user
from gpuproxy.events import usage
from gpuproxy.events.usage import TOKENS_MAX, WANTED, Charged
from gpuproxy.events.webhooks import Draft, add_webhook, change_webhook
from gpuproxy.ledger.batch import priced
from gpuproxy.ledger.open_calls import Notes
from gpuproxy.ledger.writer import open_writer, write_storable
from gpuproxy.pricing import Catalogue, Price
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import events, usage_sums
from gpuproxy.types import Receipt

CATALOGUE = Catalogue([Price("m1", request_nanousd=10)])
NOON = datetime(2026, 1, 12, 12, tzinfo=UTC)
LATER = NOON + timedelta(seconds=10)


class Sums:
    """A store with two customers."""

    def __init__(self, store: Store, ann: str, bob: str) -> None:
        self.store, self.ann, self.bob = store, ann, bob
        self._writer = open_writer(store)
        self._count = 0

    async def do(self, work: Any, *arguments: Any) -> Any:
        async with self.store.writing() as connection:
            return await connection.run_sync(work, *arguments)

    async def charge(self, *user_ids: str, input_tokens: int = 5, output_tokens: int = 7) -> None:
        """Store calls that cost 10 nanodollars each."""
        rows = []
        for user_id in user_ids:
            self._count += 1
            call = Receipt(
                f"r{self._count}", "q", 10**18, 1, 1, user_id, "k", "openinference", "llm", "m1", "POST", "/v1/x",
                200, "ok", "", 100, 1_000, input_tokens, 0, output_tokens, "provider", 1, False, 0,
            )  # fmt: skip
            rows.append(msgspec.structs.astuple(call))
        batch = priced(CATALOGUE, [("lease:x/1", rows)], {}, Notes())
        await write_storable(self._writer, batch)

    def close(self) -> None:
        self._writer.close()

    async def told(self) -> list[tuple[str | None, int, int]]:
        query = select(events.c.user_id, events.c.data).where(events.c.name == usage.NAME).order_by(events.c.seq)
        async with self.store.reading() as connection:
            rows = (await connection.execute(query)).all()
        return [(row.user_id, row.data["calls"], row.data["cost_nanousd"]) for row in rows]

    async def summed(self) -> list[str]:
        async with self.store.reading() as connection:
            return list(await connection.scalars(select(usage_sums.c.user_id)))


@pytest.fixture
async def sums(store: Store) -> AsyncIterator[Sums]:
    made = Sums(store, *[(await create_user(store, f"{name}@example.com")).id for name in ("ann", "bob")])
    yield made
    made.close()


async def test_only_who_is_wanted_is_summed_up_and_told_once(sums: Sums) -> None:
    await sums.do(usage.want, sums.ann, NOON)
    await sums.charge(*((sums.ann, sums.bob)[n % 2] for n in range(4)))
    await sums.charge(sums.ann)
    now = datetime.now(UTC)
    assert await sums.do(usage.tell_due, NOON, now) == 0
    assert await sums.do(usage.tell_due, now, now) == 1
    assert await sums.do(usage.tell_due, now + timedelta(days=9), now) == 0
    assert await sums.told() == [(sums.ann, 3, 30)]


async def test_a_charge_after_the_telling_begins_another_sum(sums: Sums) -> None:
    await sums.do(usage.want, sums.ann, NOON)
    for at in (NOON, LATER):
        await sums.do(usage.add, {sums.ann: Charged(1, 2, 3, 4)}, at)
        await sums.do(usage.add, {sums.ann: Charged(1, 2, 3, 4)}, at + timedelta(seconds=5))
        assert not await usage.is_any_due(sums.store, at - timedelta(seconds=1))
        assert await usage.is_any_due(sums.store, at)
        assert await sums.do(usage.tell_due, at, at + timedelta(seconds=6)) == 1
    assert await sums.told() == [(sums.ann, 2, 8)] * 2


async def test_a_sum_holds_whatever_an_upstream_claims(sums: Sums) -> None:
    await sums.do(usage.want, sums.ann, NOON)
    await sums.charge(sums.ann, input_tokens=1 << 80, output_tokens=-1)
    async with sums.store.reading() as connection:
        row = (await connection.execute(select(usage_sums))).one()
    assert (row.input_tokens, row.output_tokens) == (TOKENS_MAX, 0)


async def test_who_is_wanted_no_more_is_forgotten_but_not_what_a_webhook_wants(sums: Sums) -> None:
    draft = Draft("whk_1", "events", "https://x.example/", ("usage.recorded",), "", b"")
    async with sums.store.writing() as connection:
        await add_webhook(connection, sums.ann, draft, 9)
    await sums.do(usage.want, sums.bob, NOON)
    await sums.do(usage.want, sums.bob, NOON - timedelta(days=1))  # an older wish shortens none
    await sums.do(usage.forget_unwanted, NOON + WANTED - timedelta(seconds=1))
    assert sorted(await sums.summed()) == sorted([sums.ann, sums.bob])
    much_later = datetime.now(UTC) + 2 * WANTED
    await sums.do(usage.forget_unwanted, much_later)
    assert await sums.summed() == [sums.ann]
    async with sums.store.writing() as connection:
        await change_webhook(connection, sums.ann, "whk_1", {}, None, False)
    await sums.do(usage.forget_unwanted, much_later)
    assert await sums.summed() == []


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_a_sum_is_told_while_a_webhook_is_made(sums: Sums) -> None:
    await sums.do(usage.want, sums.ann, NOON)
    await sums.charge(sums.ann)
    draft = Draft("whk_1", "events", "https://example.com/", (usage.NAME,), "", b"")
    async with sums.store.writing() as connection:
        await connection.execute(update(usage_sums).values(wanted_until=NOON))  # as who tells has it locked
        making = asyncio.create_task(_made(sums, draft))
        await who_waits(sums.store)
        await connection.run_sync(usage.tell_due, datetime.now(UTC) + WANTED, LATER)
    await making
    assert await sums.told() == [(sums.ann, 1, 10)]


async def _made(sums: Sums, draft: Draft) -> None:
    async with sums.store.writing() as connection:
        await add_webhook(connection, sums.ann, draft, 3)
