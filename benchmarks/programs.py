"""Starting, pinning and surely ending the processes of a benchmark."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_S = 20.0
_STOP_S = 10.0
_POLL_S = 0.02


_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin"  # where Debian has nginx, and users have no PATH to


class BenchmarkError(Exception):
    """The run cannot go on or its result would mean nothing; the message says why."""


def program(name: str) -> str:
    """Return where the program is. Raises BenchmarkError when it is neither on the PATH nor in /usr/sbin."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_DIRECTORIES}")
    if found is None:
        raise BenchmarkError(f"no program named {name}")
    return found


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Pin this process while the block runs: a child started in it stays there, and so do its children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started(
    command: Sequence[str], cpu: int, log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a command pinned to a processor; end it and all it started when the block ends.

    Standard output is a pipe, standard error goes to `log`. The command gets a session of its own, so that a
    Ctrl-C comes to the benchmark alone, which then ends everything in order.
    """
    with log.open("w") as errors:
        with on_cpu(cpu):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever of its session is left
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str], log: Path, what: str) -> None:
    """Return once `is_true` says so. Raises BenchmarkError with the log's end if it never does."""
    deadline = time.monotonic() + START_S
    while not is_true():
        if process.poll() is not None:
            raise BenchmarkError(f"{what} ended with {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what} was not ready within {START_S:g} s:\n{tail(log)}")
        time.sleep(_POLL_S)


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def free_port() -> int:
    """Return a port of the loopback interface that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Say whether something accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
