"""What has the log's name when a rewrite ends: at whatever call somebody steps in, nothing of his
is overwritten.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from logfiles import some_batches, write_log

from foldlog import AppendLogSnapshot, FoldlogError, LogChangedError, LogPoisonedError, Put
from foldlog import WatchCursor as Cursor
from foldlog.storage.log.sidecars.lock import lock_path
from foldlog.testing import Call, Fault, FaultyFiles, UnsyncedFiles

THEIRS = b"theirs"


def open_there(path: Path) -> None:
    """Another process opens a log of that name, is answered under sync="always", and goes on."""
    _, snap = AppendLogSnapshot.open(path, sync="always")
    snap.apply([Put("theirs", b"answered")], Cursor.from_u64(1))
    snap._engine.log.abandon()


def remove_all_of_it(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        if ".tmp-" not in file.name:
            file.unlink()


def remove_all_and_open(path: Path) -> None:
    remove_all_of_it(path)
    open_there(path)


def put_a_backup_there(path: Path, content: bytes = THEIRS) -> None:
    backup = path.parent.parent / "backup"
    backup.write_bytes(content)
    os.replace(backup, path)


def put_a_copy_there(path: Path) -> None:
    put_a_backup_there(path, path.read_bytes() if path.is_file() else THEIRS)


def make_a_link_there(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent.parent / "elsewhere")


def make_a_directory_there(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def move_the_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def put_another_directory_there(path: Path) -> None:
    move_the_directory(path)
    path.parent.mkdir()


def put_another_directory_with_a_log_there(path: Path) -> None:
    put_another_directory_there(path)
    open_there(path)


DEEDS = [remove_all_and_open, put_a_backup_there, put_a_copy_there, make_a_link_there]
DEEDS += [make_a_directory_there]
DEEDS += [move_the_directory, put_another_directory_there, put_another_directory_with_a_log_there]


def what_stands_there(path: Path) -> object:
    if not os.path.lexists(path):
        return None
    inode = path.lstat().st_ino
    if path.is_symlink():
        return inode, os.readlink(path)
    return inode, "directory" if path.is_dir() else path.read_bytes()


def poisoned_by_a_failed_fsync(snap: AppendLogSnapshot, path: Path, files: FaultyFiles) -> None:
    files.arm(Fault("sync"))
    with pytest.raises(LogPoisonedError):
        snap.sync()


def deleted(snap: AppendLogSnapshot, path: Path, files: FaultyFiles) -> None:
    path.unlink()
    assert snap._engine.log.was_deleted()
    snap._engine.log.poison_with("was deleted")


def as_it_should_be(snap: AppendLogSnapshot, path: Path, files: FaultyFiles) -> None:
    pass


STATES = [poisoned_by_a_failed_fsync, deleted, as_it_should_be]
State = Callable[[AppendLogSnapshot, Path, FaultyFiles], None]


def rewrite_with_a_deed(
    path: Path, state: State, deed: Callable[[Path], None], nth: int
) -> tuple[bool, str]:
    """Rewrite the log, and do the deed before the n-th call. Whether it was done, and before which
    operation.
    """
    files = FaultyFiles(inner=UnsyncedFiles())  # thousands of rewrites; no power fails here
    _, snap = AppendLogSnapshot.open(path, files=files)
    snap.apply([Put("a", b"1")], Cursor.from_u64(1))
    state(snap, path, files)
    done: list[tuple[str, object]] = []

    def step_in(call: Call) -> None:
        if call.total == nth and not done:
            done.append((call.operation, None))
            deed(path)
            done[0] = (call.operation, what_stands_there(path))

    files.arm()
    files.hook = step_in
    error: Exception | None = None
    try:
        snap.compact()
    except (OSError, FoldlogError) as caught:
        error = caught
    files.disarm()
    if not done:
        assert error is None
        snap.close()
        return False, ""
    operation, theirs = done[0]
    if operation != "replace":  # a rename cannot ask what it replaces
        assert what_stands_there(path) == theirs, f"overwritten by {operation}, {error}"
    if isinstance(error, LogChangedError):
        assert error.path == path
    assert snap.get("a").value == b"1", "reading goes on"
    snap.close()
    if operation != "replace":
        assert what_stands_there(path) == theirs, "overwritten by closing"
    return True, operation


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_whoever_steps_in_during_a_rewrite_keeps_what_is_his(tmp_path, state, deed):
    """Healing renamed over a backup that was put there, and over the log of a process that had
    opened after `rm LOG*`.
    """
    operations = []
    for nth in itertools.count(1):
        path = tmp_path / str(nth) / "log" / "state.log"
        path.parent.mkdir(parents=True)
        done, operation = rewrite_with_a_deed(path, state, deed, nth)
        operations.append(operation)
        shutil.rmtree(tmp_path / str(nth))
        if not done:
            break
    expected = {"stat", "write", "sync", "link_new" if state is deleted else "replace"}
    assert expected <= {*operations}


def test_a_log_and_its_lock_that_were_deleted_come_back_and_are_locked(path):
    _, snap = AppendLogSnapshot.open(path)
    snap.apply([Put("a", b"1")], Cursor.from_u64(1))
    remove_all_of_it(path)
    deleted_log = snap._engine.log
    assert deleted_log.was_deleted()
    deleted_log.poison_with("was deleted")
    snap.compact()
    assert lock_path(path).exists()
    assert path.stat().st_nlink == 1
    with pytest.raises(FoldlogError, match="open for writing in process"):
        AppendLogSnapshot.open(path)
    snap.apply([Put("b", b"2")], Cursor.from_u64(2))
    snap.close()
    with AppendLogSnapshot.open(path)[1] as again:
        assert [entry.key for entry in again.range("")] == ["a", "b"]


def test_a_log_whose_directory_went_was_not_deleted(path):
    """An unmounted directory is empty. The store took its log for deleted, and wrote it anew under
    the mount point.
    """
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], Cursor.from_u64(1))
        put_another_directory_there(path)
        with pytest.raises(LogChangedError, match="directory"):
            snap._engine.log.was_deleted()


@pytest.mark.parametrize("content", [THEIRS, b"x" * 4096])
def test_a_copy_onto_a_poisoned_log_is_not_replaced(path, content):
    """`cp backup LOG` writes into the same file: its inode tells nothing, its size does."""
    files = FaultyFiles()
    _, snap = AppendLogSnapshot.open(path, files=files)
    snap.apply([Put("a", b"1")], Cursor.from_u64(1))
    poisoned_by_a_failed_fsync(snap, path, files)
    files.disarm()
    path.write_bytes(content)
    with pytest.raises(LogChangedError, match="another program changed it"):
        snap.compact()
    assert path.read_bytes() == content
    snap.close()


def test_a_name_that_was_free_is_taken_only_while_it_is(path):
    write_log(path.with_name("other"), some_batches(1))

    def step_in(call: Call) -> None:
        if call.operation == "link_new" and not path.exists():
            path.write_bytes(THEIRS)

    with pytest.raises(FileExistsError):
        AppendLogSnapshot.open(path, files=FaultyFiles(hook=step_in))
    assert path.read_bytes() == THEIRS
    assert {file.name for file in path.parent.iterdir()} == {path.name, "other"} | {
        file.name for file in path.parent.glob("other.*")
    }
