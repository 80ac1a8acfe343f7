"""Reading a store that another process may have open for writing. Changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from foldlog.protocol.store import StrPath
from foldlog.storage.engines.rocksdb.database.opening import binding, reading
from foldlog.storage.engines.rocksdb.database.record import NO_STATE
from foldlog.storage.engines.rocksdb.database.state import state_of
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.engines.rocksdb.fold.source import Source
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.log.files import OS_FILES, Access, resolve


@contextlib.contextmanager
def stored_fold(path: StrPath) -> Iterator[RocksDbFold]:
    """The state of the store at `path` when it is opened; it ends with the block.

    CorruptLogError, InvalidFormatError or OSError. ImportError without the extra. Cost: an open,
    and the replay of what a writer has not flushed yet, up to 64 MiB.
    """
    real = resolve(path)
    with reading(real) as db:
        state = state_of(db, real) or NO_STATE
        source = Source(db, real, binding().ReadOptions)
        fold = RocksDbFold(source, db.snapshot(), Trail(), state.seq, state.cursor, state.origin)
        try:
            yield fold
        finally:
            source.db = None
            fold.end()


def access_of(path: Path) -> Access:
    """Who may use the database in the directory `path`, for files that hold the same."""
    fd = OS_FILES.open_dir(path)
    try:
        access = OS_FILES.access(fd)
    finally:
        OS_FILES.close(fd)
    return access._replace(mode=access.mode & 0o666)
