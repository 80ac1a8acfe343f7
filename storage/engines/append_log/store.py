"""AppendLogSnapshot: the append-log engine as a `SnapshotStore`, for one thread."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, Self

from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import FoldlogError, LogAccessError, check_forward, is_own_fault
from foldlog.protocol.logger import log
from foldlog.protocol.options import (
    CACHE_BYTES,
    COMPACT_THRESHOLD,
    ENGINE_SYNC,
    OnDamage,
    check_flag,
)
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import CursorLike, WatchCursor
from foldlog.protocol.updates import Batch, Update, encode_batch
from foldlog.storage.artifacts import artifact
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.engines.append_log.engine import LogEngine
from foldlog.storage.formats.format import Progress, VerifyReport
from foldlog.storage.handover import discard, enter_alone
from foldlog.storage.log.files import OS_FILES, Files, check_files, resolve
from foldlog.storage.readable import Readable

_getframe = sys._getframe


class AppendLogSnapshot(Readable):
    """A durable fold in one file, for one thread at a time.

    Once `apply` has returned, its batch survives a killed process. It survives a power loss once
    `sync` or `close` has returned, or at once with `sync="always"`. For many threads, use
    `foldlog.open`.

    >>> cursor, snap = AppendLogSnapshot.open("routes.log")
    >>> cursor.is_none
    True
    >>> batch = [Put("a", b"10.0.0.1"), Put("b", b"10.0.0.2"), Delete("b")]
    >>> snap.apply(batch, WatchCursor.from_u64(7))
    1
    >>> snap.get("a").value, snap.get("b"), snap.cursor()
    (b'10.0.0.1', None, WatchCursor.from_u64(7))
    >>> snap.close()
    """

    def __init__(self, engine: LogEngine, compact_threshold: int) -> None:
        """Not for callers: use `open`, `load` or `import_artifact`."""
        self._engine = self._published = engine
        self._line: deque[object] = deque()
        """The frame of the call that is writing, if any."""
        self._threshold = compact_threshold
        # After a failed compaction: appended bytes before the next attempt.
        self._retry_bytes = 0
        self.report: OpenReport = engine.report
        """What opening found and did."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        compact_threshold: int = COMPACT_THRESHOLD.default,
        *,
        format: FormatName | None = None,
        sync: Literal["never", "always"] = "never",
        on_damage: OnDamage = "refuse",
        cache_bytes: int = CACHE_BYTES.default,
        files: Files = OS_FILES,
        progress: Progress | None = None,
    ) -> tuple[WatchCursor, Self]:
        """Open or create the log at `path`: replay it, and compact it unless it is compact.

        Returns the cursor to resume after, and the store.

        `compact_threshold`: `apply` compacts once the appended bytes exceed both this and the size
        of the base. `sync="always"`: each `apply` waits for the disk. `on_damage="cut"`: keep what
        is before the first damage and set the rest aside, for a cache whose upstream replays.
        `cache_bytes`: bound of the memory for what was read from the base; see `foldlog.open`.

        `format`: of a new log; "foldlog" if None. An existing log has the format that its header
        states; naming another is an InvalidFormatError. "slipstream-v2" is the file of the Rust
        crate, used in place. It promises less: a crash may leave part of a batch in it (the cursor
        is then not moved), sequences restart in each process, all entries are in memory, and some
        damage at its very end cannot be told from a torn write. See `docs/interchange.md`.

        Raises StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError, and
        leaves the file as it was. If a valid log cannot be compacted for lack of space or
        permission, it is opened uncompacted, and `report.compaction_error` says why. Cost: 30 ms
        for 1,000,000 compacted entries of 100 bytes; 2-3 s for the same in batches, compaction
        included.
        """
        COMPACT_THRESHOLD.check(compact_threshold)
        ENGINE_SYNC.check(sync)
        cache_bytes = CACHE_BYTES.check(cache_bytes)
        check_files(files)
        engine = LogEngine(
            path,
            format=format,
            on_damage=on_damage,
            sync_each=sync == "always",
            cache_bytes=cache_bytes,
            files=files,
            progress=progress,
        )
        snap = cls(engine, compact_threshold)
        try:
            poisoned = engine.log.poison is not None
            if not engine.is_compact:
                snap.report = _compacted_at_open(snap, progress, poisoned)
        except BaseException:
            engine.log.discard()
            raise
        return snap.cursor(), snap

    @classmethod
    def load(cls, path: StrPath) -> tuple[WatchCursor, Self]:
        """`open` with the default threshold, 10 MiB of appended bytes."""
        return cls.open(path)

    @classmethod
    def import_artifact(
        cls,
        artifact_dir: StrPath,
        dest_path: StrPath,
        compact_threshold: int = COMPACT_THRESHOLD.default,
        *,
        format: FormatName | None = None,
        files: Files = OS_FILES,
        progress: Progress | None = None,
    ) -> tuple[WatchCursor, Self]:
        """Verify an exported artifact in full, import its log to `dest_path`, and open it.

        The artifact may be foldlog's or of the Rust crate's append log; its manifest says which.
        `format`: of the new log; "foldlog" if None.

        ArtifactInvalidError for anything wrong with the artifact, FileExistsError if `dest_path`
        exists: nothing was written. A crash part-way leaves nothing at `dest_path`; a crash after
        the rename leaves a valid store.
        """
        COMPACT_THRESHOLD.check(compact_threshold)
        check_files(files)
        artifact.import_artifact(
            artifact_dir, dest_path, format=format, files=files, progress=progress
        )
        return cls.open(resolve(dest_path), compact_threshold, files=files)

    def apply(
        self, updates: Iterable[Update], cursor: CursorLike, *, forward_only: bool = False
    ) -> int:
        """Atomically fold the updates, in order, and move the cursor. Returns the batch's sequence.

        Any cursor is accepted, even one before the last. It is opaque: the upstream may have been
        restored or recreated, and only the caller knows. With `forward_only`, CursorRegressed
        unless the cursor is at or after the last (compared as bytes, for cursors of equal length).

        TypeError or ValueError for an update that is not valid; OSError if the log could not be
        written. In all these cases nothing was written. LogChangedError if someone else touched the
        file. On return, the batch survives a killed process; a power loss only with sync="always".
        Cost: 3-6 us, and 1-2 us an update.
        """
        self._engine.snapshot.seq  # noqa: B018 - StoreClosed comes before bad arguments
        if forward_only is not False:
            check_flag("forward_only", forward_only)
        batch = encode_batch(updates, cursor)
        line = self._line
        try:
            line.append(_getframe())
            if line[0] is not _getframe():
                self._enter(_getframe())
            if forward_only:
                self._engine.settle()  # the last cursor may be that of an interrupted call
                check_forward(batch.cursor, self._engine.fold.cursor())
            return self._apply(batch)
        finally:
            discard(line, _getframe())

    def _apply(self, batch: Batch) -> int:
        seq = self._engine.commit((batch,)).seq
        if self._engine.should_compact(max(self._threshold, self._retry_bytes)):
            try:
                self._compact()
            except (OSError, FoldlogError) as error:
                if not is_own_fault(error):
                    raise
                # The batch is in the log: the caller must not see an error.
                self._failed_to_compact()
        return seq

    def _failed_to_compact(self) -> None:
        """Try again once the appended bytes have doubled."""
        self._retry_bytes = 2 * self._engine.log.appended_bytes

    def compact(self, progress: Progress | None = None) -> None:
        """Rewrite the log as its fold, unless it is compact.

        It also clears the poison that a failed fsync left. On an error the log stays as it was.
        Cost: a copy of the unchanged leaves, and about 1 us an entry for the others.
        """
        self._engine.snapshot.seq  # noqa: B018
        try:
            self._enter(_getframe())
            self._compact(progress)
        finally:
            discard(self._line, _getframe())

    def _compact(self, progress: Progress | None = None) -> None:
        self._engine.compact(progress)
        self._retry_bytes = 0

    def sync(self) -> None:
        """Make all applied batches survive a power loss.

        LogPoisonedError if the disk refuses: `compact` recovers.
        """
        self._engine.snapshot.seq  # noqa: B018
        try:
            self._enter(_getframe())
            self._engine.log.sync()
        finally:
            discard(self._line, _getframe())

    def export_to(
        self,
        dest_dir: StrPath,
        progress: Progress | None = None,
        *,
        format: FormatName | None = None,
    ) -> ExportManifest:
        """Write the state as an artifact at `dest_dir`, which must not exist (FileExistsError).

        The artifact appears complete or not at all. `format`: of the artifact; that of the log if
        None. The Rust crate imports "slipstream-v2".
        """
        self._engine.snapshot.seq  # noqa: B018
        manifest: ExportManifest = self._engine.begin_export(format)(dest_dir, progress)
        return manifest

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Check every invariant of the log, up to its current end.

        Reports everything that is wrong, and changes nothing. Cost: reads the whole file; about
        1 us an entry.
        """
        self._engine.snapshot.seq  # noqa: B018
        return self._engine.verify(progress)

    def close(self) -> None:
        """Sync, seal and release the log. Every other method raises StoreClosed from then on.

        Closing twice is fine. If interrupted, call it again to finish.
        """
        try:
            self._enter(_getframe())
            self._engine.close()
        finally:
            discard(self._line, _getframe())

    def _enter(self, frame: object) -> None:
        """Begin to write, after settling what an interrupted call left half done.

        ReentrantCall if another call is writing.
        """
        enter_alone(self._line, frame)
        self._engine.settle()


def _compacted_at_open(
    snap: AppendLogSnapshot, progress: Progress | None, poisoned: bool
) -> OpenReport:
    """Compact the opened log. A valid log is served even without the space or permission to."""
    report = snap.report
    try:
        snap.compact(progress)
    except (OSError, LogAccessError) as error:
        if poisoned or not is_own_fault(error):
            raise  # nothing can be written to this log, or the thread was struck
        reason = str(error)  # a record of the error itself would keep the old file open
        log.warning("%s: opened, but not compacted: %s", report.path, reason)
        snap._failed_to_compact()
        return replace(report, compaction_error=f"{type(error).__name__}: {error}")
    size = snap._engine.log.position.offset
    return replace(report, compacted=True, rewritten=poisoned, size=size)
