"""The worker's end of the journal: receipts appended to a segment file, at most once per loop turn.

A segment is a series of frames: payload length and CRC-32 of the payload (4 bytes each, little endian), then
the payload, a MessagePack array of Receipts. The worker holds an exclusive flock on the segment it may still write;
control reads along, and deletes the segment once the lock is free and everything in it is committed. One that it could
not bring to disk it makes read-only: what is in it may be lost with the power until it is committed.

`Outbox` flushes it before it writes to sockets: see there why.
"""

import fcntl
import os
import stat
import time
import zlib
from pathlib import Path

import msgspec

from gpuproxy.config import Journal as JournalConfig
from gpuproxy.observe.logs import get_logger
from gpuproxy.types import Receipt

_log = get_logger("gpuproxy.journal")

_encode = msgspec.msgpack.Encoder().encode


def frame(receipts: list[Receipt]) -> bytes:
    """Return one frame with these receipts."""
    try:
        payload = _encode(receipts)
    except (ValueError, TypeError, OverflowError):  # a text or number that a plugin has given
        payload = _encode([_writable(receipt) for receipt in receipts])
    return len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload


def _writable(receipt: Receipt) -> Receipt:
    """Return it without the texts and numbers that cannot be written: they must not keep back what others used."""
    values = msgspec.structs.asdict(receipt)
    faults = [name for name, value in values.items() if not _is_writable(value)]
    if not faults:
        return receipt
    _log.error("plugin gave what cannot be written, left out", protocol=repr(receipt.protocol), fields=faults)
    return msgspec.structs.replace(receipt, **{name: "" if isinstance(values[name], str) else -1 for name in faults})


def _is_writable(value: object) -> bool:
    try:
        _encode(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


class Journal:
    """Appends receipts; `is_full` tells that no new billable call may be taken."""

    def __init__(self, directory: Path, name: str, config: JournalConfig) -> None:
        self.is_full = False
        self.refusals_dropped = 0
        self._directory = directory
        self._name = name
        self._config = config
        self._pending: list[Receipt] = []
        self._unwritten = b""
        self._sequence = 0
        self._is_stuck = False
        directory.mkdir(parents=True, exist_ok=True)
        self._open_segment()

    def append(self, receipt: Receipt) -> None:
        """Take a receipt; the next flush writes it.

        While the journal is full refusals, which cost nobody anything, are counted and not kept. Nor are checkpoints
        while the disk takes nothing: a worker that is killed then leaves none of what it holds in memory.
        """
        if self.is_full and receipt.outcome == "refused":
            self.refusals_dropped += 1
            return
        if self._unwritten and receipt.outcome == "open":
            return
        self._pending.append(receipt)

    def flush(self) -> None:
        """Write what is pending. A disk that refuses keeps it in memory and closes admission."""
        if self._pending:
            self._unwritten += frame(self._pending)
            self._pending.clear()
        if not self._unwritten:
            return
        try:
            written = os.write(self._file, self._unwritten)
        except OSError as error:
            if not self.is_full:
                _log.error("journal cannot be written", segment=self._path.name, reason=os.strerror(error.errno or 0))
            self.is_full = True
            return
        self._size += written
        self._unwritten = self._unwritten[written:]
        if self._size >= self._config.segment_bytes and not self._unwritten:
            self._go_on()

    def measure(self) -> None:
        """Compare the backlog of all workers with its bound, and look for segments that are not on disk.

        Called now and then, not per call.
        """
        self.flush()
        backlog_bytes, is_safe = 0, True
        for entry in os.scandir(self._directory):
            try:
                found = entry.stat()
            except FileNotFoundError:  # control deleted it meanwhile
                continue
            backlog_bytes += found.st_size
            is_safe &= bool(found.st_mode & stat.S_IWUSR) or not entry.name.endswith(".log")
        is_full = backlog_bytes > self._config.bytes_max or bool(self._unwritten) or not is_safe
        if is_full and self._size and not self._unwritten:
            self._go_on()  # a closed segment can be deleted once it is stored: room, even in a live one
        if is_full != self.is_full:
            event = "journal takes receipts again"
            if is_full:
                event = "journal full" if is_safe else "journal is not on disk, no call is taken until it is stored"
            _log.warning(event, backlog_bytes=backlog_bytes, refusals_dropped=self.refusals_dropped)
        self.is_full = is_full

    def close(self) -> None:
        """Write the rest and give up the lock, which tells control that this segment is finished."""
        self.flush()
        if self._unwritten:
            _log.error("journal lost receipts that the disk did not take", lost_bytes=len(self._unwritten))
        os.close(self._file)

    def _go_on(self) -> None:
        """Go on in a new segment; in the old one, where none can be made: its number must not become a socket's."""
        before = self._file
        try:
            self._open_segment()
        except OSError as error:
            if not self._is_stuck:
                _log.error("journal segment cannot be made, the old one goes on", reason=os.strerror(error.errno or 0))
            self._is_stuck = True
            return
        self._is_stuck = False
        os.close(before)

    def _open_segment(self) -> None:
        self._sequence += 1
        path = self._directory / f"{self._name}-{self._sequence:06d}.log"
        unlocked = path.with_suffix(".new")  # control must never see a live segment without its lock
        file = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_EXCL, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(path)
        except OSError:
            os.close(file)
            raise
        self._path, self._file, self._size = path, file, 0


def segment_name(slot: int) -> str:
    """Return a name no other worker process of this data directory has had."""
    return f"{slot:03d}-{time.time_ns():020d}-{os.getpid()}"
