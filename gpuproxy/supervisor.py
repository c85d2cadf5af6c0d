"""The supervisor: holds the listening sockets, starts control and the workers, restarts what dies.

It is a plain loop over signals, without an event loop or threads, so that there is little that can fail. The
sockets stay open here: when a child dies, new connections wait in the backlog until its successor
accepts, and none is refused. Children stop with the supervisor because their lifeline pipe reads end of file.
"""

import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from gpuproxy.config import Config, load
from gpuproxy.errors import ConfigError
from gpuproxy.observe.logs import configure_logs, get_logger
from gpuproxy.plugin import check_plugins
from gpuproxy.process import DRAINING, LEAVE, LOCK_NAME, READY, Boot
from gpuproxy.resolver import resolv_options

_log = get_logger("gpuproxy.supervisor")

BACKLOG = 4096
START_S = 30.0  # a child that is not ready by then is killed
HANDOVER_S = 5.0  # how long a replaced worker may take to stop taking calls, on a busy machine
STOP_GRACE_S = 15.0  # on top of drain_s, before what is left is killed
RESTART_PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # by the number of deaths in the last minute
TWICE_S = 1.0  # some send one SIGTERM to the process and to its group, which is the same one twice
WATCH_S = 1.0  # how often the configuration file is looked at
CONTROL = -1

_CHILD_MODULES = {True: "gpuproxy.control.app", False: "gpuproxy.proxy.worker"}
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Child:
    """A running child process and our end of the pipe on which it reports."""

    def __init__(self, slot: int, process: subprocess.Popen[bytes], report_fd: int) -> None:
        self.slot = slot
        self.process = process
        self._was_told = False
        self._reports = os.fdopen(report_fd, "rb", 0)  # stays open: a child that cannot say its word fails

    def await_report(self, report: bytes, deadline_s: float) -> bool:
        """Wait for the child's next report; False if it died or took too long."""
        readable, _, _ = select.select([self._reports], [], [], max(0.0, deadline_s - time.monotonic()))
        return bool(readable) and self._reports.read(1) == report

    def tell_to_stop(self) -> None:
        """Let the child stop in order, if it was not told before: the second time it hurries."""
        if not self._was_told:
            self.process.terminate()
        self._was_told = True

    def tell_to_leave(self) -> None:
        """Let a worker end its calls that has a successor; it can still be told to stop."""
        self.process.send_signal(LEAVE)

    def is_dead(self) -> bool:
        """Tell whether the process has ended; if so it leaves nothing behind here."""
        if self.process.poll() is None:
            return False
        self._reports.close()
        return True


