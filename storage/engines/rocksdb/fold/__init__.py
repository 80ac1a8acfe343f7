"""The state of a RocksDB database at one batch.

snapshot.py    one immutable state, read through RocksDB's snapshot
source.py      the open database, as folds read it
trail.py       the keys that each commit changed
staged.py      a state plus batches that are not yet written
held.py        the states that somebody holds
difference.py  the difference between two states
"""
