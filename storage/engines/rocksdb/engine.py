"""RocksDbEngine: a RocksDB database and its fold, as the engine that a writer drives.

`commits.py` has the way of a batch; here are healing, compaction, the past, export and statistics.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from foldlog.protocol.engine import CacheUse, Compaction, Export, Held, Sizes
from foldlog.protocol.errors import FoldlogError, LogChangedError, drop_system_errors
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import DecodedBatch, Delete, Put
from foldlog.storage.artifacts.artifact import ExportManifest
from foldlog.storage.engines.rocksdb.commits import Commits
from foldlog.storage.engines.rocksdb.compaction import FullCompaction
from foldlog.storage.engines.rocksdb.database.errors import translated, typed
from foldlog.storage.engines.rocksdb.database.opening import property_of
from foldlog.storage.engines.rocksdb.database.state import directory_bytes
from foldlog.storage.engines.rocksdb.exchange import artifact
from foldlog.storage.engines.rocksdb.exchange.reading import stored_fold
from foldlog.storage.engines.rocksdb.exchange.verify import RocksDbReport, verify_open
from foldlog.storage.engines.rocksdb.fold.difference import difference
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.engines.rocksdb.fold.staged import StagedFold
from foldlog.storage.formats.format import Progress

_getframe = sys._getframe


class RocksDbEngine(Commits):
    """See `foldlog.protocol.engine.Engine`."""

    def heal(self) -> RocksDbFold:
        """See `Engine`. Reopens the database, and flushes its write-ahead log to synced tables.

        The newest snapshot stays readable, through a second opening meanwhile, unless the database
        holds a batch that was in doubt. Earlier snapshots raise FoldlogError from then on. What the
        database holds decides whether a batch in doubt was committed.
        """
        try:
            self._turns.enter(_getframe())
            return self._heal()
        finally:
            self._turns.leave(_getframe())

    def _heal(self) -> RocksDbFold:
        self.check_file()
        before, fold = self._state, self._newest()
        ended = self._source  # while it lives, `_open_source` waits for those who read from it
        self._stop_writing()
        kept = self._read_beside(fold)  # before the release: reads never stop
        reason = f"{self.path} was opened anew after an error: {self.failure}"
        self._release(FoldlogError(reason), read_beside=True)
        self._open_source()
        del ended
        if self._state == before:
            fold.read_through(self._newest())
            if not kept:
                self._held.add(fold)
        else:
            fold.end()
        self._bridge.close()
        with translated(self._failed):
            self._db.flush()
        self.failure = None
        if self._state.store_id != before.store_id or self._state.seq < before.seq:
            raise LogChangedError(
                self.path, f"holds batch {self._state.seq}, where {before.seq} was published"
            )
        if self._state.seq != before.seq:
            self._past.begin(self._state.seq, self._state.cursor)
        return self._newest()

    def _read_beside(self, fold: RocksDbFold) -> bool:
        """Let `fold` be read through a second, read-only opening of the database.

        So that reads go on while it is reopened, and if that fails. False if that cannot be: a
        batch in doubt is in the database.
        """
        before, bridge = self._bridge, contextlib.ExitStack()
        is_open = fold.reads_from is not self._source  # since a `heal` that failed
        try:
            kept = bridge.enter_context(stored_fold(self.path))
        except (FoldlogError, OSError):
            return is_open
        if (kept.seq, kept.cursor()) != (fold.seq, fold.cursor()):
            bridge.close()
            return is_open
        self._bridge = bridge
        fold.read_through(kept)
        before.close()
        return True

    # Compaction is RocksDB's, in its own threads.

    @property
    def is_compact(self) -> bool:
        """See `Engine`. True if nothing was committed since the last full compaction."""
        return self._compacted_seq == self._state.seq

    def should_compact(self, threshold_bytes: int) -> bool:
        """Returns False: RocksDB decides when to compact."""
        return False

    @property
    def size_bytes(self) -> int:
        """Returns 0: see `limit_bytes`."""
        return 0

    def limit_bytes(self, live_bytes: int, threshold_bytes: int) -> None:
        """See `Engine`. No limit: RocksDB makes writers wait by itself."""

    def has_room(self, size: int) -> bool:
        """See `Engine`. RocksDB looks after its room by itself."""
        return True

    def begin_compaction(self) -> Compaction:
        """See `Engine`. Compacts all tables."""
        self._check_usable()
        return FullCompaction(self._state.seq, self._compact_range)

    def next_pass(self, job: object) -> bool:
        """See `Engine`. One pass is enough."""
        return False

    def allowed_bytes(self, job: object, threshold_bytes: int) -> float:
        """See `Engine`. No bound."""
        return math.inf

    def finish_compaction(self, job: FullCompaction) -> RocksDbFold:
        """See `Engine`."""
        self._compacted_seq = job.seq
        return self._newest()

    def drop_compaction(self, job: FullCompaction) -> None:
        """See `Engine`. RocksDB finishes what it has begun."""
        job.cancelled = True

    def compact(self) -> None:
        """Let RocksDB compact all tables now.

        It compacts by itself, too; this frees at once what was overwritten or removed.
        """
        self._check_usable()
        self._compact_range()
        self._compacted_seq = self._state.seq

    def _compact_range(self) -> None:
        self.check_file()  # it creates tables by name
        with translated(self._failed):
            self._db.compact_range(None, None)

    def batches_since(
        self, snapshot: RocksDbFold, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `Engine`.

        Reaches back to the opening of the store, or over the last 16 MiB of encoded batches.
        """
        return self._past.since(cursor, snapshot.seq)

    def difference(
        self, old: RocksDbFold, new: RocksDbFold, prefix: str = ""
    ) -> Iterator[Put | Delete]:
        """See `Engine`, and `fold.difference` for the cost.

        TypeError for a snapshot of another engine.
        """
        if not (isinstance(old, RocksDbFold) and isinstance(new, RocksDbFold)):
            raise TypeError("the difference of a RocksDB store is between snapshots of RocksDB")
        return difference(old, new, prefix)

    # Export and verify.

    def begin_export(self, format: str | None) -> Export:
        """See `Engine`. Exports the state at the moment of writing.

        ValueError for any format but None.
        """
        if format is not None:
            raise ValueError(
                "a RocksDB store exports RocksDB's files only: `convert_to_log` makes a log of it"
            )

        def export(dest_dir: StrPath, progress: Progress | None = None) -> ExportManifest:
            self._newest()
            return artifact.export(self.path, self._checkpoint, dest_dir, progress)

        return export

    def verify(self, progress: Progress | None = None) -> RocksDbReport:
        """See `Engine`. Cost: about 1 us an entry."""
        return verify_open(self._db, self.path, progress)

    def _checkpoint(self, path: Path) -> None:
        """Copy the newest state to the directory `path`; its tables are hard links."""
        self.check_file()  # a flush creates a table by its name, perhaps in another's directory
        with translated(partial(typed, path=self.path)):
            self._db.flush()  # without the interpreter lock, which the checkpoint holds
            self._rocksdict.Checkpoint(self._db).create_checkpoint(os.fspath(path))

    # Statistics.

    def sizes(self) -> Sizes:
        """See `Engine`.

        The base is RocksDB's tables; what was appended since is in its write-ahead log and
        memtables. 0 bytes in all if the directory is no longer there.
        """
        held_bytes = 0
        with drop_system_errors():  # moved away, or removed: what is read goes on
            held_bytes = directory_bytes(self.path)
        return Sizes(
            held_bytes,
            self._property("live-sst-files-size"),
            self._property("cur-size-all-mem-tables"),
        )

    def _property(self, name: str) -> int:
        """One of RocksDB's counters; 0 while the database is not open, after a `heal` that
        failed."""
        db = self._source.db
        return 0 if db is None else property_of(db, name)

    def held(self) -> Held:
        """See `Engine`. RocksDB keeps what the oldest needs on disk, and the trail in memory."""
        older = [
            fold
            for fold in self._held.all()
            if fold is not self.snapshot and not isinstance(fold, StagedFold)
        ]
        if not older:
            return Held(0, 0.0)
        age_s = time.monotonic() - min(fold.created for fold in older)
        noted_bytes = min(fold.noted_bytes for fold in older)
        return Held(len(older), age_s, self._trail.start_bytes - noted_bytes)

    def cache(self) -> CacheUse:
        """See `Engine`. RocksDB's block cache, indexes and filters included; no memtables."""
        return CacheUse(self._property("block-cache-usage"), self._property("block-cache-capacity"))
