"""The RocksDB engine: a fold that need not fit in memory. It needs the extra `rocksdb`.

store.py       RocksDbSnapshot: the engine as a `SnapshotStore`, for one thread
engine.py      RocksDbEngine: the database and its fold, as an `Engine` (`protocol/engine.py`)
commits.py     what it builds on: opening, committing, closing
seat.py        opening a store for a writer, and resuming it after a crash
writes.py      writing batches
past.py        the last batches, for subscribers
compaction.py  a compaction, as the writer drives it
database/      opening a database; what is in it; RocksDB's errors
fold/          one immutable state, read through RocksDB's snapshot
exchange/      verify, export, import, convert
"""

from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.engines.rocksdb.store import RocksDbSnapshot

__all__ = ["RocksDbEngine", "RocksDbFold", "RocksDbSnapshot"]
