"""A log and the fold of it: the engine of most stores.

engine.py  the log and its fold, in step: on the seam that a writer drives
store.py   AppendLogSnapshot: the engine behind the contract of `SnapshotStore`, for one thread
seat.py    opening a log, and opening it again after a crash
"""

from foldlog.storage.engines.append_log.store import AppendLogSnapshot as AppendLogSnapshot
