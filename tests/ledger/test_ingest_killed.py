"""Ingest under kill -9: every receipt counts exactly once, whenever the process dies."""

import random
import signal
import subprocess
import sys
from pathlib import Path

from journals import Worker, frames
from sqlalchemy import func, select

from gpuproxy.ledger.ingest import Ingest
from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipts

KILLS = 12
RECEIPTS_PER_ROUND = 1_500

CODE = """
import asyncio, sys
from pathlib import Path
from gpuproxy import config
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.store.engine import open_store

async def main():
    ingest = Ingest(open_store(sys.argv[1]), Path(sys.argv[2]))
    print("started", flush=True)
    await ingest.run(config.Journal(ingest_s=0.0001, sync_s=0.001))

asyncio.run(main())
"""


async def test_receipts_survive_kills_of_the_ingesting_process(store: Store, store_url: str, tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    chance = random.Random(7)
    written = 0
    for number in range(KILLS):
        worker = Worker(directory / f"{number}.log")
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, store_url, str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(chance.randrange(1, 8)):
            worker.write(frames(written, written + RECEIPTS_PER_ROUND, size=50))
            written += RECEIPTS_PER_ROUND
        if number % 2:
            worker.leaves()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        worker.leaves()
    last = Ingest(store, directory)
    await last.ingest_once()
    last.close()
    async with store.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(receipts)) == written
    assert list(directory.iterdir()) == []
