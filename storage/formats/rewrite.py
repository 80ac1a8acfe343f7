"""A fold into a new file: how a log is created, compacted and exported.

The new file is written beside the place where it shall stand, synced, and renamed; its descriptors stay open across the
rename, so that no step after it can fail. Equal states give equal bodies; only ids, and the checksums that they seed, differ.
Leaves that nothing touched are copied as they are.

A compaction runs beside the writer: `Rewrite.write` works from an immutable fold, and `catch_up`
carries over the frames that were appended meanwhile. Where these are more than all that is live,
most of what they hold is overwritten by now, and the fold is written once more instead. Only
`finish` (the last few frames, an fsync, the rename) needs the writer to stand still. `allowance`
makes it come to an end: it says how far the writer may go on meanwhile.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from pathlib import Path

from foldlog.protocol.engine import Cancelled
from foldlog.protocol.errors import FoldlogError, StoreClosed, StoreLocked
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.format import PRIVATE, LogFile, LogFormat, NewFile, Progress
from foldlog.storage.log.access import keep_access, narrow
from foldlog.storage.log.files import Access, Files, ReadHandle
from foldlog.storage.log.lock import lock_log, temporary
from foldlog.storage.log.log import Log
from foldlog.storage.log.origins import drop_stale_origin

_ENTRY_OVERHEAD = 12  # bytes around a key, a value and a version


SLACK_BYTES = 1024 * 1024
"""What the writer may always append while a pass of a rewrite is under way, below the limit."""
FINISH_BYTES = 3 * SLACK_BYTES
"""What may be left to carry over while the writer stands still: 10 to 20 ms, with the fsync."""
MAX_PASSES = 20


class Next(enum.Enum):
    """What to do with a rewrite, after a pass of it."""

    FINISH = enum.auto()
    CARRY = enum.auto()
    """Carry over the frames that were appended meanwhile."""
    AGAIN = enum.auto()
    """Write the fold as it is by now: that is less."""


def next_pass(lag_bytes: int, live_bytes: int, passes: int) -> Next:
    """How to go on, where `lag_bytes` of the log are not in the new file, of which `live_bytes` are the base."""
    if lag_bytes <= FINISH_BYTES or passes >= MAX_PASSES:
        return Next.FINISH
    return Next.AGAIN if lag_bytes > live_bytes else Next.CARRY


def allowance_bytes(limit: int, stage: int, lag: int, made: int, expected: int) -> int:
    """How large the log may grow before the writer has to wait for the rewrite to get on.

    `limit`: of the log. `stage`: its size when this pass began. `lag`: what had been appended during
    the pass before; 0 in the first. `made` of the `expected` bytes of this pass are written.

    In the first pass the writer has a third of what is left up to the limit at once, and another
    third as the pass gets on, so that it is slowed down rather than stopped. In each later pass it
    may append about half as much as in the one before, so that the passes become short.
    """
    part = min(made / expected, 1.0) if expected > 0 else 0.0
    room = int(lag * part / 2) if lag else int(max(limit - stage, 0) * (1 + part) / 3)
    return min(limit, stage + SLACK_BYTES + room)


class Rewrite:
    """A compaction under way: the log's fold, on its way into a new file of the same format."""

    def __init__(self, log: Log, fold: FoldSnapshot) -> None:
        """Start from `fold`, which holds all that is in the log (or, if the log is poisoned, all that was acknowledged)."""
        self._log = log
        self._fold: FoldSnapshot | None = (
            fold  # let go of once it is written: it holds the old base
        )
        self.seq = fold.seq
        """The last batch that the new base holds."""
        self._poisoned = log.poison is not None
        self._access = log.access()
        self._carried = log.position  # where the new file has caught up to in the log
        self._began = self._stage = log.position.offset
        self._live = log.file.base_end  # bytes of the base, as far as they are known
        self._lag = self._stage_out = 0
        self._expected = self._began  # bytes that this pass writes, at most
        self._out: NewFile | None = None
        self._outdated: NewFile | None = None
        self._adopted = False
        self.passes = 0
        """Those after the first, without what `finish` carries over."""
        self._landing: tuple[LogFile, tuple[int, int], FoldSnapshot] | None = None
        """What takes the log's place, from just before the rename on."""
        self.cancelled = False
        """Set by anyone to make `write` stop soon, with Cancelled."""
        self.outcome: object = None
        """What whoever runs the passes tells of the last one; None while it is under way."""

    @property
    def lag_bytes(self) -> int:
        """Bytes of the log that are not carried over yet. For the writer."""
        return 0 if self._poisoned else self._log.position.offset - self._carried.offset

    def allowance(self, limit: Callable[[int], int]) -> int:
        """How large the log may grow for now; `limit` gives the bound for so many live bytes. Any thread."""
        out = self._out
        made = 0 if out is None else out.position.offset - self._stage_out
        live = max(self._live, made) if self._fold is not None else self._live
        return allowance_bytes(limit(live), self._stage, self._lag, made, self._expected)

    def write(self, progress: Progress | None = None) -> None:
        """Write the fold, and sync it. The long part; any thread may run it while the log is appended to."""

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
        self._live = self._expected = self._out.base_end
        self._out.sync()
        self._out.keep_warm(fold)
        self._fold = None

    def run(self, progress: Progress | None = None) -> None:
        """The pass that is due: `write`, or `catch_up`."""
        self.catch_up() if self.written else self.write(progress)

    @property
    def log_bytes(self) -> int:
        """The size of the log when the rewrite began."""
        return self._began

    @property
    def live_bytes(self) -> int:
        """The size of the log when it is compact, as far as that is known."""
        return self._live

    def measure_live(self, progress: Progress | None = None) -> None:
        """After a failure: find out what is live. Cost: reads the whole fold, 1 us an entry. All of it, if that fails."""
        fold, self._fold = self._fold, None
        if fold is None:
            return
        self._live = self._began
        live = 0
        with contextlib.suppress(OSError, FoldlogError):
            for columns in fold.columns("", None):
                live += sum(map(len, columns.keys)) + _ENTRY_OVERHEAD * len(columns.keys)
                live += sum(map(len, columns.values)) + sum(map(len, columns.versions))
                if progress is not None:
                    progress(live, self._began)
            self._live = live

    @property
    def written(self) -> bool:
        """The fold is written; what is left to do is to carry over, and to finish."""
        return self._fold is None

    def begin_carry(self) -> None:
        """Let the next pass be `catch_up`. For the writer, while nobody runs the rewrite."""
        assert self._out is not None
        self._begin_pass(expected=self.lag_bytes)
        self._stop, self._stage_out = self._log.position.offset, self._out.position.offset

    def begin_again(self, fold: FoldSnapshot) -> None:
        """Let the next pass be `write`, of `fold`, which holds all that is in the log by now. For the writer, as before."""
        self._begin_pass(expected=self._live)
        self._outdated, self._out, self._stage_out = self._out, None, 0
        self._fold, self.seq, self._carried = fold, fold.seq, self._log.position

    def _begin_pass(self, expected: int) -> None:
        self.passes += 1
        self._stage, self._lag, self._expected = self._log.position.offset, self.lag_bytes, expected

    def catch_up(self) -> None:
        """Carry over and sync what had been appended by `begin_carry`. Any thread may run it, beside the writer."""
        self._carry(self._stop)

    def _carry(self, stop: int) -> None:
        if self._poisoned:
            return  # what follows the acknowledged fold in the file is a lie
        log, out = self._log, self._out
        assert out is not None
        start = self._carried.offset
        self._carried = out.carry(log.file, self._carried, stop)
        if stop > start:
            out.sync()

    def finish(self, since: FoldSnapshot) -> FoldSnapshot:
        """Take the log's place. The writer stands still meanwhile. Returns the fold, with what was committed `since`.

        Whatever the rename needs is at hand before it: no step after it can fail for want of a
        descriptor. On an error, which comes before the rename, the log goes on as it was.
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
            log.put_in_place(out.path, free=free)  # the last step that can fail
            self._land(file, inode, directory)
        finally:
            with contextlib.suppress(OSError):  # nothing was written through it
                log.files.close(directory)
        return fold

    def settle(self) -> FoldSnapshot | None:
        """After an exception: go by what is under the log's name. If it is the new file, finish, and return the fold.

        None if it is not: the log goes on as it was.
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

    def _land(
        self,
        file: LogFile,
        inode: tuple[int, int],
        directory: int | None = None,
    ) -> None:
        """It stands under the log's name. Can be done again if it was interrupted."""
        self._adopted = True
        if isinstance(file.handle, ReadHandle):
            file.handle.path = self._log.path
        self._log.adopt(file, inode, directory)

    def discard(self) -> None:
        """Give it up, unless `finish` has renamed: the log goes on as it was."""
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
    fold: FoldSnapshot,
    format: LogFormat,
    progress: Progress | None = None,
    *,
    source: Access | None = None,
) -> None:
    """Make a log that holds `fold` at `path`, whole or not at all. FileExistsError if the name is
    taken.

    `source`: of the file that the fold was read from; the new one is no wider. None: it is as any
    new file is.
    """
    out = format.new_file(
        files, temporary(path), seq=fold.seq, mode=0o666 if source is None else PRIVATE
    )
    try:
        if source is not None:
            narrow(files, out.fd, source)
        out.write_fold(fold, progress)
        out.sync()
        drop_stale_origin(files, path)
        files.link_new(out.path, path)
        files.sync_dir(path.parent)
    finally:
        out.discard()
