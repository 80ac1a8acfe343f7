"""AppendLogSnapshot: the engine behind the contract of `SnapshotStore`, for one thread."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, Self

from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import FoldlogError, LogAccessError, ReentrantCall, check_forward
from foldlog.protocol.options import COMPACT_THRESHOLD, ENGINE_SYNC, OnDamage
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import CursorLike, WatchCursor
from foldlog.protocol.updates import Batch, Update, encode_batch
from foldlog.storage.artifacts import artifact
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.engines.append_log.engine import LogEngine
from foldlog.storage.formats.format import Progress, VerifyReport
from foldlog.storage.handover import discard, is_over
from foldlog.storage.log.files import OS_FILES, Files, resolve
from foldlog.storage.readable import Readable

log = logging.getLogger("foldlog")
_getframe = sys._getframe


class AppendLogSnapshot(Readable):
    """A durable fold in one file, for one thread at a time.

    What an answered `apply` means: it survives a killed process, always; it survives a power loss once `sync` or `close`
    has returned, or at once with `sync="always"`. For many threads, use `foldlog.open`.

    >>> cursor, snap = AppendLogSnapshot.open("routes.log")
    >>> cursor.is_none
    True
    >>> snap.apply([Put("a", b"10.0.0.1"), Put("b", b"10.0.0.2"), Delete("b")], WatchCursor.from_u64(7))
    1
    >>> snap.get("a").value, snap.get("b"), snap.cursor()
    (b'10.0.0.1', None, WatchCursor.from_u64(7))
    >>> snap.close()
    """

    def __init__(self, engine: LogEngine, compact_threshold: int) -> None:
        """Not for callers: use `open`, `load` or `import_artifact`."""
        self._engine = self._published = engine
        self._line: deque[object] = deque()
        """The frame of the call that writes, if there is one."""
        self._threshold = compact_threshold
        self._retry_bytes = (
            0  # after a compaction that failed: how much must be appended before the next is tried
        )
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
        files: Files = OS_FILES,
        progress: Progress | None = None,
    ) -> tuple[WatchCursor, Self]:
        """Open or create the log at `path`; replay it, compact it if it is not compact. Returns the cursor to resume after.

        `compact_threshold`: appended bytes (and no fewer than the base has) after which `apply` compacts.
        `sync`: whether each `apply` waits for the disk. `on_damage="cut"` keeps what stands before the first damage and
        sets the rest aside, for a cache whose upstream replays.

        `format`: of a new log, "foldlog" if None. A log that exists is of the format that its head tells: to name another is an
        InvalidFormatError. "slipstream-v2" is the file of the Rust crate, worked on in place. It promises less: a crash may
        leave a part of a batch in it (its cursor is then not moved), the sequences start anew in each process, all entries are
        in memory, and a few kinds of damage at its very end cannot be told from a torn write. See `docs/interchange.md`.

        Raises StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError; the file is as it was. Where
        there is no room to compact a good log, or no right to, it is opened as it is, and `report.compaction_error` says why.
        Cost: 30 ms for 1,000,000 entries of 100 bytes, compacted; 2-3 s in batches, compacting them.
        """
        COMPACT_THRESHOLD.check(compact_threshold)
        ENGINE_SYNC.check(sync)
        engine = LogEngine(
            path,
            format=format,
            on_damage=on_damage,
            sync_each=sync == "always",
            files=files,
            progress=progress,
        )
        snap = cls(engine, compact_threshold)
        try:
            poisoned = engine.log.poison is not None
            if not engine.is_compact:
                snap.report = _compacted_at_open(snap, progress, poisoned)
        except BaseException:
            engine.log.abandon()
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
        """Verify an exported artifact in full, land its log at `dest_path`, and open it.

        The artifact is one of foldlog's or of the Rust crate's append log, as its manifest tells. `format`: of the log that is
        made, "foldlog" if None.

        ArtifactInvalidError for anything wrong with it, FileExistsError if `dest_path` exists: then nothing was written.
        A crash part-way leaves nothing at `dest_path`; a crash after the rename leaves a valid store.
        """
        COMPACT_THRESHOLD.check(compact_threshold)
        artifact.import_artifact(
            artifact_dir, dest_path, format=format, files=files, progress=progress
        )
        return cls.open(resolve(dest_path), compact_threshold, files=files)

    def apply(
        self, updates: Iterable[Update], cursor: CursorLike, *, forward_only: bool = False
    ) -> int:
        """Atomically fold the updates, in order, and move the cursor. Returns the batch's sequence.

        Any cursor is taken, also one before the last: it is opaque, an upstream may have been restored or recreated, and only
        its feeder knows. With `forward_only`, CursorRegressed unless the cursor is at or after the last one (compared as
        bytes, for cursors of one length): nothing was written.

        TypeError or ValueError for an update that is not sound: nothing was written. OSError if the log could not be written:
        the same. LogChangedError if someone else touched the file. Survives a killed process on return; power loss only
        with sync="always". Cost: 3-6 us, and 1-2 us an update.
        """
        self._engine.snapshot.seq  # noqa: B018 - StoreClosed comes before complaints about the arguments
        batch = encode_batch(updates, cursor)
        line = self._line
        try:
            line.append(_getframe())
            if line[0] is not _getframe():
                self._enter(_getframe())
            if forward_only:
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
                if isinstance(error, OSError) and error.errno is None:
                    raise  # not the system's: a signal handler's TimeoutError, say
                # The batch is in the log, and its caller must not be told otherwise.
                self._failed_to_compact()
        return seq

    def _failed_to_compact(self) -> None:
        """Try again when as much was appended again."""
        self._retry_bytes = 2 * self._engine.log.appended_bytes

    def compact(self, progress: Progress | None = None) -> None:
        """Rewrite the log as its fold, if it is not that already. Also clears the poison that a failed fsync left.

        On an error the log goes on as it was. Cost: a copy of the untouched leaves, about 1 us an entry for the others.
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
        """Make all applied batches survive a power loss. LogPoisonedError if the disk refuses: `compact` recovers."""
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
        """Write the state as an artifact at `dest_dir`, which must not exist (FileExistsError). Complete or absent.

        `format`: of the artifact; that of the log, if None. One of "slipstream-v2" is what the Rust crate imports.
        """
        self._engine.snapshot.seq  # noqa: B018
        manifest: ExportManifest = self._engine.begin_export(format)(dest_dir, progress)
        return manifest

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Check every invariant of the log, up to its end as it is now. Tells all that is wrong, and changes nothing.

        Cost: reads the whole file; about 1 us an entry.
        """
        self._engine.snapshot.seq  # noqa: B018
        return self._engine.verify(progress)

    def close(self) -> None:
        """Sync, seal and release the log. Closing twice is fine; everything else raises StoreClosed from then on.

        One that was interrupted can be called again, and finishes.
        """
        try:
            self._enter(_getframe())
            self._engine.close()
        finally:
            discard(self._line, _getframe())

    def _enter(self, frame: object) -> None:
        """Begin to write. ReentrantCall, at once, if another call writes: this thread's, further down its stack, or another's.

        What a call that was interrupted has left half done is settled first.
        """
        line = self._line
        if frame not in line:
            line.append(frame)
        while (first := line[0]) is not frame:
            if not is_over(first):
                raise ReentrantCall(
                    "called while the store is being written: it is for one thread at a time"
                )
            discard(line, first)
        self._engine.settle()


def _compacted_at_open(
    snap: AppendLogSnapshot, progress: Progress | None, poisoned: bool
) -> OpenReport:
    """Compact the log that was opened. One that is good is served also where there is no room for that, or no right to."""
    report = snap.report
    try:
        snap.compact(progress)
    except (OSError, LogAccessError) as error:
        if poisoned:
            raise  # nothing can be written through it
        reason = str(error)  # a record of the error itself would keep the old file open
        log.warning("%s: opened, but not compacted: %s", report.path, reason)
        snap._failed_to_compact()
        return replace(report, compaction_error=f"{type(error).__name__}: {error}")
    size = snap._engine.log.position.offset
    return replace(report, compacted=True, rewritten=poisoned, size=size)
