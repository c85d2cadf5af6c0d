"""What the supervisor hands to a child process, and the child's side of it.

A child gets its `Boot` as MessagePack on a pipe. It tells on ``report_fd``, with one byte each, that it is ready and
that it takes no new calls any more. It stops when the supervisor does: either by SIGTERM or because ``lifeline_fd``
reads end of file. A worker that has a successor is told so by LEAVE instead.
"""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from gpuproxy.config import Config

READY, DRAINING = b"1", b"2"
LEAVE = signal.SIGUSR1
LOCK_NAME = "lock"  # in the data directory: held by the supervisor, whose process id it names


def running_supervisor(directory: Path) -> int:
    """Return the process id of the supervisor that uses this data directory, 0 if none does."""
    try:
        with (directory / LOCK_NAME).open("rb") as lock:
            text = lock.read()
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(text or b"0")
    except FileNotFoundError:
        return 0
    return 0


class Boot(Struct, frozen=True):
    """Everything a child needs; file descriptors are inherited under the numbers given.

    ``slot`` is 0..workers-1, or -1 for control. ``listen_fd`` is the TCP listening socket of a worker, the
    Unix listening socket of control. ``link_fd`` is control's listening link socket, -1 for workers, which
    connect to ``link_path``. ``address`` is the URL at which this machine reaches the workers.
    """

    config: Config
    slot: int
    listen_fd: int
    link_fd: int
    link_path: str
    control_path: str
    report_fd: int
    lifeline_fd: int
    address: str = ""


def receive_boot() -> Boot:
    """Read the Boot from the pipe named by the first argument and take the signals back into use.

    SIGTERM and LEAVE stay blocked until `on_stop`: a child told to stop while it starts must still stop in order.
    """
    with os.fdopen(int(sys.argv[1]), "rb") as pipe:
        boot = msgspec.msgpack.decode(pipe.read(), type=Boot)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM, LEAVE])  # wait until `on_stop` can take them
    return boot


def report_ready(boot: Boot) -> None:
    """Tell the supervisor that this child serves."""
    os.write(boot.report_fd, READY)


def report_draining(boot: Boot) -> None:
    """Tell the supervisor, if it is still there, that whoever calls from now on is served by a successor."""
    with suppress(BrokenPipeError):
        os.write(boot.report_fd, DRAINING)


def on_stop(boot: Boot, stop: Callable[[], None], leave: Callable[[], None] | None = None) -> None:
    """Call `stop` on SIGTERM or when the supervisor is gone, `leave` on LEAVE; in the running loop."""
    loop = asyncio.get_running_loop()

    def end_of_lifeline() -> None:
        loop.remove_reader(boot.lifeline_fd)
        stop()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(LEAVE, leave or stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, LEAVE])
    loop.add_reader(boot.lifeline_fd, end_of_lifeline)
