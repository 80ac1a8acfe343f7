"""Someone else changes the log while it is open: the writer detects it first; nothing is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from logfiles import some_batches, write_log

from foldlog import AppendLogSnapshot, CorruptLogError, LogChangedError, Put, WatchCursor


@pytest.fixture
def snap(path):
    _, snap = AppendLogSnapshot.open(path)
    snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
    yield snap
    snap.close()


def put_there(path, raw):
    path.with_name("other").write_bytes(raw)
    os.replace(path.with_name("other"), path)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"x")


def rename(path):
    path.rename(path.with_name("moved.log"))


def put_a_file_in_the_folders_place(path):
    rename(path.parent)
    path.parent.write_bytes(b"")


CHANGES = {
    "deleted": Path.unlink,
    "replaced by a copy": lambda path: put_there(path, path.read_bytes()),
    "replaced by another log": lambda path: put_there(
        path, write_log(path.with_name("other.log"), some_batches(2))
    ),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": grow,
    "renamed": rename,
    "its folder removed": lambda path: shutil.rmtree(path.parent),
    "its folder renamed": lambda path: rename(path.parent),
    "its folder replaced by a file": put_a_file_in_the_folders_place,
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def contents(path):
    return path.read_bytes() if path.is_file() else None


@changes
def test_a_changed_log_takes_no_more_batches_and_reads_go_on(snap, path, change):
    change(path)
    after = contents(path)
    for _ in range(2):
        with pytest.raises(LogChangedError) as caught:
            snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
        assert caught.value.path == path
        assert contents(path) == after
    assert [(entry.key, entry.value) for entry in snap.range("")] == [("a", b"1")]
    assert snap.get("b") is None
    assert snap.cursor() == WatchCursor.from_u64(1)
    snap.close()
    assert contents(path) == after


@changes
def test_a_changed_log_is_not_compacted_over(snap, path, change):
    change(path)
    after = contents(path)
    with pytest.raises((LogChangedError, OSError)):
        snap.compact()
    assert contents(path) == after
    assert not path.with_name(path.name + ".tmp").exists()
    assert snap.get("a").value == b"1"


@changes
def test_the_state_of_a_changed_log_can_still_be_exported(snap, path, change, tmp_path):
    change(path)
    snap.export_to(tmp_path / "rescued")
    _, rescued = AppendLogSnapshot.import_artifact(tmp_path / "rescued", tmp_path / "rescued.log")
    with rescued:
        assert rescued.get("a").value == b"1"


def test_a_log_that_comes_back_takes_batches_again(snap, path):
    rename(path)
    with pytest.raises(LogChangedError):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    path.with_name("moved.log").rename(path)
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.close()
    with AppendLogSnapshot.open(path)[1] as again:
        assert [entry.key for entry in again.range("")] == ["a", "b"]
        assert again.report.cut_bytes == 0


def test_a_base_that_outlives_its_file_is_read_on(path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"k{n:04}", b"%d" % n) for n in range(1000)], WatchCursor.from_u64(1))
        snap.compact()
        path.unlink()
        assert snap.get("k0500").value == b"500"
        assert len(snap.range("")) == 1000


def test_a_base_that_is_cut_off_under_a_reader_is_a_typed_error_and_no_crash(path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"k{n:04}", b"%d" % n) for n in range(1000)], WatchCursor.from_u64(1))
        snap.compact()
        os.truncate(path, 100)
        with pytest.raises(CorruptLogError):
            snap.get("k0500")
        with pytest.raises(CorruptLogError):
            snap.range("")
