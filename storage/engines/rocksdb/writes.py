"""Writing to the open database: whole write batches, and the write-ahead log to disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import add
from typing import TYPE_CHECKING

from foldlog.protocol.updates import KvEntry, RawUpdates
from foldlog.storage.engines.rocksdb.database.errors import is_stall
from foldlog.storage.engines.rocksdb.database.opening import binding
from foldlog.storage.engines.rocksdb.database.record import (
    STATE_KEY,
    VERSION_PREFIXES,
    State,
    encode_entry,
)
from foldlog.storage.engines.rocksdb.fold.source import Source

if TYPE_CHECKING:
    from rocksdict import WriteBatch

STALL_LIMIT_S = 60.0
"""Seconds that a write waits for RocksDB before it fails."""
_STALL_PAUSE_S = 0.001
_exhaust = deque[object](maxlen=0).extend
_NO_VERSION = VERSION_PREFIXES[0]


class Writes:
    """The way into a database. Every method raises what the binding raises."""

    def __init__(self, source: Source) -> None:
        self._source = source
        rocksdict = binding()
        self._new_batch = rocksdict.WriteBatch
        self._options = rocksdict.WriteOptions()
        self._options.no_slowdown = True  # a stall would hold the interpreter lock, see `_write`

    def commit(self, groups: Sequence[RawUpdates], state: State) -> None:
        """Write the updates and the state record, all or nothing."""
        self._write(lambda: self._batch_of(groups, state))

    def load(self, entries: Iterable[KvEntry]) -> None:
        """Write entries, without the state record."""
        self._write(lambda: self._batch_of_entries(entries))

    def sync(self) -> None:
        """Make what was written survive a power loss.

        Not by a synced write: it would hold the interpreter lock until the disk has answered.
        """
        self._source.opened().flush_wal(True)

    def _batch_of(self, groups: Sequence[RawUpdates], state: State) -> WriteBatch:
        write: WriteBatch = self._new_batch(raw_mode=True)
        put, delete = write.put, write.delete
        for keys, values, versions in groups:
            if all(values) and not any(versions):  # no removal, no empty value
                # Without a step of Python for each: a third of the time.
                _exhaust(map(put, keys, map(add, repeat(_NO_VERSION), values)))
                continue
            for key, value, version in zip(keys, values, versions, strict=True):
                if value is None or value is False:
                    delete(key)
                else:
                    put(key, VERSION_PREFIXES[len(version)] + version + value)  # type: ignore[operator]
        put(STATE_KEY, state.pack())
        return write

    def _batch_of_entries(self, entries: Iterable[KvEntry]) -> WriteBatch:
        write: WriteBatch = self._new_batch(raw_mode=True)
        for key, value, version in entries:
            write.put(key.encode(), encode_entry(value, version))
        return write

    def _write(self, make: Callable[[], WriteBatch]) -> None:
        """Hand a write batch to RocksDB.

        If RocksDB wants writers to wait, wait here, without the interpreter lock. `make` makes the
        batch again for each attempt: the binding consumes it even if the write fails.
        """
        stop_s = 0.0
        while True:
            try:
                self._source.opened().write(make(), self._options)
                return
            except Exception as error:
                if not is_stall(error):
                    raise
                now = time.monotonic()
                stop_s = stop_s or now + STALL_LIMIT_S
                if now > stop_s:
                    raise
                time.sleep(_STALL_PAUSE_S)
