"""How many receipts a second go from the journal into a store, each call charged.

python benchmarks/ingest.py [--receipts N] [--rounds N] [STORE_URL ...]

Without a URL: SQLite in a temporary directory, and PostgreSQL from the wheel that the tests use. A store that is named
must be one to throw away: users, receipts and transfers are left in it.
"""

import argparse
import asyncio
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4
from zlib import crc32

import msgspec

from gpuproxy import config
from gpuproxy.access.accounts import create_user
from gpuproxy.ledger.book import credit
from gpuproxy.ledger.catalogue import load_catalogue
from gpuproxy.ledger.ingest import Ingest
from gpuproxy.ledger.verify import verify
from gpuproxy.store.engine import Store, open_store
from gpuproxy.store.migrate import upgrade
from gpuproxy.types import Receipt

USERS = 50
FRAME_RECEIPTS = 20  # what a busy worker writes in a turn of its loop
PRICE = config.Price(model="*", input_usd_per_million="0.15", output_usd_per_million="0.60", per_request_usd="0.0001")


def receipt(number: int, user_id: str) -> Receipt:
    """Return the receipt of a usual call."""
    return Receipt(
        id=f"req_{uuid4().hex}", request_id=f"req_{number:032}", started_ns=time.time_ns(), duration_us=900,
        first_byte_us=700, user_id=user_id, key_id="8f14e45f-ceea-467f-a8de-1c5b0b8c2f3d", protocol="openinference",
        upstream="llm", model="meta-llama/Llama-3.1-8B-Instruct", method="POST", path="/v1/chat/completions",
        status=200, outcome="ok", error="", request_bytes=400, response_bytes=1_000, input_tokens=200,
        cached_tokens=0, output_tokens=60, usage_source="provider", attempts=1, is_stream=False,
    )  # fmt: skip


def write_segment(path: Path, user_ids: list[str], count: int) -> None:
    """Write a journal segment whose worker has gone."""
    with path.open("wb") as file:
        for start in range(0, count, FRAME_RECEIPTS):
            numbers = range(start, min(start + FRAME_RECEIPTS, count))
            payload = msgspec.msgpack.encode([receipt(n, user_ids[n % len(user_ids)]) for n in numbers])
            file.write(struct.pack("<II", len(payload), crc32(payload)) + payload)


async def prepared(store: Store) -> list[str]:
    """Bring the store to its schema and return the ids of customers with credit."""
    await upgrade(store)
    users = [await create_user(store, f"{uuid4()}@example.com") for _ in range(USERS)]
    for user in users:
        await credit(store, user.id, 10**15, f"benchmark:{user.id}")
    return [user.id for user in users]


async def measure(url: str, receipts: int, rounds: int) -> None:
    """Print what each round took."""
    store = open_store(url)
    try:
        user_ids = await prepared(store)
        catalogue = await load_catalogue(store, [PRICE])
        for round_ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="gpuproxy-ingest-") as name:
                write_segment(Path(name) / f"{round_:03}-1.log", user_ids, receipts)
                ingest = Ingest(store, Path(name), catalogue, uuid4().hex)
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                stored = await ingest.ingest_once()
                wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
                ingest.close()
            assert stored == receipts, f"{stored} of {receipts} receipts were stored"
            kind = store.engine.dialect.name
            print(f"{kind:10} {receipts / wall_s:9,.0f} receipts/s   {cpu_s / receipts * 1e6:6.1f} µs of own CPU each")
        assert await verify(store) == [], "the books are wrong"
    finally:
        await store.close()


@contextmanager
def stores() -> Iterator[list[str]]:
    """Return the URLs of one store of each kind."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from postgres import Postgres  # type: ignore[import-not-found]

    server = Postgres(fsync="on", synchronous_commit="on", full_page_writes="on")
    try:
        server.start()
        with tempfile.TemporaryDirectory(prefix="gpuproxy-ingest-") as name:
            yield [f"sqlite:///{name}/g.db", server.url(asyncio.run(server.create()))]
    finally:
        server.stop()


def main() -> None:
    """Measure the stores named, or one of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receipts", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("urls", nargs="*", metavar="STORE_URL")
    given = parser.parse_args()
    if given.urls:
        for url in given.urls:
            asyncio.run(measure(url, given.receipts, given.rounds))
        return
    with stores() as urls:
        for url in urls:
            asyncio.run(measure(url, given.receipts, given.rounds))


if __name__ == "__main__":
    main()
