"""The worker's end of the journal while the disk gives trouble: nothing lost, nothing where it does not belong."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from gpuproxy import config
from gpuproxy.ledger.segment import cut
from gpuproxy.proxy.journal import Journal, frame
from gpuproxy.types import Outcome, Receipt

TINY = config.Journal(segment_bytes=1)  # every write ends a segment


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def receipt(name: str, outcome: Outcome = "ok") -> Receipt:
    texts = ("",) * 6
    return Receipt(name, name, 1, 2, 3, *texts, "/", 200, outcome, "", 0, 0, 0, 0, 0, "none", 1, False)


def written(directory: Path) -> list[str]:
    """Return the ids of the receipts in the files of the journal."""
    found = (cut(path.read_bytes(), 1_000) for path in sorted(directory.iterdir()))
    return [row[0] for each in found for row in each.rows]


@contextmanager
def full_disk(file_bytes: int = 0) -> Iterator[None]:
    """Let no file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_of_one_receipt_keeps_no_other_back(directory: Path) -> None:
    journal = Journal(directory, "000-1", config.Journal())
    odd = structs.replace(receipt("b"), protocol="words", model="\udcff", rpc_name="tool", attempts=1 << 64)
    for each in (receipt("a"), odd, receipt("c")):
        journal.append(each)
    with capture_logs() as logs:
        journal.close()
    assert [(line["protocol"], line["fields"]) for line in logs] == [("'words'", ["model", "attempts"])]
    a, b, c = cut((directory / "000-1-000001.log").read_bytes(), 9).rows
    assert Receipt(*b) == structs.replace(odd, model="", attempts=-1)
    assert (Receipt(*a), Receipt(*c)) == (receipt("a"), receipt("c"))


@pytest.mark.parametrize("odd", [5, None, ["m"], 1.5], ids=repr)
def test_what_cannot_be_read_of_one_receipt_keeps_no_other_back(odd: Any) -> None:
    wrong = structs.replace(receipt("b"), model=odd, protocol="words", attempts=2.5, usage_source="guess")
    with capture_logs() as logs:
        found = cut(frame([receipt("a"), wrong, receipt("c")]), 9)
    assert not found.damage
    assert [Receipt(*row) for row in found.rows] == [
        receipt("a"),
        structs.replace(wrong, model="", attempts=-1, usage_source="none"),
        receipt("c"),
    ]
    (told,) = logs
    assert (told["protocol"], told["fields"]) == ("words", ["model", "usage_source", "attempts"])


@pytest.mark.parametrize("settings", [TINY, config.Journal(bytes_max=1)], ids=["a segment is full", "the journal is"])
def test_where_no_new_segment_can_be_made_the_old_one_goes_on(directory: Path, settings: config.Journal) -> None:
    journal = Journal(directory, "000-1", settings)
    in_the_way = directory / "000-1-000002.new"
    in_the_way.touch()
    journal.append(receipt("a"))
    with suppress(OSError):
        journal.flush()
        journal.measure()
    with (directory / "a file, or a client's socket").open("wb") as innocent:
        journal.append(receipt("b"))
        journal.flush()
        assert os.fstat(innocent.fileno()).st_size == 0, "receipts went where the journal had been"
    journal.append(receipt("c"))
    journal.close()
    assert written(directory) == ["a", "b", "c"]


def test_what_a_full_disk_does_not_take_is_written_when_it_does(directory: Path) -> None:
    journal = Journal(directory, "000-1", config.Journal())
    journal.append(receipt("a"))
    journal.flush()
    with full_disk(directory.joinpath("000-1-000001.log").stat().st_size + 10), capture_logs() as logs:
        for name in "bc":
            journal.append(receipt(name))
            journal.flush()
        assert journal.is_full
    journal.measure()
    assert not journal.is_full
    journal.close()
    assert written(directory) == ["a", "b", "c"]
    assert [line["event"] for line in logs] == ["journal cannot be written"]


def test_no_call_is_taken_until_a_segment_that_is_not_on_disk_is_stored(directory: Path) -> None:
    journal = Journal(directory, "000-1", config.Journal())
    journal.append(receipt("a"))
    journal.flush()
    given_up = directory / "000-1-000001.log"
    given_up.chmod(0o400)
    with capture_logs() as logs:
        journal.measure()
        journal.append(receipt("b"))
        journal.measure()
        assert journal.is_full
        assert [row[0] for row in cut(given_up.read_bytes(), 9).rows] == ["a"], "it goes on in a new segment"
        given_up.rename(given_up.with_suffix(".damaged"))  # or gone: control puts it away once it has read it
        journal.measure()
    assert not journal.is_full
    journal.close()
    assert written(directory) == ["a", "b"]
    assert [line["log_level"] for line in logs] == ["warning", "warning"]


def test_checkpoints_do_not_pile_up_while_the_disk_takes_nothing(directory: Path) -> None:
    journal = Journal(directory, "000-1", config.Journal())
    with full_disk(), capture_logs():
        journal.append(receipt("a", "open"))
        journal.flush()
        for _ in range(1_000):
            journal.append(receipt("a", "open"))
            journal.flush()
        journal.append(receipt("a"))
        journal.flush()
    journal.close()
    assert written(directory) == ["a", "a"]


def test_receipts_that_a_stopping_worker_cannot_write_are_told_of(directory: Path) -> None:
    journal = Journal(directory, "000-1", config.Journal())
    with full_disk(), capture_logs() as logs:
        journal.append(receipt("a"))
        journal.close()
    assert [line for line in logs if line["log_level"] == "error" and line.get("lost_bytes")]
