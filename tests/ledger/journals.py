"""Journal segments as a worker writes them, for the tests of their reader."""

import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

import msgspec
from sqlalchemy import select

from gpuproxy.store.engine import Store
from gpuproxy.store.schema import receipts
from gpuproxy.types import Receipt

DAY_NS = 86_400 * 10**9
START_NS = 20_000 * DAY_NS  # 2024-10-04


def receipt(number: int, **changes: object) -> Receipt:
    """Return a finished call of user u1; `changes` replace fields."""
    plain = Receipt(
        id=f"r{number:08}",
        request_id=f"q{number}",
        started_ns=START_NS + number,
        duration_us=900,
        first_byte_us=700,
        user_id="u1",
        key_id="k1",
        protocol="openinference",
        upstream="llm",
        model="m1",
        method="POST",
        path="/v1/chat/completions",
        status=200,
        outcome="ok",
        error="",
        request_bytes=100,
        response_bytes=1_000,
        input_tokens=10,
        cached_tokens=4,
        output_tokens=20,
        usage_source="provider",
        attempts=1,
        is_stream=False,
    )
    return msgspec.structs.replace(plain, **changes)


def frame(calls: Iterable[Receipt]) -> bytes:
    """Return one frame."""
    payload = msgspec.msgpack.encode(list(calls))
    return struct.pack("<II", len(payload), crc32(payload)) + payload


def frames(first: int, end: int, size: int = 1) -> bytes:
    """Return receipts first..end-1 in frames of `size`."""
    return b"".join(
        frame(receipt(number) for number in range(start, min(start + size, end))) for start in range(first, end, size)
    )


class Worker:
    """A writer that holds its lock until it `leaves`, as a process that is killed would."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        path.with_suffix(".new").rename(path)
        self._is_here = True

    def write(self, data: bytes) -> None:
        """Append."""
        os.write(self._fd, data)

    def leaves(self) -> None:
        """Give up the lock."""
        if self._is_here:
            os.close(self._fd)
        self._is_here = False


Hire = Callable[..., Worker]


@contextmanager
def hiring(directory: Path) -> Iterator[Hire]:
    """Give a function that starts a worker on a segment; all leave in the end."""
    hired: list[Worker] = []

    def start(name: str = "000-1") -> Worker:
        hired.append(Worker(directory / f"{name}.log"))
        return hired[-1]

    yield start
    for worker in hired:
        worker.leaves()


async def stored(store: Store) -> list[str]:
    """Return the ids of all receipts that are stored."""
    async with store.reading() as connection:
        return list(await connection.scalars(select(receipts.c.id).order_by(receipts.c.id)))


def ids(first: int, end: int) -> list[str]:
    """Return the ids of receipts first..end-1."""
    return [receipt(number).id for number in range(first, end)]


def open_files() -> list[str]:
    """Return the paths of the files this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found
