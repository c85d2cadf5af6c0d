"""One journal segment as its reader sees it: a file of frames that a worker may still be writing.

A frame is a 4-byte little-endian length, the 4-byte little-endian CRC-32 of the payload, and the payload: a
MessagePack array of Receipts. The writer holds an exclusive lock on the file from before it has its name until
it writes no more, so whoever gets the lock knows that the writer is done or dead.
"""

import fcntl
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
from msgspec import Struct

from gpuproxy.observe.logs import get_logger
from gpuproxy.types import Receipt, UsageSource

CHUNK_BYTES = 1 << 20  # about 4,000 receipts
FRAME_BYTES_MAX = 1 << 26  # a worker writes a frame per turn of its loop; anything near this is damage
TORN_BYTES_MAX = 1 << 20  # more than this behind the last whole frame is kept for repair, not taken for torn

Row = tuple[Any, ...]

_log = get_logger("gpuproxy.journal")

_HEAD = struct.Struct("<II")
_decode = msgspec.msgpack.Decoder(list[Receipt]).decode
_decode_values = msgspec.msgpack.Decoder(list[list[Any]]).decode
_row: Callable[[Receipt], Row] = msgspec.structs.astuple
_BLANKS: dict[Any, object] = {str: "", int: -1, bool: False, UsageSource: "none"}


class Cut(Struct):
    """What could be cut off a stretch of a segment: receipts as tuples in field order.

    ``bytes_used`` covers whole frames only. ``bytes_wanted`` is the size of the next, incomplete frame, 0 if
    not even its length is there. ``damage`` says what is wrong with the next frame, empty if nothing is.
    """

    rows: list[Row]
    bytes_used: int = 0
    bytes_wanted: int = 0
    damage: str = ""


def cut(data: bytes, rows_max: int) -> Cut:
    """Cut whole frames off `data` until they hold `rows_max` receipts or no whole frame is left."""
    found = Cut([])
    view = memoryview(data)
    while len(data) - found.bytes_used >= _HEAD.size and len(found.rows) < rows_max:
        length, check = _HEAD.unpack_from(data, found.bytes_used)
        start = found.bytes_used + _HEAD.size
        if not 0 < length <= FRAME_BYTES_MAX:
            found.damage = f"frame length {length}"
            break
        if start + length > len(data):
            found.bytes_wanted = _HEAD.size + length
            break
        found.damage = _take(found, view[start : start + length], check)
        if found.damage:
            break
        found.bytes_used = start + length
    return found


def _take(found: Cut, payload: memoryview, check: int) -> str:
    if crc32(payload) != check:
        return "checksum does not match"
    try:
        found.rows += map(_row, _readable(payload))
    except msgspec.MsgspecError as error:
        return str(error)
    return ""


def _readable(payload: memoryview) -> list[Receipt]:
    """Decode receipts. What is no text or number where one must be, as a plugin may have given, is left out: it must
    not keep back what others used. Raises MsgspecError for what is worse.
    """
    try:
        return _decode(payload)
    except msgspec.ValidationError:
        return [_mended(values) for values in _decode_values(payload)]


def _mended(values: list[Any]) -> Receipt:
    faults = []
    for at, (field, value) in enumerate(zip(msgspec.structs.fields(Receipt), values, strict=False)):
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            values[at] = _BLANKS.get(field.type)
            faults.append(field.name)
    receipt = msgspec.convert(values, Receipt)
    if faults:
        _log.error("plugin gave values of a wrong kind, left out", protocol=receipt.protocol, fields=faults)
    return receipt


def epoch_of(name: str) -> str:
    """Return which worker process wrote the segment: its name without the number and ``.log``."""
    return name.rpartition("-")[0]


class Segment:
    """An open segment file: how far it was read, and whether its writer is gone."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.offset = offset
        self.is_abandoned = False
        self.damage = ""
        self._suspect_offset = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    @property
    def name(self) -> str:
        """Return the name under which the store keeps the offset."""
        return self.path.name

    def size(self) -> int:
        """Return the bytes in the file now."""
        return os.fstat(self._fd).st_size

    def is_on_disk(self) -> bool:
        """Tell whether no sync of the file has failed, see `syncer`."""
        return bool(os.fstat(self._fd).st_mode & stat.S_IWUSR)

    def has_more(self) -> bool:
        """Tell whether there are bytes to read, or the last word whether the writer is gone."""
        self._look_for_writer()
        return self.size() != self.offset

    def read(self, rows_max: int) -> Cut:
        """Cut the next receipts off the file; moves nothing. Looks first whether the writer is gone.

        Sets `damage` when the file cannot be read on.
        """
        self._look_for_writer()
        found = cut(os.pread(self._fd, CHUNK_BYTES, self.offset), rows_max)
        if not found.bytes_used and found.bytes_wanted > CHUNK_BYTES:
            found = cut(os.pread(self._fd, found.bytes_wanted, self.offset), rows_max)
        if not found.bytes_used:
            self.damage = self._judge(found.damage)
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _look_for_writer(self) -> None:
        """Take the lock if it is free; nothing is written after that, so what is read next is all."""
        if self.is_abandoned:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        self.is_abandoned = True

    def _judge(self, fault: str) -> str:
        """Say what keeps the file from being read on, empty if it is only unfinished or torn at its end."""
        if self.is_abandoned:
            rest = os.pread(self._fd, TORN_BYTES_MAX + 1, self.offset)
            torn = len(rest) <= TORN_BYTES_MAX and not holds_frame(rest[1:])
            return "" if torn else fault or "frame length reaches past the end"
        # A live writer's bytes might be seen half written; only what is wrong twice is wrong.
        was_suspect, self._suspect_offset = self._suspect_offset, self.offset if fault else -1
        return fault if was_suspect == self.offset else ""


def holds_frame(data: bytes) -> bool:
    """Tell whether a whole frame begins anywhere in `data`: what is before it is damage then, no torn end."""
    for start in range(len(data) - _HEAD.size):
        length, check = _HEAD.unpack_from(data, start)
        end = start + _HEAD.size + length
        if length > 0 and end <= len(data) and crc32(memoryview(data)[start + _HEAD.size : end]) == check:
            return True
    return False
