"""The engine on RocksDB: a fold that need not fit into memory. It needs the extra `rocksdb`.

store.py      RocksDbSnapshot: all of it behind the contract, for one thread
engine.py     the database and its fold, on the seam of `protocol/engine.py`
fold.py       one immutable state, read through RocksDB's snapshot
scan.py       keys in order
database.py   opening a database with the options that the promises need
record.py     the bytes of an entry and of the state record
artifact.py   export by checkpoint, and import
verify.py     every invariant, in code
convert.py    from the append log, and to it
state.py     the record of the state, read
errors.py, holder.py    RocksDB's words as typed errors; who holds its lock
"""

from foldlog.storage.engines.rocksdb.engine import RocksDbEngine
from foldlog.storage.engines.rocksdb.fold import RocksDbFold
from foldlog.storage.engines.rocksdb.store import RocksDbSnapshot

__all__ = ["RocksDbEngine", "RocksDbFold", "RocksDbSnapshot"]
