"""An append-only log and its fold: the engine of most stores.

engine.py  LogEngine: the log and its fold, kept in step, as the engine that a writer drives
store.py   AppendLogSnapshot: the engine as a `SnapshotStore`, for one thread
past.py    what led from one fold to another
seat.py    opening a log, and reopening it after a crash
"""

from foldlog.storage.engines.append_log.store import AppendLogSnapshot as AppendLogSnapshot
