"""AppendLogSnapshot where the log is good, and what is around it is not."""

from __future__ import annotations

import errno
import gc
from collections.abc import Sequence
from pathlib import Path

import pytest

from foldlog import AppendLogSnapshot, CursorRegressed, LogPoisonedError, Put, WatchCursor
from foldlog.protocol.updates import Batch, encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import OS_FILES
from foldlog.storage.log.log import Log
from foldlog.storage.log.sidecars.lock import WriterLock
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Fault, FaultyFiles
from foldlog.testing.faults import Call

NEVER = 1 << 40


def filled(path: Path) -> None:
    with AppendLogSnapshot.open(path, NEVER)[1] as snap:
        for number in range(1, 11):
            snap.apply([Put("k", b"%d" % number)], WatchCursor.from_u64(number))


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("create", errno.ENOSPC),  # a full disk
        ("create", errno.EACCES),  # a directory that must not be written to
        ("create", errno.EROFS),
        ("write", errno.EDQUOT),
        ("replace", errno.EBUSY),  # a file that is bind-mounted
        ("open_read", errno.EMFILE),
    ],
)
def test_a_good_log_that_cannot_be_compacted_is_opened_and_the_report_says_so(
    tmp_path: Path, operation: str, error: int
) -> None:
    """Opening demanded room for a second copy, and the right to make one."""
    path = tmp_path / "log"
    filled(path)
    before = path.read_bytes()

    def fail_for_the_copy(call: Call) -> None:
        if call.operation != operation:
            return
        name = str(call.args[0])
        if operation == "write":
            name = str(Path(f"/proc/self/fd/{name}").readlink())
        if ".tmp-" in name:
            raise OSError(error, "no")

    files = FaultyFiles(hook=fail_for_the_copy)
    at, snap = AppendLogSnapshot.open(path, files=files)
    with snap:
        assert at == WatchCursor.from_u64(10)
        assert snap.get("k").value == b"10"
        assert not snap.report.compacted
        assert snap.report.compaction_error.startswith(type(OSError(error, "")).__name__)
        assert path.read_bytes() == before
        assert snap.apply([Put("k", b"11")], WatchCursor.from_u64(11)) == 11
        files.disarm()
        snap.compact()
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"log"}
    with AppendLogSnapshot.open(path)[1] as again:
        assert again.get("k").value == b"11"
        assert again.report.compaction_error == ""


def test_a_poisoned_log_that_cannot_be_rewritten_is_not_opened(tmp_path: Path) -> None:
    """Nothing could be acknowledged through it."""
    path = tmp_path / "log"
    filled(path)
    files = FaultyFiles()
    _, snap = AppendLogSnapshot.open(path, NEVER, files=files)
    snap.apply([Put("k", b"11")], WatchCursor.from_u64(11))
    files.arm(Fault("sync"))
    with pytest.raises(LogPoisonedError):
        snap.sync()
    snap.close()
    files.arm(Fault("replace", error=errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        AppendLogSnapshot.open(path, files=files)


def test_a_group_that_finds_no_memory_beside_a_compaction_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was folded into what the compaction adopts only after it was written: the caller met a
    MemoryError, and the batch was in the log."""
    path = tmp_path / "log"
    filled(path)
    engine = LogEngine(path)
    rewrite = engine.begin_compaction()
    rewrite.write()
    before = path.stat().st_size
    folded = FoldSnapshot.with_group

    def no_memory(fold: FoldSnapshot, batches: Sequence[Batch]) -> FoldSnapshot:
        if fold.base is EMPTY_BASE:
            raise MemoryError
        return folded(fold, batches)

    lost = encode_batch([Put("lost", b"")], WatchCursor.from_u64(11))
    with monkeypatch.context() as patch:
        patch.setattr(FoldSnapshot, "with_group", no_memory)
        with pytest.raises(MemoryError):
            engine.commit([lost])
    assert path.stat().st_size == before
    engine.commit([encode_batch([Put("k", b"11")], WatchCursor.from_u64(11))])
    fold = engine.finish_compaction(rewrite)
    assert [(e.key, e.value) for e in fold.range()] == [("k", b"11")]
    assert fold.seq == 11
    engine.close()


def test_a_close_that_is_repeated_seals_the_log_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was interrupted after it had sealed the log wrote a second SEAL frame, out of any
    session: verify took it for damage."""
    path = tmp_path / "log"
    engine = LogEngine(path)
    engine.commit([encode_batch([Put("k", b"1")], WatchCursor.from_u64(1))])

    def no_memory(log: Log) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Log, "abandon", no_memory)
        with pytest.raises(MemoryError):
            engine.close()
    size = path.stat().st_size
    engine.close()
    assert path.stat().st_size == size
    assert verify_log(path).ok


def test_forward_only_knows_the_cursor_of_a_call_that_was_interrupted_once_it_had_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cursor was compared with that of the batch before: it went back from 20 to 15."""
    append = Log.append

    def append_and_interrupt(log: Log, items: Sequence[bytes]) -> None:
        append(log, items)
        raise KeyboardInterrupt

    path = tmp_path / "log"
    filled(path)
    with AppendLogSnapshot.open(path)[1] as snap:
        with monkeypatch.context() as patch:
            patch.setattr(Log, "append", append_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                snap.apply([Put("k", b"20")], WatchCursor.from_u64(20))
        with pytest.raises(CursorRegressed):
            snap.apply([], WatchCursor.from_u64(15), forward_only=True)
        assert snap.get("k").value == b"20"
        assert snap.apply([], WatchCursor.from_u64(20), forward_only=True) == 12


def test_a_fold_that_is_released_piece_by_piece_gives_up_its_file_first(path: Path):
    """Beside a busy writer, each piece takes a turn of the interpreter lock: for 0.3 s and more, a
    disk without room kept a file that a compaction had replaced.
    """
    _, snap = AppendLogSnapshot.open(path)
    with snap:
        snap.apply([Put("a", b"1")], 1)
        snap.compact()
        snap.get("a")
        fold = snap.snapshot()
        parts = fold.parts()
        assert parts.pop() is fold.source
        assert all(parts), "an empty piece takes a turn as well"


def test_an_engine_that_is_lost_before_it_is_stored_lets_go_of_its_lock(path: Path):
    """An interrupt just after it was made left the log locked until the process ended."""
    LogEngine(path).commit((encode_batch([Put("a", b"1")], 1),))
    gc.collect()
    WriterLock(OS_FILES, path)  # the same, before there is an engine
    gc.collect()
    engine = LogEngine(path)
    assert engine.fold.seq == 1
    engine.close()
