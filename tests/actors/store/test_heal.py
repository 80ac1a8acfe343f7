"""A store whose log was deleted writes it anew, unless somebody was faster: then it fails, and what
is there stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from actor_kit import DEADLINE_S, batch, cursor, read_back, until

import foldlog
from foldlog import AppendLogSnapshot, Put
from foldlog.storage.log.sidecars.lock import lock_path, note_path

OpenStore = Callable[..., foldlog.Store]


def remove_all_of_it(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        if ".tmp-" not in file.name:
            file.unlink()


def another_opens(path: Path) -> None:
    remove_all_of_it(path)
    _, snap = AppendLogSnapshot.open(path, sync="always")
    snap.apply([Put("theirs", b"answered")], cursor(1))
    snap._engine.log.abandon()


def a_backup_is_put_there(path: Path) -> None:
    path.write_bytes(b"a backup")


def the_directory_is_moved(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def the_directory_is_unmounted(path: Path) -> None:
    the_directory_is_moved(path)
    path.parent.mkdir()


DEEDS = [another_opens, a_backup_is_put_there, the_directory_is_moved, the_directory_is_unmounted]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    if not folder.exists():
        return {}
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()}


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
@pytest.mark.parametrize("step", ["writer.start", "writer.heal"])
def test_whoever_is_faster_than_the_healing_keeps_what_is_his(
    open_store: OpenStore, steps, path, deed, step
) -> None:
    """`rm LOG; cp backup LOG` was healed over the backup; after `rm LOG*` beside another process
    that opened, what that had answered under sync="always" was lost."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    gate = steps.park(step)
    path.unlink()
    gate.wait_until_reached()
    deed(path)
    theirs = tree(path.parent)
    gate.open()
    until(lambda: store.state == "failed", "the store gives up")
    assert "LogChangedError" in store.stats().reason
    assert tree(path.parent) == theirs
    assert store.get("batch/000001") is not None, "reads go on"
    store.close()
    assert tree(path.parent) == theirs


def test_a_log_deleted_with_all_beside_it_comes_back_locked(open_store: OpenStore, path) -> None:
    store = open_store()
    store.apply(batch(1), cursor(1))
    remove_all_of_it(path)
    assert store.apply_async(batch(2), cursor(2)).result(DEADLINE_S) == 2
    assert lock_path(path).exists()
    assert note_path(path).exists()
    with pytest.raises(foldlog.StoreLocked) as caught:
        AppendLogSnapshot.open(path)
    assert caught.value.pid == os.getpid()
    store.close()
    assert read_back(path).seq == 2


@pytest.mark.parametrize("side", [lock_path, note_path])
def test_a_lock_file_or_note_that_was_deleted_is_back_within_an_interval(
    open_store: OpenStore, path, side
) -> None:
    store = open_store(sync_interval_s=0.02)
    store.apply(batch(1), cursor(1))
    side(path).unlink()
    until(side(path).exists, "it is made anew")
    assert store.apply(batch(2), cursor(2)) == 2
    assert store.state == "running"


def test_a_name_beside_the_log_that_is_taken_is_told_at_open(open_store: OpenStore, path) -> None:
    lock_path(path).symlink_to(path.parent / "precious")
    with pytest.raises(foldlog.ForeignFileError) as caught:
        open_store()
    assert caught.value.path == lock_path(path)
    assert [file.name for file in path.parent.iterdir()] == [lock_path(path).name]


def test_a_store_that_could_not_open_leaves_nothing_behind(open_store: OpenStore, path) -> None:
    path.write_bytes(b"import os\n")
    with pytest.raises(foldlog.InvalidFormatError):
        open_store()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
