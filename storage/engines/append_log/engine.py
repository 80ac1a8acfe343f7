"""LogEngine: a log and its fold, kept in step. One thread writes; the caller decides which."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Sequence

from foldlog.protocol.engine import CacheUse, Export, Held, Sizes
from foldlog.protocol.errors import (
    ForeignFileError,
    LogChangedError,
    LogPoisonedError,
    drop_system_errors,
)
from foldlog.protocol.options import CACHE_BYTES, OnDamage
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import NAME_BYTES, WatchCursor
from foldlog.protocol.updates import Batch
from foldlog.storage.artifacts.artifact import ExportManifest, export_fold
from foldlog.storage.engines.append_log.past import LogPast
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.delta import EMPTY_DELTA
from foldlog.storage.fold.snapshot import ClosedFold, FoldSnapshot
from foldlog.storage.formats.format import Progress, VerifyReport
from foldlog.storage.formats.rewrite import Next, Rewrite, free_bytes, next_pass
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle, resolve
from foldlog.storage.log.log import Log
from foldlog.storage.log.opening import open_log
from foldlog.storage.log.sidecars.lock import WriterLock
from foldlog.storage.log.sidecars.origins import write_origin
from foldlog.storage.repair.verify import verify_live

COMPACT_RATIO = 1.0
"""Appended bytes per byte of base that justify a compaction.

