"""From a log to a RocksDB store, and back: the state, the versions, the cursor and the sequence.

Nothing else is carried over: not the history, and not the origin, which a log keeps elsewhere. The
source is only read, and may be open for writing elsewhere. The destination appears complete or not
at all.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.store import FormatName, StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Change
from foldlog.storage.engines.rocksdb.database.opening import binding, reading
from foldlog.storage.engines.rocksdb.database.record import State
from foldlog.storage.engines.rocksdb.database.state import state_of
from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.engines.rocksdb.fold.source import Source
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.delta import EMPTY_DELTA
from foldlog.storage.fold.snapshot import FoldSnapshot, Span
from foldlog.storage.formats.format import Progress
from foldlog.storage.formats.registry import FORMATS, load_intact
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve
from foldlog.storage.log.lock import WriterLock

_LOAD_CACHE_BYTES = 32 * CACHE_BYTES.least


def rocksdb_from_log(log: StrPath, dest: StrPath, progress: Progress | None = None) -> int:
    """Write the state of a log of either format as a RocksDB store at `dest`.

    `dest` must not exist. Returns the number of entries. Raises what opening the log raises, and
    FileExistsError. Cost: 3 us an entry.
    """
    target = _free(dest)
    fold = load_intact(ReadHandle(OS_FILES, resolve(log))).fold
    staged = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        engine = RocksDbEngine(staged, cache_bytes=_LOAD_CACHE_BYTES)
        try:
            engine.load(fold.blocks(), fold.seq, fold.cursor(), progress)
        finally:
            engine.close()
        OS_FILES.rename_new(staged, target)
        OS_FILES.sync_dir(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return len(fold)


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
    target = _free(dest)
    path = resolve(database)
    with reading(path) as db:
        state = state_of(db, path) or State(b"", 0, WatchCursor.none())
        source = Source(db, path, binding().ReadOptions)
        fold = _Streamed(RocksDbFold(source, db.snapshot(), Trail(), state.seq, state.cursor))
        lock = WriterLock(OS_FILES, target)
        try:
            lock.write(None)  # the watermark of an earlier log here does not apply to this one
            write_new(OS_FILES, target, fold, FORMATS[format], progress)
        finally:
            lock.release()
            source.db = None
    return fold.entries


def _free(dest: StrPath) -> Path:
    given = Path(os.path.abspath(dest))
    if OS_FILES.exists(given):
        raise FileExistsError(errno.EEXIST, "a conversion never overwrites", str(given))
    return resolve(given)


class _Streamed(FoldSnapshot):
    """A RocksDB fold in the form that log writers take: spans without a leaf, a block each."""

    __slots__ = ("_source", "entries")

    def __init__(self, source: RocksDbFold) -> None:
        super().__init__(Base(None), EMPTY_DELTA, (), source.seq, source.cursor())
        self._source = source
        self.entries = 0

    def spans(self, low: str, high: str | None, *, reverse: bool = False) -> Iterator[Span]:
        assert (low, high, reverse) == ("", None, False), "it is written whole"
        for block in self._source.blocks():
            self.entries += len(block)
            changes: dict[str, Change] = {
                key: (key, value, bytes(version)) for key, value, version in block
            }
            yield Span(-1, False, block[0].key, None, changes)
