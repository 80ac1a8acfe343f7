"""Each file system call of a script fails, once or for good: nothing acknowledged is ever lost.

The script is repeated with n = 1, 2, 3, ... for the call that fails, until no fault fires, so that
no call is left out.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from pathlib import Path

import pytest
from faultkit import nothing_left_open, view
from logfiles import companions, read_state
from sampling import every

from foldlog import AppendLogSnapshot, Delete, FoldlogError, LogPoisonedError, Put, WatchCursor
from foldlog.storage.log.files import Files
from foldlog.storage.log.sidecars.lock import read_note
from foldlog.testing import Fault, FaultyFiles

pytestmark = pytest.mark.exhaustive


OPERATIONS = [
    "write",
    "sync",
    "sync_dir",
    "replace",
    "create",
    "open_read",
    "open_write",
    "open_dir",
    "list_dir",
    "link_new",
    "lock",
    "stat",
    "read_into",
    "unlink",
]


def holding_a(path: Path, files: Files | None = None, *, sync="never") -> AppendLogSnapshot:
    """A new log that holds a, by its first batch, and uses `files` from then on."""
    _, snap = AppendLogSnapshot.open(path, sync=sync)
    snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
    snap._engine.log.files = files or snap._engine.log.files
    return snap


def takes_b_and_keeps_both(snap: AppendLogSnapshot, path: Path) -> None:
    """Apply b, and close: both are there."""
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.close()
    assert set(read_state(path).entries) == {"a", "b"}


BATCHES = [
    [Put("a", b"1"), Put("b", b"1")],
    [Put("a", b"2"), Delete("b"), Put("c", bytes(700))],
    [Put("b", b"3")],
    [Delete("c")],
]


class Story:
    """What was acknowledged, and what may be there besides: a batch whose fsync failed."""

    def __init__(self) -> None:
        self.states: list[dict[str, bytes]] = [{}]
        self.unsure = False

    def possible(self) -> list[dict[str, bytes]]:
        return [self.acked, *([self.maybe] if self.unsure else [])]

    @property
    def acked(self) -> dict[str, bytes]:
        return self.states[-1]

    def apply(self, snap, number: int) -> None:
        after = dict(self.acked)
        for update in BATCHES[number]:
            if isinstance(update, Put):
                after[update.key] = update.value
            else:
                after.pop(update.key, None)
        try:
            snap.apply(BATCHES[number], WatchCursor.from_u64(number + 1))
        except (OSError, FoldlogError) as error:
            assert view(snap) == self.acked, "a batch that failed shows"
            if isinstance(error, LogPoisonedError) and not self.unsure:
                # The first; those after it are refused before they are written.
                self.unsure, self.maybe = True, after
            return
        self.states.append(after)
        self.unsure = False
        assert view(snap) == self.acked


def play(path: Path, files: Files, story: Story, *, sync: str) -> None:
    try:
        _, snap = AppendLogSnapshot.open(path, files=files, sync=sync)
    except (OSError, FoldlogError):
        return
    story.apply(snap, 0)
    story.apply(snap, 1)
    with contextlib.suppress(OSError, FoldlogError):
        snap.compact()
    assert view(snap) == story.acked
    story.apply(snap, 2)
    with contextlib.suppress(OSError, FoldlogError):
        snap.sync()
    story.apply(snap, 3)
    assert view(snap) == story.acked
    with contextlib.suppress(OSError, FoldlogError):
        snap.close()


@pytest.mark.parametrize("sync", ["never", "always"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("operation", OPERATIONS)
@every(3)
def test_nothing_acknowledged_is_lost_whichever_call_fails(
    tmp_path, operation, for_good, sync, every
):
    fired = 0
    for nth in itertools.count(1, every):
        folder = tmp_path / str(nth)
        folder.mkdir()
        path = folder / "state.log"
        error = errno.ENOSPC if nth % 2 else errno.EIO
        files = FaultyFiles(Fault(operation, nth, error, lasting=for_good))
        story = Story()
        with nothing_left_open(folder, f"call {nth} of {operation}"):
            play(path, files, story, sync=sync)
        _, snap = AppendLogSnapshot.open(path)
        assert view(snap) in story.possible(), f"call {nth} of {operation}"
        snap.close()
        assert not [file.name for file in folder.iterdir() if ".tmp" in file.name]
        note = read_note(Files(), path)
        assert note is not None
        assert note.poisoned is None
        if not files.fired:
            break
        fired += 1
    assert fired, f"the script never calls {operation}"
    assert nth < 200


@pytest.mark.parametrize("takes", [1, 47, 60, 100])
def test_a_write_that_falls_short_and_fails_is_cut_back(path, takes):
    files = FaultyFiles(Fault("write", error=errno.ENOSPC, takes=takes))
    snap = holding_a(path, files)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        snap.apply([Put("b", b"2" * 100)], WatchCursor.from_u64(2))
    assert files.fired
    assert path.read_bytes() == before
    assert view(snap) == {"a": b"1"}
    takes_b_and_keeps_both(snap, path)


def test_a_cut_that_is_not_synced_poisons_the_log(path):
    snap = holding_a(path, FaultyFiles(Fault("write", takes=30), Fault("sync", lasting=True)))
    with pytest.raises(OSError, match="Input/output"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap._engine.log.files = Files()
    for _ in range(2):
        with pytest.raises(LogPoisonedError):
            snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    takes_b_and_keeps_both(snap, path)


def test_a_failed_fsync_is_final_until_the_fold_is_rewritten(path):
    files = FaultyFiles(Fault("sync"))
    snap = holding_a(path, files, sync="always")
    with pytest.raises(LogPoisonedError, match="fsync"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    calls = files.counts["sync"]
    for _ in range(3):
        with pytest.raises(LogPoisonedError):
            snap.apply([Put("c", b"3")], WatchCursor.from_u64(2))
        with pytest.raises(LogPoisonedError):
            snap.sync()
    assert files.counts["sync"] == calls, "an fsync was tried again"
    inode = path.stat().st_ino
    assert read_note(Files(), path).poisoned == inode
    snap.compact()
    assert path.stat().st_ino != inode
    assert read_note(Files(), path).poisoned is None
    assert view(snap) == {"a": b"1"}
    snap.apply([Put("d", b"4")], WatchCursor.from_u64(2))
    snap.close()
    assert set(read_state(path).entries) == {"a", "d"}


def test_the_next_process_rewrites_a_poisoned_log_too(path):
    snap = holding_a(path, FaultyFiles(Fault("sync")))
    with pytest.raises(LogPoisonedError):
        snap.sync()
    snap.close()
    inode = path.stat().st_ino
    _, snap = AppendLogSnapshot.open(path)
    assert snap.report.rewritten
    assert path.stat().st_ino != inode
    assert read_note(Files(), path).poisoned is None
    assert view(snap) == {"a": b"1"}
    snap.close()


@pytest.mark.parametrize("most", [1, 3])
def test_short_writes_without_an_error_are_written_on(path, most):
    _, snap = AppendLogSnapshot.open(path, files=FaultyFiles(short=most))
    snap.apply(BATCHES[0], WatchCursor.from_u64(1))
    snap.compact()
    snap.apply(BATCHES[1], WatchCursor.from_u64(2))
    snap.close()
    assert set(read_state(path).entries) == {"a", "c"}


def test_an_applied_batch_is_acknowledged_though_the_compaction_behind_it_fails(path):
    # apply() raised the compaction's error: the caller took a batch for lost that was in the log.
    files = FaultyFiles(Fault("replace", error=errno.ENOSPC, lasting=True))
    _, snap = AppendLogSnapshot.open(path, 0, files=files)
    for number in range(1, 30):
        assert snap.apply([Put(f"k{number}", b"v" * 50)], WatchCursor.from_u64(number)) == number
    assert files.fired
    assert files.counts["replace"] < 10, "a compaction that fails is tried at every batch"
    assert len(view(snap)) == 29
    files.disarm()
    snap.compact()
    snap.close()
    assert len(read_state(path).entries) == 29


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EXDEV, errno.EACCES], ids=errno.errorcode.get
)
@pytest.mark.parametrize("operation", ["create", "replace", "write", "sync"])
def test_a_compaction_that_fails_leaves_the_log_as_it_was(path, operation, error):
    snap = holding_a(path, FaultyFiles(Fault(operation, error=error)))
    before = path.read_bytes(), path.stat().st_ino
    with pytest.raises(OSError, match=r"\[Errno"):
        snap.compact()
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert {file.name for file in path.parent.iterdir()} == {path.name, *companions(path)}
    snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    snap.close()
    assert set(read_state(path).entries) == {"a", "b"}
    assert read_state(path).seq == 2


def test_a_rename_is_the_last_step_of_a_compaction_that_can_fail(path):
    class NoMoreAfterTheRename(FaultyFiles):
        def replace(self, source, dest):
            super().replace(source, dest)
            self.arm(Fault("fstat"))

    snap = holding_a(path, NoMoreAfterTheRename())
    with contextlib.suppress(OSError):
        snap.compact()
    snap._engine.log.files = Files()
    try:
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    finally:
        snap.close()
    assert set(read_state(path).entries) == {"a", "b"}


def test_an_unsynced_rename_poisons_the_new_file(path):
    snap = holding_a(path, FaultyFiles(Fault("sync_dir")))
    snap.compact()
    with pytest.raises(LogPoisonedError, match="directory"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    takes_b_and_keeps_both(snap, path)


@pytest.mark.parametrize(
    "operation", ["write", "create", "sync", "sync_dir", "open_read", "make_dir", "rename_new"]
)
def test_an_export_that_fails_leaves_nothing(path, tmp_path, operation):
    full = Fault(operation, error=errno.ENOSPC, lasting=True)
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        real = snap._engine.log.files
        snap._engine.log.files = FaultyFiles(full)
        artifact = tmp_path / "artifact"
        with nothing_left_open(artifact, "an export"), pytest.raises(OSError, match="No space"):
            snap.export_to(artifact)
        assert [file.name for file in tmp_path.iterdir()] == [path.parent.name]
        snap._engine.log.files = real
        snap.export_to(artifact)


@pytest.mark.parametrize(
    "operation",
    ["write", "create", "sync", "sync_dir", "link_new", "open_dir", "open_at", "read", "lock"],
)
def test_an_import_that_fails_leaves_nothing_and_leaks_nothing(path, tmp_path, operation):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        snap.export_to(tmp_path / "artifact")
    for nth in itertools.count(1):
        dest = tmp_path / str(nth) / "x.log"
        dest.parent.mkdir()
        files = FaultyFiles(Fault(operation, nth))
        with (
            nothing_left_open(tmp_path, f"call {nth} of {operation}"),
            contextlib.suppress(OSError, FoldlogError),
        ):
            AppendLogSnapshot.import_artifact(tmp_path / "artifact", dest, files=files)[1].close()
        if dest.exists():
            assert set(read_state(dest).entries) == {"a"}
        assert not list(dest.parent.glob("*.tmp*"))
        if not files.fired:
            break
    assert nth > 1
