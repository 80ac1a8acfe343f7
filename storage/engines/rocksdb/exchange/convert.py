"""From a log to a RocksDB store, and back: the state, the versions, the cursor and the sequence.

Nothing else is carried over: not the history, and not the origin, which a log keeps elsewhere. The
source is only read, and may be open for writing elsewhere. The destination appears complete or not
at all, and admits nobody whom the source does not.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator

from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import KvEntry
from foldlog.storage.artifacts.staging import narrow_dir
from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.exchange.reading import access_of, stored_fold
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.fold.leaf import Columns
from foldlog.storage.fold.reading import Segment
from foldlog.storage.formats.format import Loaded, Progress
from foldlog.storage.formats.registry import FORMATS, load_intact
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve, unused_path
from foldlog.storage.log.sidecars.lock import WriterLock

_LOAD_CACHE_BYTES = 32 * CACHE_BYTES.least


def rocksdb_from_log(
    log: StrPath, dest: StrPath, progress: Progress | None = None
) -> tuple[int, Loaded]:
    """Write the state of a log of either format as a RocksDB store at `dest`.

    `dest` must not exist. Returns the number of entries, and what was read of the log, which is
    closed. Raises what opening the log raises, and FileExistsError. Cost: 3 us an entry.
    """
    target = resolve(unused_path(OS_FILES, dest, "a conversion"))
    with ReadHandle(OS_FILES, resolve(log)) as source:
        loaded = load_intact(source)
        fold, entries = loaded.fold, len(loaded.fold)
        staged = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        try:
            OS_FILES.make_dir(staged, 0o700)
            engine = RocksDbEngine(staged, cache_bytes=_LOAD_CACHE_BYTES)
            try:
                engine.load(fold.blocks(), fold.seq, fold.cursor(), progress)
            finally:
                engine.close()
            narrow_dir(OS_FILES, staged, OS_FILES.access(source.fd))
            OS_FILES.rename_new(staged, target)
            OS_FILES.sync_dir(target.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return entries, loaded


def log_from_rocksdb(
    database: StrPath,
    dest: StrPath,
    format: FormatName = "foldlog",
    progress: Progress | None = None,
) -> int:
    """Write the state of a RocksDB store as a log at `dest`, which must not exist.

    Returns the number of entries. Raises what opening the store raises, and FileExistsError. Cost:
    3 us an entry.
    """
    target = resolve(unused_path(OS_FILES, dest, "a conversion"))
    with stored_fold(database) as stored:
        fold = Streamed(stored)
        lock = WriterLock(OS_FILES, target)
        try:
            lock.write(None)  # the watermark of an earlier log here does not apply to this one
            write_new(
                OS_FILES,
                target,
                fold,
                FORMATS[format],
                progress,
                source=access_of(resolve(database)),
            )
        finally:
            lock.release()
        return fold.entries


class Streamed:
    """A RocksDB fold in the form that log writers take, a `Writable`: a segment for each block."""

    base_entries, is_in_memory = 0, False

    def __init__(self, source: RocksDbFold) -> None:
        self._source = source
        self.seq, self.origin = source.seq, b""
        self.entries = 0
        """The entries that were written."""

    def cursor(self) -> WatchCursor:
        return self._source.cursor()

    def segments(self) -> Iterator[Segment]:
        for block in self._source.blocks():
            self.entries += len(block)
            yield _Block(block)


class _Block:
    is_leaf, unchanged_leaf = False, None

    def __init__(self, entries: list[KvEntry]) -> None:
        self._entries = entries

    def carried(self) -> None:
        return None

    def columns(self) -> Columns:
        keys, values, versions = zip(*self._entries, strict=True)
        return Columns(list(keys), list(values), list(map(bytes, versions)))

    def live_changes(self) -> None:
        return None
