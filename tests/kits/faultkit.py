"""The fault campaign's tools: what was promised, what may be there, and the check of what is."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foldlog import (
    AppendLogSnapshot,
    Delete,
    FoldlogError,
    LogPoisonedError,
    Put,
    Update,
    VersionToken,
    WatchCursor,
)
from foldlog.storage.log.files import Files
from foldlog.storage.log.sidecars.lock import inode_of, note_path, read_note
from foldlog.storage.log.sidecars.note import NOTE_BYTES, SLOT_BYTES, pack_slot, parse_note
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Call, CrashFiles, Fault, FaultyFiles, UnsyncedFiles

View = dict[str, bytes]
UNSYNCED = UnsyncedFiles()
MAX_CALLS = 400


def batch(number: int) -> list[Update]:
    """Batch `number`: every set of batches folds to a distinct state. One or more sectors each."""
    size = (10, 900, 40, 2000)[number % 4]
    return [
        Put(f"key{number}", bytes((number % 251,)) * size, VersionToken.from_u64(number)),
        Put("last", b"%d" % number),
        Put("sum", b""),
        Delete(f"key{number - 3}"),
    ]


def fold_of(numbers: list[int]) -> View:
    """What batches fold to."""
    state: View = {}
    for number in numbers:
        for update in batch(number):
            if isinstance(update, Put):
                state[update.key] = update.value
            else:
                state.pop(update.key, None)
    return state


def view(store: Any) -> View:
    """What a store holds."""
    return {entry.key: entry.value for entry in store.range("")}


class Model:
    """What a store was asked, what it answered, and so what may be found after a crash."""

    def __init__(self, acked: list[int] | None = None) -> None:
        self.acked = list(acked or [])
        """The batches that were answered, in order."""
        self.in_doubt: list[int] = []
        """Batches in flight, or in doubt until the log is rewritten: a prefix of them may be in."""
        self.durable = len(self.acked)
        """How many of `acked` survive a power loss."""

    def apply(self, store: Any, *numbers: int, durable: bool) -> None:
        """Apply a batch (or several, through `apply_group`); record the answer, whatever it is."""
        doubt, self.in_doubt = self.in_doubt, [*numbers]
        try:
            if len(numbers) == 1:
                store.apply(batch(numbers[0]), WatchCursor.from_u64(numbers[0]))
            else:
                store.apply_group(numbers)
        except LogPoisonedError:
            self.in_doubt = (
                doubt or self.in_doubt
            )  # a log that was poisoned before has not taken it
            raise
        except (OSError, FoldlogError):
            self.in_doubt = []
            raise
        self.acked += numbers
        self.in_doubt = []
        if durable:
            self.durable = len(self.acked)

    def all_durable(self) -> None:
        """A sync, a compaction or a close has returned: nothing is in doubt any more."""
        self.durable = len(self.acked)
        self.in_doubt = []

    def in_process(self) -> list[View]:
        """What a killed process may leave."""
        return [
            fold_of([*self.acked, *self.in_doubt[:count]])
            for count in range(len(self.in_doubt) + 1)
        ]

    def after_power_loss(self) -> list[View]:
        """What a power loss may leave."""
        return [
            *(fold_of(self.acked[:count]) for count in range(self.durable, len(self.acked))),
            *self.in_process(),
        ]


_boots = itertools.count(1)


@contextlib.contextmanager
def rebooted() -> Iterator[None]:
    """In the block, the machine has been restarted since anything was written."""
    boot = f"boot {next(_boots)}"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("log.recovery", "formats.foldlog.codec"):
            patch.setattr(f"foldlog.storage.{module}.boot_id", lambda: boot)
        yield


def descriptors() -> set[str]:
    """The open files of this process."""
    gc.collect()
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {
        name
        for name in found
        if not name.split(" ", 1)[1].startswith(("/proc", "socket:", "pipe:"))
    }


@contextlib.contextmanager
def nothing_left_open(folder: Path, what: str) -> Iterator[None]:
    """Check that the block closes all files below `folder` that it opens."""
    count = len(os.listdir("/proc/self/fd"))
    yield
    if len(os.listdir("/proc/self/fd")) != count:
        left = {name for name in descriptors() if str(folder) in name}  # collects garbage first
        assert not left, f"{what} leaves open {left}"


def run_with(
    fault: Fault, files: FaultyFiles, run: Callable[[], object]
) -> tuple[list[Call], Exception | None]:
    """Run with a fault in it. Returns the calls that the fault hit, and the resulting error."""
    files.arm(fault)
    failed: Exception | None = None
    try:
        run()
    except (OSError, FoldlogError) as error:
        failed = error
    fired = list(files.fired)
    files.arm()
    return fired, failed


def fail_every_call(folder: Path, operation: str, attempt: Callable[[Path, int], bool]) -> int:
    """Attempt an operation with a fault in call 1, 2, 3, ... until none fires. Returns the count.

    `attempt` takes a directory to make, and the number of the call; it returns True if the fault
    fired. Nothing may be left open.
    """
    for nth in range(1, MAX_CALLS):
        own = folder / str(nth)
        with nothing_left_open(folder, f"{operation} with a fault in call {nth}"):
            came = attempt(own, nth)
        shutil.rmtree(own)
        if not came:
            return nth - 1
    raise AssertionError("the operation never completes")


def fault_of(path: Path, allowed: list[View], files: Files = UNSYNCED) -> str:
    """What is wrong with the log a crash left at `path`, given the allowed states, or ""."""
    try:
        _, snap = AppendLogSnapshot.open(path, files=files)
    except (OSError, FoldlogError) as error:
        return f"does not open: {type(error).__name__}: {error}"
    try:
        found = view(snap)
        if found not in allowed:
            return (
                f"holds up to {found.get('last')!r}, "
                f"allowed are {[state.get('last') for state in allowed]}"
            )
        report = snap.verify()
        if not report.ok:
            return f"does not verify: {report.problems}"
        snap.apply(batch(99), WatchCursor.from_u64(99))
        if view(snap).get("last") != b"99":
            return "takes no more batches"
    finally:
        snap.close()
    report = verify_log(path)
    if not (report.ok and report.sealed and not report.torn_bytes):
        return f"does not verify after a batch and a close: {report}"
    left = [file.name for file in path.parent.glob(f"{path.name}.*") if ".tmp" in file.name]
    note = read_note(files, path)
    if note is not None and note.poisoned is not None:
        left.append("poison")
    return f"leaves {left}" if left else ""


def keep_inodes(path: Path) -> None:
    """A power loss leaves the inodes as they are: let the note beside the log of an image name
    those of the image.
    """
    with contextlib.suppress(FileNotFoundError):
        raw = note_path(path).read_bytes()
        with open(note_path(path), "rb") as opened:
            inode = inode_of(Files(), opened.fileno())
        for turn in range(2):
            note = parse_note(raw[turn * SLOT_BYTES :][:SLOT_BYTES].ljust(NOTE_BYTES, b"\0"))
            if note is None:
                continue
            poisoned = note.poisoned and path.stat().st_ino
            slot = pack_slot(note._replace(inode=inode, poisoned=poisoned))
            with open(note_path(path), "r+b") as file:
                file.seek(turn * SLOT_BYTES)
                file.write(slot)


class CrashCampaign:
    """Runs a script over `CrashFiles`; checks what a power loss could leave after each change."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: int = 16,
        mutant: Callable[[pytest.MonkeyPatch], None] | None = None,
    ) -> None:
        """`limit`: images checked after each change. `mutant`: breaks a rule while the script runs.

        It does not apply while an image is checked. Call `end` when done.
        """
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.path = self.work / "state.log"
        self._image_folder = folder / "image"
        self.crash = CrashFiles(self.work, UNSYNCED)
        self.files = FaultyFiles(hook=self._before, inner=self.crash)
        self.model = Model()
        self.images = 0
        self.crashes = 0
        self.faults: list[str] = []
        self._patch, self._mutant = pytest.MonkeyPatch(), mutant
        if mutant is not None:
            mutant(self._patch)
        self._limit = limit
        self._seen_changes = -1
        self._looking = threading.RLock()

    def _before(self, call: Call) -> None:
        with self._looking:
            if self.crash.changes != self._seen_changes:
                self._seen_changes = self.crash.changes
                self.look(f"before {call.operation} {call.nth}")

    def look(self, when: str) -> None:
        """Check every image of this moment, unless a mutant was found out before."""
        if self._mutant is not None and self.faults:
            return
        self.crashes += 1
        allowed = self.model.after_power_loss()
        self.end()
        with rebooted():
            for image in self.crash.images(self._limit, seed=self.crashes):
                self.images += 1
                self._image_folder.mkdir()
                try:
                    image.write_to(self._image_folder)
                    keep_inodes(self._image_folder / self.path.name)
                    fault = fault_of(self._image_folder / self.path.name, allowed)
                finally:
                    shutil.rmtree(self._image_folder)
                if fault:
                    self.faults.append(f"{when}, a power loss: {fault}")
                    break
        if self._mutant is not None:
            self._mutant(self._patch)

    def end(self) -> None:
        """Keep all rules again."""
        self._patch.undo()


@contextlib.contextmanager
def quick_folder(folder: Path) -> Iterator[Path]:
    """An in-memory directory if the system has one, else `folder`: it holds many small files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="foldlog-test-", dir=memory) as quick:
        yield Path(quick)
