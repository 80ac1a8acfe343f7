"""Each file system call of a script fails, once or for good: nothing acknowledged is ever lost.

`Failing` is the double: it fails the n-th call of one operation. The script is repeated with
n = 1, 2, 3, ... until no fault fires, so that no call is left out.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
from pathlib import Path

import pytest
from faultkit import view
from logfiles import companions, read_state
from sampling import every

from foldlog import AppendLogSnapshot, Delete, FoldlogError, LogPoisonedError, Put, WatchCursor
from foldlog.storage.log.files import Files
from foldlog.storage.log.sidecars.lock import read_note

pytestmark = pytest.mark.exhaustive


class Failing(Files):
    """The operating system's files; an operation's n-th call fails (`for_good`: all after it)."""

    def __init__(
        self,
        operation: str,
        nth: int,
        error: int,
        *,
        for_good: bool = False,
        takes: int | None = None,
    ) -> None:
        self.operation, self.nth, self.error, self.for_good = operation, nth, error, for_good
        self.takes = takes
        """Bytes that a failing write takes before it fails."""
        self.calls = 0
        self.fired = False

    def due(self, operation: str) -> bool:
        if operation != self.operation:
            return False
        self.calls += 1
        due = self.calls == self.nth or (self.for_good and self.calls > self.nth)
        self.fired |= due
        return due

    def fail(self) -> None:
        raise OSError(self.error, os.strerror(self.error))

    def write(self, fd, data, offset):
        if self.due("write"):
            if self.takes:
                super().write(fd, bytes(data[: self.takes]), offset)
            self.fail()
        return super().write(fd, data, offset)


def failing(name):
    def method(self, *arguments, **more):
        if self.due(name):
            self.fail()
        return getattr(Files, name)(self, *arguments, **more)

    return method


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
]
OPERATIONS += ["stat", "read_into", "unlink"]
for _name in [*OPERATIONS[1:], "fstat", "read", "open_at"]:
    setattr(Failing, _name, failing(_name))


class ShortWrites(Files):
    """Every write takes one byte, or three."""

    def __init__(self, most: int) -> None:
        self.most = most

    def write(self, fd, data, offset):
        return super().write(fd, memoryview(data)[: self.most], offset)


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {name for name in found if "/fd" not in name.split(" ", 1)[1]}


def no_more_than(before: set[str]) -> bool:
    if descriptors() <= before:
        return True
    gc.collect()
    return descriptors() <= before


def holding_a(path: Path, sync="never") -> AppendLogSnapshot:
    """A new log that holds a, by its first batch."""
    _, snap = AppendLogSnapshot.open(path, sync=sync)
    snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
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
                self.unsure, self.maybe = (
                    True,
                    after,
                )  # the first; those after it are refused before they are written
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
        files = Failing(operation, nth, errno.ENOSPC if nth % 2 else errno.EIO, for_good=for_good)
        story = Story()
        before = descriptors()
        play(path, files, story, sync=sync)
        assert no_more_than(before), f"call {nth} of {operation}: a descriptor leaked"
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
    snap = holding_a(path)
    before = path.read_bytes()
    files = Failing("write", 1, errno.ENOSPC, takes=takes)
    snap._engine.log.files = files
    with pytest.raises(OSError, match="No space"):
        snap.apply([Put("b", b"2" * 100)], WatchCursor.from_u64(2))
    assert files.fired
    assert path.read_bytes() == before
    assert view(snap) == {"a": b"1"}
    takes_b_and_keeps_both(snap, path)


def test_a_cut_that_is_not_synced_poisons_the_log(path):
    snap = holding_a(path)

    class Both(Failing):
        def sync(self, fd):
            self.fail()

    snap._engine.log.files = Both("write", 1, errno.EIO, takes=30)
    with pytest.raises(OSError, match="Input/output"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap._engine.log.files = Files()
    for _ in range(2):
        with pytest.raises(LogPoisonedError):
            snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    takes_b_and_keeps_both(snap, path)


def test_a_failed_fsync_is_final_until_the_fold_is_rewritten(path):
    snap = holding_a(path, sync="always")
    files = Failing("sync", 1, errno.EIO)
    snap._engine.log.files = files
    with pytest.raises(LogPoisonedError, match="fsync"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    calls = files.calls
    for _ in range(3):
        with pytest.raises(LogPoisonedError):
            snap.apply([Put("c", b"3")], WatchCursor.from_u64(2))
        with pytest.raises(LogPoisonedError):
            snap.sync()
    assert files.calls == calls, "an fsync was tried again"
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
    snap = holding_a(path)
    snap._engine.log.files = Failing("sync", 1, errno.EIO)
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
    _, snap = AppendLogSnapshot.open(path, files=ShortWrites(most))
    snap.apply(BATCHES[0], WatchCursor.from_u64(1))
    snap.compact()
    snap.apply(BATCHES[1], WatchCursor.from_u64(2))
    snap.close()
    assert set(read_state(path).entries) == {"a", "c"}


def test_an_applied_batch_is_acknowledged_though_the_compaction_behind_it_fails(path):
    # apply() raised the compaction's error: the caller took a batch for lost that was in the log.
    files = Failing("replace", 1, errno.ENOSPC, for_good=True)
    _, snap = AppendLogSnapshot.open(path, 0, files=files)
    for number in range(1, 30):
        assert snap.apply([Put(f"k{number}", b"v" * 50)], WatchCursor.from_u64(number)) == number
    assert files.fired
    assert files.calls < 10, "a compaction that fails is tried at every batch"
    assert len(view(snap)) == 29
    files.operation = "nothing"
    snap.compact()
    snap.close()
    assert len(read_state(path).entries) == 29


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EXDEV, errno.EACCES], ids=errno.errorcode.get
)
@pytest.mark.parametrize("operation", ["create", "replace", "write", "sync"])
def test_a_compaction_that_fails_leaves_the_log_as_it_was(path, operation, error):
    snap = holding_a(path)
    before = path.read_bytes(), path.stat().st_ino
    snap._engine.log.files = Failing(operation, 1, error)
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
    snap = holding_a(path)

    class NoMoreAfterTheRename(Failing):
        def replace(self, source, dest):
            super().replace(source, dest)
            self.operation = "fstat"

    snap._engine.log.files = NoMoreAfterTheRename("nothing", 1, errno.EIO)
    with contextlib.suppress(OSError):
        snap.compact()
    snap._engine.log.files = Files()
    try:
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    finally:
        snap.close()
    assert set(read_state(path).entries) == {"a", "b"}


def test_an_unsynced_rename_poisons_the_new_file(path):
    snap = holding_a(path)
    snap._engine.log.files = Failing("sync_dir", 1, errno.EIO)
    snap.compact()
    with pytest.raises(LogPoisonedError, match="directory"):
        snap.apply([Put("b", b"2")], WatchCursor.from_u64(2))
    snap.compact()
    takes_b_and_keeps_both(snap, path)


@pytest.mark.parametrize(
    "operation", ["write", "create", "sync", "sync_dir", "open_read", "make_dir", "rename_new"]
)
def test_an_export_that_fails_leaves_nothing(path, tmp_path, operation):
    class Broken(Files):
        pass

    def fail(self, *arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Broken, operation, fail)
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], WatchCursor.from_u64(1))
        real = snap._engine.log.files
        snap._engine.log.files = Broken()
        before = descriptors()
        with pytest.raises(OSError, match="No space"):
            snap.export_to(tmp_path / "artifact")
        assert no_more_than(before)
        assert [file.name for file in tmp_path.iterdir()] == [path.parent.name]
        snap._engine.log.files = real
        snap.export_to(tmp_path / "artifact")


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
        files = Failing(operation, nth, errno.EIO)
        snap = None
        before = descriptors()
        try:
            _, snap = AppendLogSnapshot.import_artifact(tmp_path / "artifact", dest, files=files)
            snap.close()
        except (OSError, FoldlogError):
            pass
        del snap
        assert no_more_than(before)
        if dest.exists():
            assert set(read_state(dest).entries) == {"a"}
        assert not list(dest.parent.glob("*.tmp*"))
        if not files.fired:
            break
    assert nth > 1
