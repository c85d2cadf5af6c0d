"""A whole gateway whose processes a test can see, stop and kill; what it leaves behind can be read afterwards."""

import asyncio
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from clients.gateway import GPUPROXY, command, toml_table, upstream

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.store.engine import open_store
from gpuproxy.store.migrate import upgrade

START_S, STOP_S = 60.0, 20.0
POLL_S = 0.01
MODEL = "mock-model"
CONTROL, WORKER = "gpuproxy.control.app", "gpuproxy.proxy.worker"


class Receipt(NamedTuple):
    """What a test looks at in a stored receipt."""

    id: str
    request_id: str
    status: int
    outcome: str
    response_bytes: int
    input_tokens: int
    output_tokens: int


class Origin(NamedTuple):
    """What every place begins with: the port of the upstream, and a store with one caller in it."""

    upstream_port: int
    database: Path
    key: str
    key_id: str


async def make_origin(directory: Path, upstream_port: int) -> Origin:
    """Fill a store."""
    database = directory / "g.db"
    store = open_store(f"sqlite:///{database}")
    try:
        await upgrade(store)
        await create_user(store, "caller@example.com")
        secret, key = await create_key(store, "caller@example.com", rpm=0)
    finally:
        await store.close()
    return Origin(upstream_port, database, secret, key.id)


class Place:
    """A directory with a configuration, a store with one caller in it, and what gateways leave there."""

    def __init__(self, directory: Path, origin: Origin, **settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.config = directory / "config.toml"
        self.log = directory / "log"
        self.journal = directory / "data" / "journal"
        self.database = directory / "g.db"
        self.upstream_url = f"http://127.0.0.1:{origin.upstream_port}"
        self.settings = settings
        self.key, self.key_id = origin.key, origin.key_id
        shutil.copy(origin.database, self.database)
        self.configure()

    def configure(self, *models: str, tail: str = "", **settings: Mapping[str, Any]) -> None:
        """Write the configuration: `settings` upon those of the place, an upstream with `models`, then `tail`."""
        self.settings = {**self.settings, **settings}
        server = {"port": 0, "workers": 2, "data_dir": str(self.directory / "data"), "drain_s": 10.0}
        tables = {"server": server, "store": {"url": f"sqlite:///{self.database}"}}
        for name, values in self.settings.items():
            tables[name] = {**tables.get(name, {}), **values}
        text = "".join(toml_table(f"[{name}]", values) for name, values in tables.items())
        llm = upstream("llm", "openinference", self.upstream_url, models=[MODEL, *models])
        self.config.write_text(text + llm + tail)

    def command(self, *words: str) -> str:
        """Run a subcommand against this configuration and return what it printed."""
        return command(self.config, dict(os.environ), *words).strip()

    def new_key(self) -> tuple[str, str]:
        """Let the command line make another key for the caller; return it and its id."""
        made = json.loads(self.command("key", "create", "--user", "caller@example.com", "--rpm", "0", "--json"))
        return made["api_key"], made["id"]

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Read the store."""
        with closing(sqlite3.connect(self.database, timeout=10)) as connection:
            return connection.execute(statement).fetchall()

    def receipts(self) -> list[Receipt]:
        """Return every stored receipt."""
        return [Receipt(*row) for row in self.query(f"SELECT {', '.join(Receipt._fields)} FROM receipts")]

    def segments(self) -> dict[str, int]:
        """Return the files of the journal and their sizes."""
        found = {}
        for entry in os.scandir(self.journal):
            with suppress(FileNotFoundError):  # stored and deleted meanwhile
                found[entry.name] = entry.stat().st_size
        return found

    def age_empty_segments(self) -> None:
        """Let a minute pass for the empty files of dead workers, which are kept that long."""
        for name, size in self.segments().items():
            with suppress(FileNotFoundError):
                if not size:
                    os.utime(self.journal / name, (time.time() - 120, time.time() - 120))


class Gateway:
    """A running ``gpuproxy serve``."""

    def __init__(self, place: Place, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.place = place
        self.process = process
        self.port = port

    @classmethod
    def announced(cls, place: Place, process: "subprocess.Popen[bytes]") -> "Gateway":
        """Return the gateway as soon as it says where it listens."""
        return cls(place, process, announced_port(place, process))

    def pids(self, module: str) -> list[int]:
        """Return the living children that run this module, oldest first."""
        return [pid for pid in children(self.process.pid) if module in _command_line(pid)]

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return self.pids(WORKER)

    def control(self) -> int:
        """Return the process id of control, 0 while there is none."""
        return (self.pids(CONTROL) or [0])[-1]

    def open_files(self) -> int:
        """Return how many files the supervisor holds open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def logged(self) -> str:
        """Return what the gateway has logged."""
        return self.place.log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the gateway and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


def children(pid: int) -> list[int]:
    """Return the children of a process, [] when it is gone. Dead ones that nobody waited for count too."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    """Tell whether the process runs; one that is dead but not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, which may be gone."""
    assert pid > 0, "there is no such process; 0 would be the tests themselves"
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def heed_ctrl_c() -> None:
    """Let a child stop at SIGINT; a shell lets what it runs in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def process(
    place: Place, environment: Mapping[str, str] | None = None, line: Sequence[str] = (), **options: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``serve`` (or `line`) in a session of its own, of which nothing is left at the end."""
    line = line or [str(GPUPROXY), "serve", "-c", str(place.config)]
    with place.log.open("ab") as errors:
        started = subprocess.Popen(
            line,
            env={**os.environ, **(environment or {})},
            cwd=place.directory,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            **{"preexec_fn": heed_ctrl_c, **options},
        )
        try:
            yield started
        finally:
            for pid in children(started.pid):
                kill(pid)
            started.kill()
            started.wait()
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            assert started.stdout is not None
            started.stdout.close()


@contextmanager
def running(place: Place, **options: Any) -> Iterator[Gateway]:
    """Run a gateway; nothing it logged may be a traceback."""
    with process(place, **options) as started:
        yield Gateway.announced(place, started)
    assert "Traceback" not in place.log.read_text(), place.log.read_text()


def announced_port(place: Place, started: "subprocess.Popen[bytes]") -> int:
    """Wait until the gateway says where it listens."""
    assert started.stdout is not None
    readable, _, _ = select.select([started.stdout], [], [], START_S)
    said = started.stdout.readline().decode() if readable else ""
    found = re.fullmatch(r"listening on http://\S+:(\d+)\n", said)
    assert found, f"the gateway said {said!r}; its log: {place.log.read_text()}"
    return int(found[1])


async def until(is_true: Callable[[], Any], timeout_s: float, what: str) -> float:
    """Wait until `is_true` says so and return how many seconds that took; fail with `what` at the deadline."""
    begun_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - begun_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return time.monotonic() - begun_s
