"""RocksDbSnapshot: the contract of `SnapshotStore` on RocksDB, for one thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self, cast

from foldlog.protocol.engine import Held, OpenReport, Sizes
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import CursorLike, WatchCursor, as_cursor
from foldlog.protocol.updates import Update, raw_updates
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.engines.rocksdb import artifact
from foldlog.storage.engines.rocksdb.database import (
    DEFAULT_CACHE_BYTES,
    MIN_CACHE_BYTES,
    Damage,
)
from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.fold import RocksDbFold
from foldlog.storage.engines.rocksdb.verify import RocksDbReport
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import resolve
from foldlog.storage.readable import Publisher, Readable


class RocksDbSnapshot(Readable):
    """A durable fold in a RocksDB database, for one thread at a time: for more entries than
    memory holds.

    It needs the extra `rocksdb`. What an answered `apply` means: it survives a killed process,
    always; it survives a power loss once `sync` or `close` has returned, or at once with
    `sync="always"`. Its snapshots end with it.

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
        self.report: OpenReport = engine.report
        """What opening found."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        *,
        sync: Literal["never", "always"] = "never",
        on_damage: Damage = "refuse",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> tuple[WatchCursor, Self]:
        """Open or create the database in the directory `path`. Returns the cursor to resume after.

        `sync`: whether each `apply` waits for the disk. `on_damage="cut"` drops what follows the
        first damage of the write-ahead log, for a cache whose upstream replays. `cache_bytes`: of
        RocksDB's block cache, indexes and filters included; up to 192 MiB of memtables come on
        top.

        Raises StoreLocked, CorruptLogError, InvalidFormatError or OSError, and leaves what is no
        database of foldlog as it is. ImportError without the extra. Cost: 0.1-0.5 s at any size,
        and the replay of up to 64 MiB of write-ahead log.
        """
        check_options(sync, on_damage, cache_bytes)
        engine = RocksDbEngine(
            path, sync_each=sync == "always", on_damage=on_damage, cache_bytes=cache_bytes
        )
        snap = cls(engine)
        return snap.cursor(), snap

    @classmethod
    def import_artifact(
        cls, artifact_dir: StrPath, dest_path: StrPath, *, progress: Progress | None = None
    ) -> tuple[WatchCursor, Self]:
        """Verify an exported artifact of a RocksDB store in full, land it at `dest_path`, and
        open it.

        ArtifactInvalidError for anything wrong with it, FileExistsError if `dest_path` exists:
        then nothing was written. A crash part-way leaves nothing at `dest_path`; a crash after
        the rename leaves a valid store.
        """
        artifact.import_artifact(artifact_dir, dest_path, progress=progress)
        return cls.open(resolve(dest_path))

    def apply(self, updates: Iterable[Update], cursor: CursorLike) -> int:
        """Atomically fold the updates, in order, and advance the cursor.

        Returns the batch's sequence.

        TypeError or ValueError for an update that is not valid: nothing was written. OSError if
        RocksDB could not write. It survives a killed process on return; a power loss only with
        sync="always". Cost: 10 us, and 1-2 us an update.
        """
        self._engine.snapshot.seq  # noqa: B018 - StoreClosed comes before bad arguments
        cursor = as_cursor(cursor)
        return self._engine.commit_raw(raw_updates(updates), cursor)

    def snapshot(self) -> RocksDbFold:  # type: ignore[override]
        """The state that reads see now: immutable, safe to share among threads; it ends when the
        store is closed.
        """
        return cast(RocksDbFold, super().snapshot())

    def compact(self) -> None:
        """Let RocksDB compact everything now, which frees at once what was overwritten or
        removed.
        """
        self._engine.snapshot.seq  # noqa: B018
        self._engine.compact()

    def sync(self) -> None:
        """Make all applied batches survive a power loss.

        OSError if the disk refuses: `heal` recovers.
        """
        self._engine.snapshot.seq  # noqa: B018
        self._engine.sync()

    def heal(self) -> None:
        """Open the database anew after RocksDB refused to write, as it does after any error of
        the disk.

        Snapshots taken before raise StoreClosed from then on. A batch whose `apply` failed may be
        there: `cursor` tells.
        """
        self._engine.snapshot.seq  # noqa: B018
        self._engine.heal()

    def export_to(self, dest_dir: StrPath, progress: Progress | None = None) -> ExportManifest:
        """Write the state as an artifact at `dest_dir`, which must not exist (FileExistsError).

        Complete or absent.

        The tables are hard links where the file system allows, so it takes hardly any space;
        their digests are computed, which takes a read of all. Never edit an artifact's files in
        place: the store reads them, too.
        """
        return self._engine.export(self.snapshot(), dest_dir, progress)

    def verify(self, progress: Progress | None = None) -> RocksDbReport:
        """Read every entry, with all checksums.

        Tells all that is wrong, and changes nothing. Cost: about 1 us an entry.
        """
        self._engine.snapshot.seq  # noqa: B018
        return self._engine.verify(progress)

    def sizes(self) -> Sizes:
        """What the store takes on disk."""
        return self._engine.sizes()

    def held(self) -> Held:
        """How many snapshots are held beside the newest, and the age of the oldest."""
        return self._engine.held()

    def close(self) -> None:
        """Sync and release the database; snapshots end.

        Closing twice is fine; everything else raises StoreClosed then.
        """
        self._engine.close()


def check_options(sync: object, on_damage: object, cache_bytes: object) -> None:
    """TypeError or ValueError unless these can be options of `open`."""
    if sync not in ("never", "always"):
        raise ValueError(f'sync is "never" or "always", not {sync!r}')
    if on_damage not in ("refuse", "cut"):
        raise ValueError(f'on_damage is "refuse" or "cut", not {on_damage!r}')
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
        raise TypeError(f"cache_bytes is an int, not {type(cache_bytes).__name__}")
    if cache_bytes < MIN_CACHE_BYTES:
        raise ValueError(f"cache_bytes is at least {MIN_CACHE_BYTES}, got {cache_bytes}")
