"""A log that ends before what the note beside it remembers as synced: every reader says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import run
from logfiles import frames_of, reboot, write_log

from foldlog import AppendLogSnapshot, LogRegressedError, Put, WatchCursor
from foldlog.protocol.frames import KIND_BATCHES
from foldlog.storage.formats.registry import load_intact
from foldlog.storage.log.files import OS_FILES, ReadHandle
from foldlog.storage.log.sidecars.lock import note_path
from foldlog.storage.log.tail import Tail
from foldlog.storage.repair.salvage import salvage_log
from foldlog.storage.repair.verify import verify_log


@pytest.fixture
def regressed(path: Path) -> Path:
    """A log whose last batch was synced, and is gone; the note beside it is as its writer left
    it."""
    with AppendLogSnapshot.open(path, sync="always")[1] as snap:
        for number in (1, 2):
            snap.apply([Put("a", b"%d" % number)], WatchCursor.from_u64(number))
    raw = path.read_bytes()
    last = [frame for frame in frames_of(raw) if frame.header.kind == KIND_BATCHES][-1]
    path.write_bytes(raw[: last.start])
    return path


def test_no_reader_serves_a_log_that_lost_what_was_synced(regressed: Path):
    """A follower served the old value, and `get`, `info` and `verify` found nothing wrong."""
    with pytest.raises(LogRegressedError, match="batch 2 was synced"):
        load_intact(ReadHandle(OS_FILES, regressed))
    with pytest.raises(LogRegressedError):
        Tail(OS_FILES, regressed).poll()
    report = verify_log(regressed)
    assert [problem.reason for problem in report.problems] == [
        "the log ends with batch 1, but batch 2 was synced to it"
    ]
    for command in (["get", "a"], ["range"], ["info"], ["export", "out"], ["verify"]):
        result = run(command[0], regressed, *command[1:])
        assert result.exit_code == 1
        assert "batch 2 was synced" in result.output


def test_dump_and_salvage_report_what_was_synced_and_is_gone(regressed: Path):
    """`dump` ended with exit code 0, and `salvage` listed no loss."""
    result = run("dump", regressed)
    assert result.exit_code == 1
    assert "batch 2 was synced" in result.output.splitlines()[-1]
    report = salvage_log(regressed, regressed.with_name("saved.log"))
    assert [loss[1:] for loss in report.losses] == [
        (
            0,
            "the log ends with batch 1, but batch 2 was synced to it",
            2,
            2,
            WatchCursor.from_u64(1),
            None,
            None,
            (),
        )
    ]
    assert report.cursor == WatchCursor.from_u64(1)


@pytest.mark.parametrize("kept", [60, 10])
def test_salvage_reports_a_batch_that_was_synced_once(path: Path, kept: int):
    """The torn frame's header may show which batches are lost, or not."""
    with AppendLogSnapshot.open(path, sync="always")[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        size = path.stat().st_size
        snap.apply([Put("a", b"2")], WatchCursor.from_u64(2))
        snap.apply([Put("a", b"3")], WatchCursor.from_u64(3))
    path.write_bytes(path.read_bytes()[: size + kept])
    losses = salvage_log(path, path.with_name("saved.log")).losses
    assert [(loss.offset, loss.first_seq, loss.last_seq) for loss in losses] == (
        [(size, 2, 2), (size + kept, 3, 3)] if kept == 60 else [(size, 2, None)]
    )


def test_a_torn_tail_that_was_synced_is_a_regression_to_a_follower_too(path: Path):
    with AppendLogSnapshot.open(path, sync="always")[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        size = path.stat().st_size
        snap.apply([Put("a", b"2")], WatchCursor.from_u64(2))
    path.write_bytes(path.read_bytes()[: size + 60])
    with pytest.raises(LogRegressedError):
        Tail(OS_FILES, path).poll()
    with pytest.raises(LogRegressedError):
        load_intact(ReadHandle(OS_FILES, path))


def test_a_note_that_is_newer_than_what_was_read_says_nothing(path: Path):
    """A writer appends, syncs and compacts beside its readers: the note is ahead of what they have
    read by then."""
    with AppendLogSnapshot.open(path, sync="always")[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        old = ReadHandle(OS_FILES, path)
        load = load_intact(old)
        snap.apply([Put("a", b"2")], WatchCursor.from_u64(2))
        snap.compact()
        snap.apply([Put("a", b"3")], WatchCursor.from_u64(3))
        assert load.fold.get("a").value == b"1"
        assert load_intact(old).fold.get("a").value == b"2", "the file as the compaction left it"
        assert load_intact(ReadHandle(OS_FILES, path)).fold.get("a").value == b"3"


def test_the_note_of_another_log_says_nothing(regressed: Path, tmp_path: Path):
    other = tmp_path / "other.log"
    raw = write_log(other, [[Put("b", b"1")]])
    regressed.write_bytes(raw)
    assert load_intact(ReadHandle(OS_FILES, regressed)).fold.get("b").value == b"1"
    assert verify_log(regressed).ok


def test_a_flip_after_a_reboot_is_refused_though_the_value_holds_a_sector_of_zeros(
    path: Path, monkeypatch
):
    """Each of 12,720 flips in the last frame, which was synced, read as a torn tail, with and
    without the note."""
    write_log(path, [[Put("k", b"v")]], sync_each=True)
    size = path.stat().st_size
    value = b"\1" + bytes(1500) + b"\2"
    with AppendLogSnapshot.open(path, sync="always", compact_threshold=1 << 40)[1] as snap:
        snap.apply([Put("image", value)], WatchCursor.from_u64(6))
        raw = path.read_bytes()
        snap._engine.log.abandon()
    note_path(path).unlink()
    reboot(monkeypatch)
    last = frames_of(raw)[-1]
    assert last.start > 52
    assert size
    for at in range(last.start, last.end, 3):
        path.write_bytes(raw[:at] + bytes((raw[at] ^ 1 << at % 8,)) + raw[at + 1 :])
        assert not verify_log(path).ok, at
