"""The difference between two folds, at the cost of what was written between them."""

from __future__ import annotations

from collections.abc import Iterator

from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.updates import Delete, Put
from foldlog.storage.engines.rocksdb.database.record import decode_entry
from foldlog.storage.engines.rocksdb.fold.snapshot import RocksDbFold, encoded_bounds
from foldlog.storage.engines.rocksdb.fold.staged import StagedFold
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.fold.diff import merged_diff
from foldlog.storage.fold.reading import range_bounds


def difference(old: RocksDbFold, new: RocksDbFold, prefix: str = "") -> Iterator[Put | Delete]:
    """The changes that lead from `old` to `new`, ascending by key.

    A Put or Delete for each key under `prefix` that differs. Exact, even if `new` is the older one,
    or of another database. A Delete carries no version: the database does not keep it. Cost: two
    reads for each key that was written between the two, if one process published both; otherwise
    it reads both in full, a block at a time.
    """
    low, high = encoded_bounds(*range_bounds(prefix, None, None))
    suspects = _written_between(old, new)
    if suspects is None:
        suspects = _written_between(new, old)
    if suspects is None:
        yield from merged_diff(old, new, prefix)
        return
    for raw_key in sorted(key for key in suspects if low <= key < high):
        before, after = old.lookup(raw_key), new.lookup(raw_key)
        if before == after:
            continue
        key = raw_key.decode()
        if after is None:
            yield Delete(key)
        else:
            value, version = decode_entry(after)
            yield Put(key, value, VersionToken(version))


def _written_between(old: RocksDbFold, new: RocksDbFold) -> set[bytes] | None:
    """The keys of the commits after `old`, up to `new`; None if no trail connects them."""
    if isinstance(old, StagedFold) or isinstance(new, StagedFold):
        return None
    keys: set[bytes] = set()
    node: Trail | None = old._trail
    while node is not None:
        if node is new._trail:
            return keys
        keys.update(node.keys())
        node = node.following
    return None