class FileWatch:
    """Tells when a file has changed and then been left alone between two looks: an editor may still be writing it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._taken = self._seen = self._look()

    def has_changed(self) -> bool:
        """Tell whether the file is another than was remembered, and the same as at the last look."""
        now = self._look()
        is_settled, self._seen = now == self._seen, now
        return is_settled and now is not None and now != self._taken

    def remember(self) -> None:
        """Take the file as it is for known."""
        self._taken = self._seen = self._look()

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:  # replaced just now, or gone: the configuration that runs stays
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None


class Supervisor:
    """Starts, watches and stops the children of one gateway."""

    def __init__(self, config_path: Path | None, config: Config, sockets: list[socket.socket]) -> None:
        self._config_path = config_path
        self._config = config
        self._sockets = sockets  # one for each worker
        self._children: dict[int, Child] = {}  # by slot
        self._leaving: list[Child] = []  # recycled, still draining
        self._watch = FileWatch(config_path if config.server.watch_config else None)
        self._deaths: dict[int, list[float]] = {}
        self._restart_at: dict[int, float] = {}
        self._directory = Path(tempfile.mkdtemp(prefix="gpuproxy-"))  # short: socket paths have 107 bytes
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._control_socket = self._unix_socket("control.sock")
        self._link_socket = self._unix_socket("link.sock")

    @property
    def address(self) -> str:
        """Return the URL the gateway is reached at."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code."""
        try:
            if not self._start_all():
                return 1
            print(f"listening on {self.address}", flush=True)
            notify("READY=1")
            while True:
                info = signal.sigtimedwait(_SIGNALS, min(WATCH_S, self._until_restart_s()))
                if info is None or info.si_signo == signal.SIGCHLD:
                    self._reap()
                    self._restart_due()
                    if info is None and self._watch.has_changed():
                        _log.info("configuration file has changed")
                        self._recycle()
                elif info.si_signo == signal.SIGHUP:
                    self._recycle()
                elif info.si_signo in (signal.SIGTERM, signal.SIGINT):
                    return 0
                # else none came: a process that was stopped for longer than the wait is told of signal 0
        finally:
            notify("STOPPING=1")
            self._stop_all()
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- children -------------------------------------------------------------------------------------------

    def _start_all(self) -> bool:
        slots = [CONTROL, *range(self._config.server.workers)]
        deadline_s = time.monotonic() + START_S
        for slot in slots:
            self._children[slot] = self._spawn(slot)
        for slot in slots:
            if not self._children[slot].await_report(READY, deadline_s):
                _log.error("child did not start", child=_name(slot))
                return False
        return True

    def _spawn(self, slot: int) -> Child:
        is_control = slot == CONTROL
        boot_read, boot_write = os.pipe()
        report_read, report_write = os.pipe()
        listen_fd = self._control_socket.fileno() if is_control else self._sockets[slot].fileno()
        link_fd = self._link_socket.fileno() if is_control else -1
        boot = Boot(
            self._config,
            slot,
            listen_fd,
            link_fd,
            str(self._directory / "link.sock"),
            str(self._directory / "control.sock"),
            report_write,
            self._lifeline_read,
            reachable(self.address),
        )
        inherited = [fd for fd in (boot_read, report_write, self._lifeline_read, listen_fd, link_fd) if fd >= 0]
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", _CHILD_MODULES[is_control], str(boot_read)],
            pass_fds=inherited,
            env={"RES_OPTIONS": resolv_options(self._config.timeouts.dns_s), **os.environ},
        )
        os.close(boot_read)
        os.close(report_write)
        with suppress(BrokenPipeError), os.fdopen(boot_write, "wb") as pipe:  # broken: it is dead, and will be seen so
            pipe.write(msgspec.msgpack.encode(boot))
        return Child(slot, process, report_read)

    def _reap(self) -> None:
        self._leaving = [child for child in self._leaving if not child.is_dead()]
        for slot, child in list(self._children.items()):
            if not child.is_dead():
                continue
            del self._children[slot]
            now_s = time.monotonic()
            recent = [at_s for at_s in self._deaths.get(slot, ()) if now_s - at_s < 60] + [now_s]
            self._deaths[slot] = recent
            pause_s = RESTART_PAUSES_S[min(len(recent) - 1, len(RESTART_PAUSES_S) - 1)]
            self._restart_at[slot] = now_s + pause_s
            _log.error("child died", child=_name(slot), code=child.process.returncode, restart_in_s=pause_s)

    def _restart_due(self) -> None:
        now_s = time.monotonic()
        for slot in [slot for slot, at_s in self._restart_at.items() if at_s <= now_s]:
            del self._restart_at[slot]
            self._children[slot] = self._spawn(slot)  # if it fails it dies, and is seen as dead

    def _until_restart_s(self) -> float:
        if not self._restart_at:
            return 60.0
        return max(0.0, min(self._restart_at.values()) - time.monotonic())

    def _recycle(self) -> None:
        """Put a new generation of children on the same sockets, then let the old one drain."""
        self._watch.remember()
        try:
            config = load(self._config_path, os.environ)
            check_plugins(config, os.environ)
        except ConfigError as error:
            _log.error("configuration refused, the old one stays", faults=str(error))
            return
        if config.server != self._config.server:
            _log.warning("changes of [server] need a restart; the others are taken")
            config = msgspec.structs.replace(config, server=self._config.server)
        notify("RELOADING=1")
        before, self._config = self._config, config
        taken_count = 0
        for slot in sorted(self._children):
            is_taken = self._replace(slot)
            taken_count += is_taken
            if not is_taken and slot == CONTROL:  # the first: nothing has changed yet
                self._config = before
                break
        if taken_count:
            configure_logs(config.log)
            _log.info("configuration taken", children=taken_count)
        else:
            _log.error("configuration refused, the old one stays", faults="no child starts with it; see above why")
        notify("READY=1")

    def _replace(self, slot: int) -> bool:
        """Put a new child in a slot's place; False if it does not start and the old one stays."""
        old = self._children[slot]
        new = self._spawn(slot)
        if not new.await_report(READY, time.monotonic() + START_S):
            _log.error("new child did not start, the old one stays", child=_name(slot))
            new.process.kill()
            new.process.wait()
            new.is_dead()
            return False
        self._children[slot] = new
        self._leaving.append(old)
        if slot == CONTROL:
            old.tell_to_stop()
        else:
            old.tell_to_leave()
            old.await_report(DRAINING, time.monotonic() + HANDOVER_S)  # until then it answers by the old configuration
        return True

    def _stop_all(self) -> None:
        for listening in self._sockets:  # else new connections would wait in a backlog nobody serves any more
            listening.close()
        workers = [child for slot, child in self._children.items() if slot != CONTROL] + self._leaving
        deadline_s = time.monotonic() + self._config.server.drain_s + STOP_GRACE_S
        _stop(workers, deadline_s)  # first, so that control can take in their last receipts
        _stop([child for slot, child in self._children.items() if slot == CONTROL], deadline_s + STOP_GRACE_S)

    def _unix_socket(self, name: str) -> socket.socket:
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(str(self._directory / name))
        unix.listen(BACKLOG)
        return unix


