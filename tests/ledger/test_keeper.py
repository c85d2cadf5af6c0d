"""What is done for money while control runs."""

import asyncio
from pathlib import Path

import pytest
from journals import frame, receipt
from structlog.testing import capture_logs

from gpuproxy import config
from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.ledger.book import balance, credit
from gpuproxy.ledger.catalogue import add_price
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.keeper import Keeper, limit_per_minute
from gpuproxy.ledger.leases import Leases
from gpuproxy.ledger.verify import verify
from gpuproxy.link.messages import STREAMS, TOKENS, Lease, Return
from gpuproxy.pricing import Price
from gpuproxy.store.engine import Store


async def no_limit(_user_id: str, _key_id: str) -> int:
    return 0


class Control:
    """The money parts of control."""

    def __init__(self, store: Store, directory: Path, prices: tuple[config.Price, ...] = ()) -> None:
        self.linked: list[str] = []
        self.journal = directory / "journal"
        self.journal.mkdir()
        self.ingest = Ingest(store, self.journal, node="here")
        self.leases = Leases(store, "here", no_limit, lambda *_: False, lambda: self.ingest.pass_count)
        self.published: list[list[Price]] = []
        self.keeper = Keeper(
            store,
            self.ingest,
            self.leases,
            lambda: self.linked,
            self.journal,
            prices,
            lambda told: self.published.append(list(told)),
        )


@pytest.fixture
async def user_id(store: Store) -> str:
    made = (await create_user(store, "ann@example.com")).id
    await credit(store, made, 1_000, "start")
    return made


async def test_a_dead_workers_lease_ends_after_its_receipts_are_charged(
    store: Store, tmp_path: Path, user_id: str
) -> None:
    control = Control(store, tmp_path, (config.Price("m1", per_request_usd="0.00000002"),))
    await control.leases.grant("000-7", Lease(1, user_id, "", "nanousd", 900, 900))
    segment = control.journal / "000-7-000001.log"
    segment.write_bytes(frame([receipt(1, user_id=user_id)]))
    for _ in range(3):
        await control.keeper.sweep()
    assert await balance(store, user_id) == 100
    await control.ingest.ingest_once()
    for _ in range(2):
        await control.keeper.sweep()
    assert await balance(store, user_id) == 980
    assert await verify(store) == []
    control.ingest.close()


async def test_a_new_price_holds_after_the_next_sweep(store: Store, tmp_path: Path) -> None:
    control = Control(store, tmp_path)
    await add_price(store, Price("m1", request_nanousd=5, valid_from_ns=1))
    assert not control.ingest.catalogue
    await control.keeper.sweep()
    assert control.ingest.catalogue.find("m1", "", 1).request_nanousd == 5
    assert [price.request_nanousd for price in control.published[-1]] == [5]


async def test_the_keeper_goes_on_through_an_outage(store: Store, tmp_path: Path, user_id: str) -> None:
    control, stopping = Control(store, tmp_path), asyncio.Event()
    await control.leases.grant("w", Lease(1, user_id, "", "nanousd", 900, 900))
    control.leases.take_back("w", Return(user_id, "", "nanousd", 400))
    flush, failures = control.leases.flush, iter([OSError("away"), OSError("away")])

    async def fail_twice() -> None:
        for error in failures:
            raise error
        await flush()
        stopping.set()

    control.leases.flush = fail_twice  # type: ignore[method-assign]
    with capture_logs() as lines:
        await asyncio.wait_for(control.keeper.run(stopping), 10)
    assert [line["event"] for line in lines] == ["leases cannot be kept, will go on"]
    assert await balance(store, user_id) == 500


async def test_a_key_has_its_own_limit_or_the_default(store: Store) -> None:
    await create_user(store, "ann@example.com")
    _, plain = await create_key(store, "ann@example.com")
    _, fast = await create_key(store, "ann@example.com", rpm=600, tpm=9, streams=2)
    _, endless = await create_key(store, "ann@example.com", rpm=0)
    rates = config.Rates(100, 7, 3)
    found = [await limit_per_minute(store, key_id, rates) for key_id in (plain.id, fast.id, endless.id, "")]
    assert found == [100, 600, 0, 100]
    found = [await limit_per_minute(store, TOKENS + key_id, rates) for key_id in (plain.id, fast.id, "")]
    assert found == [7, 9, 7]
    found = [await limit_per_minute(store, STREAMS + key_id, rates) for key_id in (plain.id, fast.id, "")]
    assert found == [3, 2, 3]


async def test_a_store_that_is_away_is_told_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuproxy.ledger.keeper.FLUSH_S", 0.0)
    control, stopping = Control(store, tmp_path), asyncio.Event()
    sweeps = 0

    async def sweep() -> None:
        nonlocal sweeps
        sweeps += 1
        if sweeps == 5:
            stopping.set()
        raise OSError("away")

    monkeypatch.setattr(control.keeper, "sweep", sweep)
    with capture_logs() as logs:
        await asyncio.wait_for(control.keeper.run(stopping), 20)
    assert [line["error"] for line in logs] == ["OSError: away"]
