"""A fold into a new file: how a log is created and compacted.

The new file is written under a temporary name beside the log, synced, and renamed. Its descriptors
stay open across the rename, so that no later step can fail for want of one. Equal states give equal
bodies; only ids, and the checksums that they seed, differ. Unchanged leaves are copied as they are.

A compaction runs beside the writer. `Rewrite.write` works from an immutable fold, and `catch_up`
carries over what was appended meanwhile. If that is more than all live data, most of it has been
overwritten, and the newest fold is written instead. The writer pauses only for `finish`: the last
few batches, an fsync, the rename. `allowance` bounds what the writer may append meanwhile, so that
the rewrite finishes, and has the room that it needs on the disk.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable
from pathlib import Path

from foldlog.protocol.engine import Cancelled
from foldlog.protocol.errors import (
    FoldlogError,
    LogChangedError,
    StoreClosed,
    StoreLocked,
    drop_system_errors,
    is_own_fault,
)
from foldlog.storage.fold.reading import Writable
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.format import PRIVATE, LogFile, LogFormat, NewFile, Progress
from foldlog.storage.log.access import keep_access, narrow
from foldlog.storage.log.files import Access, Files, ReadHandle
from foldlog.storage.log.log import Log
from foldlog.storage.log.sidecars.lock import lock_log, temporary
from foldlog.storage.log.sidecars.origins import drop_stale_origin

_ENTRY_OVERHEAD = 12  # bytes around a key, a value and a version

SLACK_BYTES = 1024 * 1024
"""What the writer may always append during a pass of a rewrite, within the limit."""
FINISH_BYTES = 3 * SLACK_BYTES
"""What may be left to carry over while the writer pauses: 10 to 20 ms, with the fsync."""
MAX_PASSES = 20
"""Then the rewrite finishes, whatever is left to carry over."""


class Next(enum.Enum):
    """What to do after a pass of a rewrite."""

    FINISH = enum.auto()
    CARRY = enum.auto()
    """Carry over what was appended meanwhile."""
    AGAIN = enum.auto()
    """Write the newest fold instead, which is smaller."""


def next_pass(lag_bytes: int, live_bytes: int, passes: int) -> Next:
    """What to do next, when `lag_bytes` of the log are not in the new file yet."""
    if lag_bytes <= FINISH_BYTES or passes >= MAX_PASSES:
        return Next.FINISH
    return Next.AGAIN if lag_bytes > live_bytes else Next.CARRY


def allowance_bytes(limit: int, stage: int, lag: int, made: int, expected: int) -> int:
    """How large the log may grow before the writer must wait for the rewrite. All in bytes.

    `limit`: of the log's size. `stage`: its size when this pass began. `lag`: appended during the
    pass before; 0 in the first. `made` of the `expected` bytes of this pass are written.

    In the first pass the writer may use a third of the room up to the limit at once, and another
    third as the pass advances, so that it is slowed down rather than stopped. In each later pass it
    may append about half as much as in the one before, so that the passes become short.
    """
    part = min(made / expected, 1.0) if expected > 0 else 0.0
    room = int(lag * part / 2) if lag else int(max(limit - stage, 0) * (1 + part) / 3)
    return min(limit, stage + SLACK_BYTES + room)


def free_bytes(log: Log) -> int | None:
    """Room on the log's disk; None if unknown."""
    with drop_system_errors():
        return log.files.free_bytes(log.path.parent)
    return None


def room_bytes(free: int | None, needed: int) -> int:
    """How much the writer may append during a pass that writes `needed` bytes, on a disk with room
    for `free` bytes (None: unknown).

    What it appends is carried over later, and so needs its room twice. No limit if the pass cannot
    succeed anyway.
    """
    return sys.maxsize if free is None or free < needed else (free - needed) // 2


