"""Brings what workers wrote to disk every few milliseconds, so that a power cut costs no more than that.

No worker waits for a disk; control does it for all, in a thread with files of its own: through the event loop and
its pool the same work takes twice the time, at 200 times a second 2 % of a core.

After a failed sync nobody knows what is on disk, and the next one says that all is well. So a segment whose sync has
failed is not synced again: it is made read-only, by which workers know to write no more to it, and to take no calls
until all of it is in the store.
"""

import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from msgspec import Struct

from gpuproxy.observe.logs import get_logger

QUIET_FACTOR_MAX = 10  # a journal that does not grow is looked at this much more seldom
RETRY_S = 5.0  # after a disk refused
SETTLED_NS = 100_000_000  # a directory younger than this may change again without a new time

logger = get_logger(__name__)


class Synced(Struct):
    """An open segment and how much of it is on disk."""

    descriptor: int
    synced_bytes: int = 0


class Syncer:
    """Syncs the segments of one directory. One call at a time, but for `stop`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Synced] = {}
        self._listed_ns = -1
        self._stopping = threading.Event()

    def run(self, interval_s: float) -> None:
        """Sync until `stop`, through faults of the disk; after a quiet spell up to QUIET_FACTOR_MAX times later."""
        wait_s = interval_s
        while not self._stopping.wait(wait_s):
            try:
                has_grown = self.sync_once() > 0
                wait_s = interval_s if has_grown else min(wait_s * 2, interval_s * QUIET_FACTOR_MAX)
            except OSError as error:
                wait_s = RETRY_S
                logger.error("journal cannot be synced", error=str(error))
        self.close()

    def stop(self) -> None:
        """Let `run` end; from any thread."""
        self._stopping.set()

    def sync_once(self) -> int:
        """Bring segments that grew since the last call to disk; return how many did. Raises OSError."""
        self._list()
        found = {name: os.fstat(file.descriptor) for name, file in self._files.items()}
        sizes = {name: each.st_size for name, each in found.items() if each.st_mode & stat.S_IWUSR}
        grown = [name for name, size in sizes.items() if size != self._files[name].synced_bytes]
        new = [name for name in grown if not self._files[name].synced_bytes]
        if new:  # a new file is on disk only when its name is
            self._sync(new, partial(_sync_directory, self._directory))
        for name in grown:
            self._sync([name], partial(os.fdatasync, self._files[name].descriptor))
            self._files[name].synced_bytes = sizes[name]
        return len(grown)

    def close(self) -> None:
        """Close all files."""
        for name in list(self._files):
            os.close(self._files.pop(name).descriptor)

    def _sync(self, names: list[str], sync: Callable[[], None]) -> None:
        """Sync, or give up these segments."""
        try:
            sync()
        except OSError as error:
            logger.error("journal segments cannot be synced, given up", segments=names, error=str(error))
            for name in names:
                os.fchmod(self._files[name].descriptor, stat.S_IRUSR)

    def _list(self) -> None:
        """Open what is new in the directory and close what has gone from it."""
        try:
            changed_ns = os.stat(self._directory).st_mtime_ns
            if changed_ns == self._listed_ns:
                return
            names = {name for name in os.listdir(self._directory) if name.endswith(".log")}
        except FileNotFoundError:
            return
        for name in self._files.keys() - names:
            os.close(self._files.pop(name).descriptor)
        for name in names - self._files.keys():
            with suppress(FileNotFoundError):
                self._files[name] = Synced(_opened(self._directory / name))
        self._listed_ns = changed_ns if time.time_ns() - changed_ns > SETTLED_NS else -1


def _opened(path: Path, flags: int = os.O_NOFOLLOW) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


def _sync_directory(directory: Path) -> None:
    descriptor = _opened(directory, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