def _stop(children: list[Child], deadline_s: float) -> None:
    """Stop the children and wait for them; who sends SIGTERM once more cannot wait for what they still do."""
    for child in children:
        child.tell_to_stop()
    begun_s = time.monotonic()
    while living := [child for child in children if child.process.poll() is None]:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        info = signal.sigtimedwait(_SIGNALS, min(left_s, WATCH_S))
        is_again = info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT)
        if is_again and time.monotonic() - begun_s > TWICE_S:
            for child in living:
                child.process.terminate()
    for child in living:
        _log.error("child did not stop in time, killed", child=_name(child.slot))
        child.process.kill()
        child.process.wait()


def reachable(address: str) -> str:
    """Return a URL to connect to: what listens on all addresses is reached on this machine's own."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _name(slot: int) -> str:
    return "control" if slot == CONTROL else f"worker {slot}"


def _listening_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    inherited = _inherited_socket()
    if inherited is not None:
        return [inherited] * count
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    for _ in range(count):
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not sockets:
            _refuse_taken_port(family, host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        port = listening.getsockname()[1]
        listening.listen(BACKLOG)
        sockets.append(listening)
    return sockets


def _refuse_taken_port(family: int, host: str, port: int) -> None:
    # without this a second gateway of the same user would silently share the port
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _inherited_socket() -> socket.socket | None:
    """Return the socket systemd hands over, if any (sd_listen_fds(3)). Raises OSError for several."""
    count = os.environ.get("LISTEN_FDS", "0")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count == "0":
        return None
    if count != "1":  # clients of the others would wait for ever
        raise OSError(errno.EINVAL, f"systemd hands over {count} sockets; leave one ListenStream, [::]:PORT for all")
    return socket.socket(fileno=3)


def notify(state: str) -> None:
    """Tell systemd about the state, if it asked for that (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    message = f"{state}\nMONOTONIC_USEC={time.monotonic_ns() // 1000}" if state == "RELOADING=1" else state
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
        unix.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


def serve(config_path: Path | None, config: Config) -> int:
    """Run a gateway by a checked configuration, and by what becomes of its file; return the exit code."""
    configure_logs(config.log)
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, LEAVE))  # children begin with this: see `receive_boot`
    directory = Path(config.server.data_dir)
    try:
        sockets = _listening_sockets(config.server.host, config.server.port, config.server.workers)
    except OSError as error:
        place = f"{config.server.host}:{config.server.port}"
        _log.critical("cannot listen; set another [server] host or port", address=place, cause=error.strerror)
        return 1
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _locked(directory)
    except OSError as error:
        _log.critical("the data directory cannot be used; set another [server] data_dir", cause=str(error))
        return 1
    if lock is None:
        _log.critical("another gateway uses the data directory; set another [server] data_dir", path=str(directory))
        return 1
    with lock:
        return Supervisor(config_path, config, sockets).run()


def _locked(directory: Path) -> IO[bytes] | None:
    """Return a lock on the data directory, None if another gateway has it: two would read one journal."""
    lock = (directory / LOCK_NAME).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.truncate(0)
    lock.write(b"%d\n" % os.getpid())  # whom `gpuproxy reload` tells
    lock.flush()
    return lock