class Rewrite:
    """A compaction under way: the log's fold is written to a new file of the same format."""

    def __init__(self, log: Log, fold: FoldSnapshot) -> None:
        """Start from `fold`, which holds all that is in the log; if it is poisoned, all that was
        acknowledged.
        """
        self._log = log
        # Dropped once it is written: it keeps the old base alive.
        self._fold: FoldSnapshot | None = fold
        self.seq = fold.seq
        """The last batch in the new base."""
        self._poisoned = log.poison is not None
        self._access = log.access()
        self._carried = log.position  # up to here the log is in the new file
        self._began = self._stage = log.position.offset
        self.live_bytes = log.file.base_end
        """The size of a compacted log, as far as it is known."""
        self._lag = self._stage_out = 0
        self._expected = self._began  # bytes that this pass writes, at most
        self._free = free_bytes(self._log)
        """Room on the disk for this pass, when it began; None if unknown."""
        self._out: NewFile | None = None
        self._outdated: NewFile | None = None
        self._adopted = False
        self.passes = 0
        """Passes after the first, not counting `finish`."""
        self._landing: tuple[LogFile, tuple[int, int], FoldSnapshot] | None = None
        """What replaces the log's file, from just before the rename on."""
        self.cancelled = False
        """Any thread may set it: `write` then stops soon and raises Cancelled."""
        self.outcome: object = None
        """Set by whoever runs the passes: the result of the last one; None during a pass."""

    @property
    def lag_bytes(self) -> int:
        """Bytes of the log that are not carried over yet. Writer's thread only."""
        return 0 if self._poisoned else self._log.position.offset - self._carried.offset

    def allowance(self, limit: Callable[[int], int]) -> int:
        """How large the log may grow for now, in bytes. Any thread may call it.

        `limit` maps the log's live bytes to the limit of its size.
        """
        out = self._out
        made = 0 if out is None else out.position.offset - self._stage_out
        live, needed = self.live_bytes, self._expected
        if self._fold is not None:
            live = needed = max(live, made)
        most = min(limit(live), self._stage + room_bytes(self._free, needed))
        return allowance_bytes(most, self._stage, self._lag, made, self._expected)

    def write(self, progress: Progress | None = None) -> None:
        """Write the fold, and sync it. Cancelled if `cancelled` was set; OSError.

        This takes long. Any thread may run it while batches are appended to the log.
        """

        def step(done: int, total: int) -> None:
            if self.cancelled:
                raise Cancelled
            if progress is not None:
                progress(done, total)

        log, fold = self._log, self._fold
        assert fold is not None, "it is written already"
        self._discard_outdated()
        self._out = log.file.format.new_file(
            log.files,
            temporary(log.path),
            seq=fold.seq,
            log_id=log.file.header.log_id,
            sync_each=log.sync_each,
        )
        keep_access(log.files, self._out.fd, self._access, log.path)
        self._out.write_fold(fold, step)
        self.live_bytes = self._expected = self._out.base_end
        self._out.sync()
        self._out.keep_warm(fold)
        self._fold = None

    def run(self, progress: Progress | None = None) -> None:
        """The pass that is due: `write`, or `catch_up`."""
        self.catch_up() if self.written else self.write(progress)

    def measure_live(self, progress: Progress | None = None) -> None:
        """After a failure: compute `live_bytes`; if that fails, it is the size of the log.

        Cost: reads the whole fold, 1 us an entry.
        """
        fold, self._fold = self._fold, None
        if fold is None:
            return
        self.live_bytes = self._began
        live = 0
        with contextlib.suppress(OSError, FoldlogError):
            for columns in (segment.columns() for segment in fold.segments()):
                live += sum(map(len, columns.keys)) + _ENTRY_OVERHEAD * len(columns.keys)
                live += sum(map(len, columns.values)) + sum(map(len, columns.versions))
                if progress is not None:
                    progress(live, self._began)
            self.live_bytes = live

    @property
    def written(self) -> bool:
        """True if the fold is written: what is left is to catch up, and to finish."""
        return self._fold is None

    def begin_carry(self) -> None:
        """Make `catch_up` the next pass. Writer's thread only, between passes."""
        assert self._out is not None
        self._begin_pass(expected=self.lag_bytes)
        self._stop, self._stage_out = self._log.position.offset, self._out.position.offset

    def begin_again(self, fold: FoldSnapshot) -> None:
        """Make `write` the next pass, for `fold`, which holds all that is now in the log.

        Writer's thread only, between passes.
        """
        self._begin_pass(expected=self.live_bytes)
        if self._free is not None and self._out is not None:
            self._free += self._out.position.offset  # removed before the pass writes anything
        self._outdated, self._out, self._stage_out = self._out, None, 0
        self._fold, self.seq, self._carried = fold, fold.seq, self._log.position

    def _begin_pass(self, expected: int) -> None:
        self.passes += 1
        self._stage, self._lag, self._expected = self._log.position.offset, self.lag_bytes, expected
        self._free = free_bytes(self._log)

    def catch_up(self) -> None:
        """Carry over what had been appended when `begin_carry` was called, and sync it.

        Any thread may run it while batches are appended to the log.
        """
        self._carry(self._stop)

    def _carry(self, stop: int) -> None:
        if self._poisoned:
            return  # what follows in the file was never acknowledged, and may not be on disk
        log, out = self._log, self._out
        assert out is not None
        start = self._carried.offset
        self._carried = out.carry(log.file, self._carried, stop)
        if stop > start:
            out.sync()

    def finish(self, since: FoldSnapshot) -> FoldSnapshot:
        """Replace the log's file. Returns the fold, with what was committed `since`.

        Called by the writer, which appends nothing meanwhile. All descriptors are opened before the
        rename. Errors come before it, too: the log then continues as it was.
        """
        log, out = self._log, self._out
        assert out is not None
        if log.closed:
            raise StoreClosed(f"{log.path} was closed while it was compacted")
        self._carry(log.position.offset)
        directory = log.files.open_dir(log.path.parent)
        try:
            handle = ReadHandle(log.files, out.path)
            file = out.log_file(log.file.format, handle)
            fold = out.fold_with(since)
            if not lock_log(log.files, out.fd):
                raise StoreLocked(log.path, None)
            inode = log.identity(out.fd)
            log.announce(file)
            try:
                free = log.check_place(out.fd)
            except BaseException:
                log.announce(None)
                raise
            self._landing = file, inode, fold
            try:
                log.put_in_place(out.path, free=free)  # the last step that can fail
            except (OSError, LogChangedError) as error:
                if is_own_fault(error):
                    log.announce(None)  # the system says that it was not done
                    self._landing = None
                raise  # else a signal handler's TimeoutError, say: `settle` looks
            self._land(file, inode, directory)
        finally:
            with drop_system_errors():  # nothing was written through it
                log.files.close(directory)
        return fold

    def settle(self) -> FoldSnapshot | None:
        """After an exception: if the log's name leads to the new file, finish, and return the fold.

        None if it does not: the log continues as it was.
        """
        if self._landing is None:
            return None
        file, inode, fold = self._landing
        log = self._log
        if not self._adopted:
            try:
                stat = log.files.stat(log.path)
                landed = (stat.st_dev, stat.st_ino) == inode
            except FileNotFoundError:
                landed = False
            if not landed:
                log.announce(None)
                self._landing = None
                self.discard()  # whoever met the exception may not have come to it
                return None
        self._land(file, inode)
        return fold

    def _land(self, file: LogFile, inode: tuple[int, int], directory: int | None = None) -> None:
        """Switch the log to the renamed file. Can be repeated if it was interrupted."""
        self._adopted = True
        file.handle.path = self._log.path
        self._log.adopt(file, inode, directory)

    def discard(self) -> None:
        """Give up the rewrite, unless `finish` has renamed: the log continues as it was."""
        self._discard_outdated()
        if self._out is not None and not self._adopted:
            self._adopted = True
            self._out.discard()

    def _discard_outdated(self) -> None:
        outdated, self._outdated = self._outdated, None
        if outdated is not None:
            outdated.discard()


def write_new(
    files: Files,
    path: Path,
    fold: Writable,
    format: LogFormat,
    progress: Progress | None = None,
    *,
    source: Access | None = None,
) -> None:
    """Create a log that holds `fold` at `path`, atomically and durably.

    `source`: the access of the file that the fold was read from; the new one admits nobody else.
    None: the defaults of a new file. FileExistsError if `path` exists; OSError.
    """
    out = format.new_file(
        files, temporary(path), seq=fold.seq, mode=0o666 if source is None else PRIVATE
    )
    try:
        if source is not None:
            narrow(files, out.fd, source)
        out.write_fold(fold, progress)
        out.sync()
        if not format.keeps_origin:
            drop_stale_origin(files, path)
        files.link_new(out.path, path)
        files.sync_dir(path.parent)
    finally:
        out.discard()
