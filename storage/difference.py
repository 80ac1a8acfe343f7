"""The difference between two snapshots, of whatever engines."""

from __future__ import annotations

from collections.abc import Iterator

from foldlog.protocol.updates import Delete, Put
from foldlog.storage.engines.rocksdb.fold.difference import difference
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold
from foldlog.storage.fold.diff import diff as fold_diff
from foldlog.storage.fold.diff import merged_diff
from foldlog.storage.fold.reading import SnapshotReads
from foldlog.storage.fold.snapshot import FoldSnapshot


def diff(old: SnapshotReads, new: SnapshotReads, prefix: str = "") -> Iterator[Put | Delete]:
    """The changes that lead from `old` to `new`, ascending by key.

    A Put or Delete for each key under `prefix` that differs. Exact, even if `new` is the older one,
    or of another store. A Delete carries the version of the removal if it is still known; RocksDB
    does not keep it.

    Cost: for two snapshots of logs, 0.1-0.3 us for each key in a run, piece or leaf that the two do
    not share (up to 32,768 unsettled changes, and a leaf of 256 for each compacted one), and 3 us
    for each key that may differ. For two of one open RocksDB store, two reads for each key written
    between them. For any other two, a read of both. Memory: a leaf or two, and the keys that
    changed since the older base.

    CorruptLogError if a leaf that is needed does not verify: its log was cut or overwritten.
    StoreClosed for a snapshot of a RocksDB store that was closed.

    >>> with foldlog.open("routes.log") as routes:
    ...     before = routes.snapshot()
    ...     routes.apply([Put("a", b"10.0.0.1")], WatchCursor.from_u64(1))
    ...     list(foldlog.diff(before, routes.snapshot()))
    1
    [Put(key='a', value=b'10.0.0.1', version=VersionToken(''))]
    """
    for snapshot in (old, new):
        if not isinstance(snapshot, SnapshotReads):
            raise TypeError(f"a difference is of two snapshots, not {type(snapshot).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
    if isinstance(old, FoldSnapshot) and isinstance(new, FoldSnapshot):
        return fold_diff(old, new, prefix)
    if isinstance(old, RocksDbFold) and isinstance(new, RocksDbFold):
        return difference(old, new, prefix)
    return merged_diff(old, new, prefix)
