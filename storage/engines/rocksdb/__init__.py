"""The RocksDB engine: a fold that need not fit in memory. It needs the extra `rocksdb`.

store.py      RocksDbSnapshot: the engine as a `SnapshotStore`, for one thread
engine.py     RocksDbEngine: the database and its fold, as an `Engine` (`protocol/engine.py`)
seat.py       opening a store for a writer, and resuming it after a crash
fold.py       one immutable state, read through RocksDB's snapshot
scan.py       keys in order
database.py   opening a database with the options that the promises need
record.py     the bytes of an entry and of the state record
artifact.py   export by checkpoint, and import
verify.py     every invariant, in code
convert.py    from the append log, and to it
state.py      reading the state record
errors.py     RocksDB's messages as typed errors
holder.py     which process holds RocksDB's lock
"""

from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.fold import RocksDbFold
from foldlog.storage.engines.rocksdb.store import RocksDbSnapshot

__all__ = ["RocksDbEngine", "RocksDbFold", "RocksDbSnapshot"]
