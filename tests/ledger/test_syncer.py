"""What workers wrote is brought to disk soon, each byte once."""

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from journals import Hire, frames, hiring, open_files
from structlog.testing import capture_logs

from gpuproxy.ledger.syncer import Syncer


@pytest.fixture
def hire(tmp_path: Path) -> Iterator[Hire]:
    """Return a function that starts a worker on a segment."""
    with hiring(tmp_path) as start:
        yield start


@pytest.fixture
def syncer(tmp_path: Path) -> Iterator[Syncer]:
    made = Syncer(tmp_path)
    yield made
    made.close()


def test_segments_that_grew_are_synced_and_only_those(syncer: Syncer, hire: Hire) -> None:
    first, second = hire("a"), hire("b")
    assert syncer.sync_once() == 0
    first.write(frames(0, 1))
    second.write(frames(1, 2))
    assert [syncer.sync_once(), syncer.sync_once()] == [2, 0]
    second.write(frames(2, 3))
    assert [syncer.sync_once(), syncer.sync_once()] == [1, 0]


def test_a_new_segment_is_synced_at_once(syncer: Syncer, hire: Hire) -> None:
    for name in "abcdefgh":
        assert syncer.sync_once() == 0
        hire(name).write(frames(0, 1))
        assert syncer.sync_once() == 1


def test_a_segment_that_is_gone_is_closed(syncer: Syncer, hire: Hire) -> None:
    worker = hire("a")
    worker.write(frames(0, 1))
    syncer.sync_once()
    worker.leaves()
    assert str(worker.path) in open_files()
    worker.path.unlink()
    assert syncer.sync_once() == 0
    assert not [path for path in open_files() if path.startswith(str(worker.path))]


def test_other_files_and_a_missing_directory_are_nothing_to_sync(tmp_path: Path) -> None:
    (tmp_path / "a.damaged").write_bytes(b"x")
    assert Syncer(tmp_path).sync_once() == 0
    assert Syncer(tmp_path / "none").sync_once() == 0


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])  # of the segment, of the directory
def test_a_segment_whose_sync_failed_is_never_synced_again(
    syncer: Syncer, hire: Hire, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    worker = hire("a")
    worker.write(frames(0, 1))
    with monkeypatch.context() as disk, capture_logs() as logs:
        disk.setattr(f"os.{call}", _fails)
        syncer.sync_once()
    assert [line["segments"] for line in logs] == [[worker.path.name]]
    worker.write(frames(1, 2))
    successor = Syncer(worker.path.parent)
    assert [syncer.sync_once(), successor.sync_once()] == [0, 0]
    successor.close()
    assert not worker.path.stat().st_mode & stat.S_IWUSR
    hire("b").write(frames(2, 3))
    assert syncer.sync_once() == 1


def _fails(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_it_runs_until_it_is_stopped_and_leaves_no_file_open(tmp_path: Path, hire: Hire) -> None:
    worker = hire("a")
    worker.write(frames(0, 1))
    syncer = Syncer(tmp_path)
    running = threading.Thread(target=syncer.run, args=(0.001,))
    running.start()
    worker.leaves()
    deadline_s = time.monotonic() + 10
    while str(worker.path) not in open_files():
        assert time.monotonic() < deadline_s
    syncer.stop()
    running.join(10)
    assert not running.is_alive()
    assert str(worker.path) not in open_files()
