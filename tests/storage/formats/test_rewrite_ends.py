"""How a compaction ends: faults after the rename lose nothing, leak nothing, and are reported."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from logfiles import companions

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Put,
    ReentrantCall,
    StoreClosed,
    WatchCursor,
)
from foldlog.testing import CrashFiles, Fault, FaultyFiles

NEVER = 1 << 40


def test_a_replaced_file_that_fails_to_close_takes_nothing_with_it(tmp_path: Path) -> None:
    """The rename must be durable before anything is acknowledged through the new file."""
    work = tmp_path / "work"
    work.mkdir()
    crash = CrashFiles(work)
    files = FaultyFiles(inner=crash)
    with AppendLogSnapshot.open(work / "log", NEVER, sync="always", files=files)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        files.arm(Fault(operation="close", nth=1, error=errno.EIO))
        snap.compact()
        assert files.fired, "the old file was not closed"
        files.disarm()
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
        images = 0
        for number, image in enumerate(crash.images(64)):
            left = tmp_path / f"image-{number}"
            left.mkdir()
            image.write_to(left)
            with AppendLogSnapshot.open(left / "log")[1] as found:
                assert [(entry.key, entry.value) for entry in found.range("")] == [
                    ("a", b"1"),
                    ("b", b"2"),
                ]
            images += 1
        assert images


def test_closing_an_engine_from_within_its_compaction_is_refused_and_ends_it(
    tmp_path: Path,
) -> None:
    """A signal's handler may close what its own thread is compacting: it cannot wait for itself."""
    path = tmp_path / "log"
    _, snap = AppendLogSnapshot.open(path, NEVER)
    snap.apply([Put(f"{number:03}", b"1") for number in range(600)], WatchCursor.from_u64(1))
    with pytest.raises(ReentrantCall):
        snap.compact(lambda done, total: snap.close())
    assert snap.get("005") is not None
    snap.close()
    with pytest.raises(StoreClosed):
        snap.get("005")
    assert {file.name for file in tmp_path.iterdir()} == {"log", *companions(tmp_path / "log")}
    with AppendLogSnapshot.open(path)[1] as again:
        assert len(again) == 600


def test_damage_behind_a_compaction_is_told_with_the_name_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with AppendLogSnapshot.open(path, NEVER)[1] as snap:
        snap.apply([Put("key", b"value of the key")], WatchCursor.from_u64(1))
        snap.compact()
        data = bytearray(path.read_bytes())
        data[data.index(b"value of the key")] ^= 1
        with path.open("r+b") as file:
            file.write(data)
        with pytest.raises(CorruptLogError, match="key") as caught:
            snap.get("key")
        assert caught.value.path == path
