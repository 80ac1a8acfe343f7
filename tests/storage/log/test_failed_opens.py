"""A call that failed has no file open, even while somebody keeps its error.

A failed `open` left its read handle to the finalizer, and the error's traceback referred to it:
who logged the error later, or opened another store meanwhile, found the log still open.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actor_kit import descriptors
from faultkit import MAX_CALLS

import foldlog
from foldlog import AppendLogSnapshot, FoldlogError, Put, WatchCursor
from foldlog.storage.log.log import Log
from foldlog.storage.repair.salvage import salvage_log
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Fault, FaultyFiles, UnsyncedFiles


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_engine(folder: Path, files: FaultyFiles) -> None:
    AppendLogSnapshot.open(folder / "log", files=files, compact_threshold=0)[1].close()


def open_store(folder: Path, files: FaultyFiles) -> None:
    foldlog.open(folder / "log", files=files).close()


def follow(folder: Path, files: FaultyFiles) -> None:
    foldlog.follow(folder / "log", files=files).close()


def verify(folder: Path, files: FaultyFiles) -> None:
    assert verify_log(folder / "log", files=files).ok


def salvage(folder: Path, files: FaultyFiles) -> None:
    salvage_log(folder / "log", folder / "salvaged", files=files)


def import_own(folder: Path, files: FaultyFiles, format: str = "foldlog") -> None:
    source, dest = folder / "artifact", folder / "imported"
    AppendLogSnapshot.import_artifact(source, dest, format=format, files=files)[1].close()


def import_other(folder: Path, files: FaultyFiles) -> None:
    import_own(folder, files, "slipstream-v2")


CALLS = [open_engine, open_store, follow, verify, salvage, import_own, import_other]


def make(folder: Path, *, artifact: bool) -> None:
    folder.mkdir()
    with AppendLogSnapshot.open(folder / "log", files=UnsyncedFiles())[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        if artifact:
            snap.export_to(folder / "artifact")
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))


OPERATIONS = ["fstat", "read", "read_into", "open_read", "open_write", "sync", "list_dir", "access"]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_that_failed_has_no_file_open_while_its_error_is_kept(
    tmp_path: Path, call: Callable[[Path, FaultyFiles], None], operation: str
) -> None:
    errors: list[Exception] = []  # their tracebacks refer to all that the calls had open
    for nth in range(1, MAX_CALLS):
        folder = tmp_path / str(nth)
        make(folder, artifact=call in (import_own, import_other))
        files = FaultyFiles(inner=UnsyncedFiles())
        files.arm(Fault(operation, nth=nth))
        try:
            call(folder, files)
        except (OSError, FoldlogError) as error:
            errors.append(error)
            assert descriptors(folder) == [], f"{operation} {nth}: {errors}"
        if not files.fired:
            return
    raise AssertionError("it never completes")


def test_a_log_that_could_not_be_abandoned_for_lack_of_memory_is_by_the_next_call(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as abandoned: the next opening in this process found it locked."""
    log = AppendLogSnapshot.open(path)[1]._engine.log

    def run_out(self: Log) -> set[int]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Log, "_successors_fd", run_out)
        with pytest.raises(MemoryError):
            log.abandon()
    log.abandon()
    AppendLogSnapshot.open(path)[1].close()


def test_a_successor_that_its_writer_has_closed_is_not_closed_again(path: Path) -> None:
    """The number of its descriptor may be that of another file by then."""
    log = AppendLogSnapshot.open(path)[1]._engine.log
    other = path.with_name("other")
    other.touch()
    log.announce(log.file._replace(fd=os.open(other, os.O_RDWR)))
    assert log._successor is not None
    number = log._successor[1].fd
    os.close(number)
    taken = os.open(path.parent, os.O_RDONLY)
    assert taken == number
    log.abandon()
    os.fstat(taken)
    os.close(taken)