Each record is then rewritten about twice.
"""


def should_compact(appended_bytes: int, base_bytes: int, threshold_bytes: int) -> bool:
    """True when appended bytes justify a compaction."""
    return appended_bytes > max(threshold_bytes, COMPACT_RATIO * base_bytes)


LIMIT_FACTOR = 3
MIN_LIMIT = 4 * 1024 * 1024
"""Bytes. Writers never wait for the compaction of a log smaller than this."""


def log_limit(live_bytes: int, threshold_bytes: int) -> int:
    """The size in bytes that a log stays below, one batch aside: 3 x (live + compact_threshold)."""
    return max(LIMIT_FACTOR * (live_bytes + threshold_bytes), MIN_LIMIT)


class LogEngine(LogPast):
    """A log that is open for writing, and its fold."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: FormatName | None = None,
        on_damage: OnDamage = "refuse",
        sync_each: bool = False,
        cache_bytes: int = CACHE_BYTES.default,
        files: Files = OS_FILES,
        progress: Progress | None = None,
        lock: WriterLock | None = None,
        crashed: Log | None = None,
    ) -> None:
        """Open or create the log at `path`.

        See `opening.open_log` for errors, `lock` and `crashed`.
        """
        self.path = resolve(path)
        self.log, self.fold, self.report = open_log(
            self.path,
            files,
            format=format,
            on_damage=on_damage,
            sync_each=sync_each,
            cache_bytes=cache_bytes,
            progress=progress,
            lock=lock,
            crashed=crashed,
        )
        self._cache_bytes = cache_bytes
        # Invariant: fold.seq == log.position.seq, or the log is poisoned. A KeyboardInterrupt may
        # come between the write and the assignment after it; then `_next` is what the log holds.
        self._next = self.fold
        # What readers see: the fold, until the engine is closed.
        self.snapshot: FoldSnapshot | ClosedFold = self.fold
        # During a rewrite: what was committed since it started, as a fold over an empty base.
        self._since: FoldSnapshot | None = None
        # Replaced files that snapshots may still read, and when each was replaced (monotonic, s).
        self._replaced: list[tuple[weakref.ref[ReadHandle], float]] = []
        self._finishing: Rewrite | None = None
        """The rewrite that is replacing the log."""

    def commit(self, batches: Sequence[Batch], staged: FoldSnapshot | None = None) -> FoldSnapshot:
        """Append the batches as one commit group, and fold them. Returns the new fold.

        `staged` is that fold, if the caller has already built it to decide what to write.

        On return the batches survive a killed process, and with `sync_each` a power loss. On an
        error none of them is folded, now or after a restart. The exception is a failed fsync: it
        leaves their fate open until the log is rewritten. Cost: a `stat` and a `write`, and about
        1 us an update.
        """
        log = self.log
        if (
            log.unsettled is not None
            or self._finishing is not None
            or self.fold.seq != log.position.seq
        ):
            self.settle()
        since = self._since
        if since is not None:
            since = since.with_group(batches)
        if staged is None:
            fold = self.fold
            if len(batches) == 1:  # as `with_group` does, a call sooner
                only = batches[0]
                staged = fold.with_batch(only.changes, fold.seq + 1, only.cursor, only.origin)
            else:
                staged = fold.with_group(batches)
        self._next = staged
        beside_log = staged.origin != self.fold.origin and not log.file.format.keeps_origin
        if beside_log:
            write_origin(log.files, log.path, staged.origin[:NAME_BYTES], log.access())
        log.append((batches[0].item,) if len(batches) == 1 else [batch.item for batch in batches])
        if beside_log:
            # The name alone is safe: nobody resumes from it.
            with contextlib.suppress(ForeignFileError), drop_system_errors():
                write_origin(log.files, log.path, staged.origin, log.access())
        if log.sync_each:
            log.sync()
        self._since = since
        self.fold = self.snapshot = self._next
        return self.fold

    # See `foldlog.protocol.engine.Engine`.

    @property
    def failure(self) -> str | None:
        """Why the log is poisoned; None if it is not."""
        return self.log.poison

    @property
    def closed(self) -> bool:
        """See `Engine`."""
        return self.log.closed

    @property
    def keeps_origin(self) -> bool:
        """See `Engine`."""
        return self.log.file.format.keeps_origin

    @property
    def synced(self) -> tuple[int, WatchCursor]:
        """See `Engine`. The newest batch if it is synced, else none."""
        fold = self.fold
        if self.log.synced_seq >= fold.seq:
            return fold.seq, fold.cursor()
        return 0, WatchCursor.none()

    def stage(self, batches: Sequence[Batch], on: FoldSnapshot | None = None) -> FoldSnapshot:
        """See `Engine`."""
        return (self.fold if on is None else on).with_group(batches)

    def sync(self) -> None:
        """See `Engine`. LogPoisonedError if it fails."""
        self.log.sync()

    def check_file(self) -> None:
        """See `Engine`. Cost: four system calls."""
        self.log.check_unchanged()
        if not self.log.has_its_side_files():
            raise LogChangedError(self.path, "its lock file or its note was removed or replaced")

    def confirm_file(self) -> None:
        """See `Engine`."""
        self.log.check_unchanged()
        self.log.confirm_lock()

    def mark_deleted(self, reason: str) -> bool:
        """See `Engine`. LogChangedError if the directory was replaced."""
        if not self.log.was_deleted():
            return False
        self.log.poison_with(reason)
        return True

    def heal(self) -> FoldSnapshot:
        """See `Engine`. Writes the fold to a new file.

        LogPoisonedError if that file cannot be made durable.
        """
        self.log.confirm_lock()  # before writing much to a directory that may be another
        self.compact()
        if self.log.poison is not None:
            raise LogPoisonedError(self.path, self.log.poison)
        return self.fold

    def begin_export(self, format: FormatName | None) -> Export:
        """See `Engine`. `format`: None means that of the log."""
        log, fold, source = self.log, self.fold, self.log.access()

        def export(dest_dir: StrPath, progress: Progress | None = None) -> ExportManifest:
            return export_fold(
                fold,
                dest_dir,
                format=format or log.file.format.name,
                source=source,
                files=log.files,
                progress=progress,
            )

        return export

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """See `Engine`. Cost: reads the whole file; about 1 us an entry."""
        return verify_live(self.log, self.snapshot.seq, progress)

    def sizes(self) -> Sizes:
        """See `Engine`."""
        log = self.log
        return Sizes(log.position.offset, log.file.base_end, log.appended_bytes)

    def held(self) -> Held:
        """See `Engine`."""
        since = [since_s for file, since_s in self._replaced if file() is not None]
        return Held(len(since), time.monotonic() - min(since) if since else 0.0)

    def cache(self) -> CacheUse:
        """See `Engine`. Entries and leaf indexes; a log in the Rust crate's format has none."""
        return CacheUse(self.fold.cached_bytes, self._cache_bytes)

    def _note_replaced(self) -> None:
        """Note that the base's file is being replaced, while snapshots may still read it."""
        handle = self.fold.source
        self._replaced = [entry for entry in self._replaced if entry[0]() is not None]
        if handle is not None:
            self._replaced.append((weakref.ref(handle), time.monotonic()))

    def abandon(self, *, keep_lock: bool = False) -> None:
        """See `Engine`. `keep_lock`: keep the lock, to reopen the log."""
        self.log.abandon(keep_lock=keep_lock)

    # Compaction.

    @property
    def is_compact(self) -> bool:
        """True if no batch follows the base."""
        return self.log.is_compact

    @property
    def size_bytes(self) -> int:
        """See `Engine`. The size of the log."""
        return self.log.position.offset

    def limit_bytes(self, live_bytes: int, threshold_bytes: int) -> int:
        """See `Engine`."""
        return log_limit(live_bytes, threshold_bytes)

    def has_room(self, size: int) -> bool:
        """See `Engine`. Cost: a system call."""
        free = free_bytes(self.log)
        return free is None or free >= size

    def next_pass(self, job: Rewrite) -> bool:
        """See `Engine`, and `next_pass` in `formats/rewrite.py`."""
        todo = next_pass(job.lag_bytes, job.live_bytes, job.passes)
        if todo is Next.CARRY:
            job.begin_carry()
        elif todo is Next.AGAIN:
            job.begin_again(self.fold)
            self._since = self._nothing_new()
        return todo is not Next.FINISH

    def allowed_bytes(self, job: Rewrite, threshold_bytes: int) -> float:
        """See `Engine`."""
        return job.allowance(lambda live_bytes: log_limit(live_bytes, threshold_bytes))

    def should_compact(self, threshold_bytes: int) -> bool:
        """True if the log has grown enough since its last compaction."""
        log = self.log
        base_bytes = log.file.base_end
        appended_bytes = log.position.offset - base_bytes
        return appended_bytes > threshold_bytes and should_compact(
            appended_bytes, base_bytes, threshold_bytes
        )

    def begin_compaction(self) -> Rewrite:
        """Start a compaction of the current fold.

        Commits may continue. End it with `finish_compaction` or `drop_compaction`.
        """
        if self.log.poison is None:
            self.log.check_usable()
        if self.log.unsettled is not None:
            self.settle()
        rewrite = Rewrite(self.log, self.fold)
        self._since = self._nothing_new()
        return rewrite

    def _nothing_new(self) -> FoldSnapshot:
        fold = self.fold
        return FoldSnapshot(EMPTY_BASE, EMPTY_DELTA, (), fold.seq, fold.cursor(), fold.origin)

    def finish_compaction(self, rewrite: Rewrite) -> FoldSnapshot:
        """Replace the log with the rewritten file. Returns the fold over the new base."""
        since = self._since
        assert since is not None, "no rewrite is under way"
        self._finishing = rewrite
        try:
            self._move_to(rewrite.finish(since))
        except BaseException:
            self.settle()
            raise
        return self.fold

    def settle(self) -> None:
        """After an exception at any point, bring the fold to what the log holds.

        If interrupted, it can be called again.
        """
        rewrite, log = self._finishing, self.log
        log.settle_write()
        if rewrite is not None:
            landed = rewrite.settle()
            if landed is None:
                self._finishing = None
            else:
                self._move_to(landed)
        elif (
            self.fold.seq != log.position.seq
            and self._next.seq == log.position.seq
            and log.poison is None
        ):
            self.fold = self.snapshot = self._next

    def _move_to(self, fold: FoldSnapshot) -> None:
        if fold.source is not self.fold.source:
            self._note_replaced()
            self.fold.retire()
        self.fold = self.snapshot = self._next = fold
        self._since = self._finishing = None

    def drop_compaction(self, rewrite: Rewrite) -> None:
        """Give up a rewrite: the log stays as it is. The caller of `rewrite.write` discards it."""
        self._since = None
        rewrite.cancelled = True

    def compact(self, progress: Progress | None = None) -> FoldSnapshot:
        """Rewrite the log as its fold, unless it is compact. The disk must have room for both."""
        if self.is_compact:
            return self.fold
        rewrite = self.begin_compaction()
        try:
            rewrite.write(progress)
            return self.finish_compaction(rewrite)
        except BaseException:
            self.settle()
            self.drop_compaction(rewrite)
            rewrite.discard()
            raise

    def close(self) -> None:
        """Sync, seal and release the log, and drop the fold.

        Closing twice is fine: the second call finishes the first.
        """
        self.settle()
        self.snapshot = ClosedFold(f"{self.path} is closed")
        self.fold = self._next = FoldSnapshot.empty()
        self.log.close()
