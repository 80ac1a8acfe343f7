"""RocksDbSnapshot: the RocksDB engine as a `SnapshotStore`, for one thread."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Literal, Self, cast

from foldlog.protocol.engine import Held, OpenReport, Sizes
from foldlog.protocol.options import CACHE_BYTES, ENGINE_SYNC, ON_DAMAGE, OnDamage
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import CursorLike, WatchCursor, as_cursor
from foldlog.protocol.updates import Update, raw_updates
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.exchange import artifact
from foldlog.storage.engines.rocksdb.exchange.verify import RocksDbReport
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.formats.format import Progress
from foldlog.storage.handover import discard, enter_alone
from foldlog.storage.log.files import resolve
from foldlog.storage.readable import Publisher, Readable

_getframe = sys._getframe


class RocksDbSnapshot(Readable):
    """A durable fold in a RocksDB database, for one thread at a time.

    It may hold more entries than fit in memory, and needs the extra `rocksdb`. Once `apply` has
    returned, its batch survives a killed process. It survives a power loss once `sync` or `close`
    has returned, or at once with `sync="always"`. Closing the store ends its snapshots.

    >>> cursor, snap = RocksDbSnapshot.open("routes.db")
    >>> cursor.is_none
    True
    >>> batch = [Put("a", b"10.0.0.1"), Put("b", b"10.0.0.2"), Delete("b")]
    >>> snap.apply(batch, WatchCursor.from_u64(7))
    1
    >>> snap.get("a").value, snap.get("b"), snap.cursor()
    (b'10.0.0.1', None, WatchCursor.from_u64(7))
    >>> snap.close()
    """

    def __init__(self, engine: RocksDbEngine) -> None:
        """Not for callers: use `open` or `import_artifact`."""
        self._engine = engine
        self._published = cast(Publisher, engine)
        self._line: deque[object] = deque()
        """The frame of the call that is writing, if any."""
        self.report: OpenReport = engine.report
        """What opening found."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        *,
        sync: Literal["never", "always"] = "never",
        on_damage: OnDamage = "refuse",
        cache_bytes: int = CACHE_BYTES.default,
    ) -> tuple[WatchCursor, Self]:
        """Open or create the database in the directory `path`.

        Returns the cursor to resume after, and the store.

        `sync="always"`: each `apply` waits for the disk. `on_damage="cut"`: drop what follows the
        first damage in the write-ahead log, for a cache whose upstream replays. `cache_bytes`: size
        of RocksDB's block cache, indexes and filters included; memtables take up to 192 MiB more.

        Raises StoreLocked, CorruptLogError, InvalidFormatError or OSError, and leaves anything that
        is not a database of foldlog as it is. ImportError without the extra. Cost: 0.1-0.5 s at any
        size, and the replay of up to 64 MiB of write-ahead log.
        """
        ENGINE_SYNC.check(sync)
        ON_DAMAGE.check(on_damage)
        cache_bytes = CACHE_BYTES.check(cache_bytes)
        engine = RocksDbEngine(
            path, sync_each=sync == "always", on_damage=on_damage, cache_bytes=cache_bytes
        )
        try:
            snap = cls(engine)
            return snap.cursor(), snap
        except BaseException:
            engine.abandon()
            raise

    @classmethod
    def import_artifact(
        cls, artifact_dir: StrPath, dest_path: StrPath, *, progress: Progress | None = None
    ) -> tuple[WatchCursor, Self]:
        """Verify an artifact of a RocksDB store in full, import it to `dest_path`, and open it.

        ArtifactInvalidError for anything wrong with the artifact, FileExistsError if `dest_path`
        exists: nothing was written. A crash part-way leaves nothing at `dest_path`; a crash after
        the rename leaves a valid store.
        """
        artifact.import_artifact(artifact_dir, dest_path, progress=progress)
        return cls.open(resolve(dest_path))

    def apply(self, updates: Iterable[Update], cursor: CursorLike) -> int:
        """Atomically fold the updates, in order, and move the cursor. Returns the batch's sequence.

        TypeError or ValueError for an update that is not valid: nothing was written. OSError if
        RocksDB could not write. On return, the batch survives a killed process; a power loss only
        with sync="always". Cost: 10 us, and 1-2 us an update.
        """
        self._engine.snapshot.seq  # noqa: B018 - StoreClosed comes before bad arguments
        cursor = as_cursor(cursor)
        raw = raw_updates(updates)
        try:
            enter_alone(self._line, _getframe())
            return self._engine.commit_raw(raw, cursor)
        finally:
            discard(self._line, _getframe())

    def snapshot(self) -> RocksDbFold:  # type: ignore[override]
        """The current state: immutable, safe to share among threads. Closing the store ends it."""
        return cast(RocksDbFold, super().snapshot())

    def compact(self) -> None:
        """Let RocksDB compact all tables now: frees at once what was overwritten or removed."""
        self._engine.snapshot.seq  # noqa: B018
        try:
            enter_alone(self._line, _getframe())
            self._engine.compact()
        finally:
            discard(self._line, _getframe())

    def sync(self) -> None:
        """Make all applied batches survive a power loss.

        OSError if the disk refuses: `heal` recovers.
        """
        self._engine.snapshot.seq  # noqa: B018
        try:
            enter_alone(self._line, _getframe())
            self._engine.sync()
        finally:
            discard(self._line, _getframe())

    def heal(self) -> None:
        """Reopen the database after RocksDB refused to write, as it does after any disk error.

        Reads continue meanwhile, unless a batch whose `apply` failed was written, which `cursor`
        tells. Snapshots older than the newest raise FoldlogError from then on.
        """
        self._engine.snapshot.seq  # noqa: B018
        try:
            enter_alone(self._line, _getframe())
            self._engine.heal()
        finally:
            discard(self._line, _getframe())

    def export_to(self, dest_dir: StrPath, progress: Progress | None = None) -> ExportManifest:
        """Write the state as an artifact at `dest_dir`, which must not exist (FileExistsError).

        The artifact appears complete or not at all. Its tables are hard links if the file system
        allows, so it takes hardly any space. Cost: a read of all files, for their digests. Never
        edit an artifact's files in place: the store reads them, too.
        """
        self._engine.snapshot.seq  # noqa: B018
        manifest: ExportManifest = self._engine.begin_export(None)(dest_dir, progress)
        return manifest

    def verify(self, progress: Progress | None = None) -> RocksDbReport:
        """Read every entry, with all checksums.

        Reports everything that is wrong, and changes nothing. Cost: about 1 us an entry.
        """
        self._engine.snapshot.seq  # noqa: B018
        return self._engine.verify(progress)

    def sizes(self) -> Sizes:
        """What the store takes on disk, in bytes."""
        return self._engine.sizes()

    def held(self) -> Held:
        """How many snapshots besides the newest are held, and the age of the oldest."""
        return self._engine.held()

    def close(self) -> None:
        """Sync and release the database; its snapshots end.

        Every other method raises StoreClosed from then on. Closing twice is fine. If interrupted,
        call it again to finish.
        """
        try:
            enter_alone(self._line, _getframe())
            self._engine.close()
        finally:
            discard(self._line, _getframe())
