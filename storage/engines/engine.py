"""The engine: a log and the fold of it, kept in step. One thread writes; it is the caller who decides which."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from foldlog.protocol.options import OnDamage
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import NAME_BYTES
from foldlog.protocol.updates import Batch
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.delta import EMPTY_DELTA
from foldlog.storage.fold.snapshot import ClosedFold, FoldSnapshot
from foldlog.storage.formats.format import Progress
from foldlog.storage.formats.rewrite import Rewrite
from foldlog.storage.log.files import OS_FILES, Files, resolve
from foldlog.storage.log.lock import WriterLock
from foldlog.storage.log.log import Log
from foldlog.storage.log.opening import open_log
from foldlog.storage.log.origins import write_origin

COMPACT_RATIO = 1.0
"""Appended bytes per byte of base that make a compaction worth its price: each record is then rewritten about twice."""


def should_compact(appended_bytes: int, base_bytes: int, threshold_bytes: int) -> bool:
    """Whether so much was appended that the log is to be compacted."""
    return appended_bytes > max(threshold_bytes, COMPACT_RATIO * base_bytes)


LIMIT_FACTOR = 3
MIN_LIMIT = 4 * 1024 * 1024
"""Below this, a log is not worth waiting for."""


def log_limit(live_bytes: int, threshold_bytes: int) -> int:
    """What a store keeps its log below, but for one batch: 3 x (live + compact_threshold) bytes."""
    return max(LIMIT_FACTOR * (live_bytes + threshold_bytes), MIN_LIMIT)


class Engine:
    """A log that is open for writing, and its fold."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: FormatName | None = None,
        on_damage: OnDamage = "refuse",
        sync_each: bool = False,
        files: Files = OS_FILES,
        progress: Progress | None = None,
        lock: WriterLock | None = None,
        crashed: Log | None = None,
    ) -> None:
        """Open or create the log at `path`. See `opening.open_log` for the errors, for `lock` and for `crashed`."""
        self.path = resolve(path)
        self.log, self.fold, self.report = open_log(
            self.path,
            files,
            format=format,
            on_damage=on_damage,
            sync_each=sync_each,
            progress=progress,
            lock=lock,
            crashed=crashed,
        )
        # Invariant: fold.seq == log.position.seq, or the log is poisoned. A KeyboardInterrupt may come between the write and
        # the assignment behind it; then `_next` is what the log holds.
        self._next = self.fold
        # What the callers read: the fold, until the engine is closed.
        self.snapshot: FoldSnapshot | ClosedFold = self.fold
        # While a rewrite is under way: what was committed since it started, as a fold over an empty base.
        self._since: FoldSnapshot | None = None
        self._finishing: Rewrite | None = None
        """The rewrite that is taking the log's place."""

    def commit(self, batches: Sequence[Batch], staged: FoldSnapshot | None = None) -> FoldSnapshot:
        """Append the batches as one commit group, and fold them. Returns the new fold.

        `staged` is that fold, where the caller has made it already to decide what to write.

        On return they survive a killed process, and with `sync_each` a power loss. On an error none of them is folded,
        and none will be after a restart: except that a failed fsync leaves that open until the log is rewritten.
        Cost: a `stat` and a `write`, and about 1 us an update.
        """
        log = self.log
        if self._finishing is not None or self.fold.seq != log.position.seq:
            self.settle()
        since = self._since
        if staged is None:
            staged = self.fold.with_group(batches)
        self._next = staged
        beside_log = not log.file.format.keeps_origin and staged.origin != self.fold.origin
        if beside_log:
            write_origin(log.files, log.path, staged.origin[:NAME_BYTES])
        log.append([batch.item for batch in batches])
        if beside_log:
            with contextlib.suppress(OSError):  # the name alone is safe: it is never resumed from
                write_origin(log.files, log.path, staged.origin)
        if log.sync_each:
            log.sync()
        if since is not None:
            self._since = since.with_group(batches)
        self.fold = self.snapshot = self._next
        return self.fold

    @property
    def is_compact(self) -> bool:
        """Whether the log holds no batch behind its base."""
        return self.log.is_compact

    def should_compact(self, threshold_bytes: int) -> bool:
        """Whether the log has grown enough since its last compaction."""
        return should_compact(self.log.appended_bytes, self.log.file.base_end, threshold_bytes)

    def begin_rewrite(self) -> Rewrite:
        """Start a compaction of the fold as it is now. `commit` may go on; then `finish_rewrite` or `drop_rewrite`."""
        if self.log.poison is None:
            self.log.check_usable()
        rewrite = Rewrite(self.log, self.fold)
        self._since = self._nothing_new()
        return rewrite

    def rewrite_again(self, rewrite: Rewrite) -> None:
        """Let the next pass of the rewrite write the fold as it is by now."""
        rewrite.begin_again(self.fold)
        self._since = self._nothing_new()

    def _nothing_new(self) -> FoldSnapshot:
        fold = self.fold
        return FoldSnapshot(EMPTY_BASE, EMPTY_DELTA, (), fold.seq, fold.cursor(), fold.origin)

    def finish_rewrite(self, rewrite: Rewrite) -> FoldSnapshot:
        """Let the rewritten file take the log's place. Returns the fold over the new base."""
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
        """After an exception at any point: bring the fold to what the log holds. Can be done again if it was interrupted."""
        rewrite, log = self._finishing, self.log
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
        self.fold = self.snapshot = self._next = fold
        self._since = self._finishing = None

    def drop_rewrite(self, rewrite: Rewrite) -> None:
        """Give a rewrite up: the log goes on as it was. Whoever runs `rewrite.write` discards it."""
        self._since = None
        rewrite.cancelled = True

    def compact(self, progress: Progress | None = None) -> FoldSnapshot:
        """Rewrite the log as its fold, unless it is that already. The disk must hold both meanwhile."""
        if self.is_compact:
            return self.fold
        rewrite = self.begin_rewrite()
        try:
            rewrite.write(progress)
            return self.finish_rewrite(rewrite)
        except BaseException:
            self.settle()
            self.drop_rewrite(rewrite)
            rewrite.discard()
            raise

    def close(self) -> None:
        """Sync, seal and release the log, and let go of the fold. Closing twice is fine: the second finishes the first."""
        self.settle()
        self.snapshot = ClosedFold(f"{self.path} is closed")
        self.fold = self._next = FoldSnapshot.empty()
        self.log.close()
