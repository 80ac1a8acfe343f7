"""The state of a RocksDB database at one batch, immutable, read through RocksDB's own snapshot.

A key is read through the snapshot. A range is not: the binding's iterators read the newest state,
even those of a snapshot. So a range reads the newest state and corrects it: each commit notes the
keys that it changes in a `Trail` before it writes them, and a fold rereads the keys that were
changed after it through its snapshot. An iterator never outlives the block that it fills: it would
keep the database open after its close, and old files on disk.

    Trail(keys of batch 8)  ->  Trail(keys of batch 9)  ->  Trail()
    ^ fold at batch 7           ^ fold at batch 8           ^ fold at batch 9, the newest

The engine holds the newest trail only, so that trails no fold needs are freed.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NoReturn, TypeVar, overload

from foldlog.protocol.errors import CorruptLogError
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import KvEntry
from foldlog.storage.engines.rocksdb.database.errors import ABSENT, is_rocksdbs, translated, typed
from foldlog.storage.engines.rocksdb.database.record import ENTRIES_END, decode_entry
from foldlog.storage.engines.rocksdb.database.scan import scan
from foldlog.storage.engines.rocksdb.fold.source import Source, View
from foldlog.storage.engines.rocksdb.fold.trail import Trail
from foldlog.storage.fold.reading import SnapshotReads

BLOCK_ENTRIES = 1024
BLOCK_BYTES = 1024 * 1024
"""A block ends with the entry that brings its values to this size."""
_new_entry = tuple.__new__
D = TypeVar("D")


class RocksDbFold(SnapshotReads):
    """An immutable state of a RocksDB store.

    Any thread may read it until the store is closed; then it raises StoreClosed.

    While it is held, RocksDB keeps the data it needs on disk, and the keys that were changed since
    stay in memory.
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_cursor",
        "_entries",
        "_source",
        "_trail",
        "created",
        "origin",
        "seq",
        "view",
    )

    def __init__(
        self,
        source: Source,
        view: View,
        trail: Trail,
        seq: int,
        cursor: WatchCursor,
        origin: bytes = b"",
    ) -> None:
        """Not for callers."""
        self._source, self._trail = source, trail
        self.view = view
        """RocksDB's snapshot, until the store is closed."""
        self._changed: tuple[Trail, list[bytes]] = (trail, [])  # replaced whole: readers race
        self._entries: int | None = None
        self._cursor = cursor
        self.origin = origin
        """The stream that the cursor is a position in; empty if it was never named."""
        self.seq = seq
        """The sequence of its last batch: 0 if empty, +1 for each batch."""
        self.created = time.monotonic()
        """The time of publication, in seconds of the monotonic clock."""

    @overload
    def get(self, key: str) -> KvEntry | None: ...
    @overload
    def get(self, key: str, default: D) -> KvEntry | D: ...
    def get(self, key: str, default: object = None) -> object:
        """The live entry of `key`, or `default` if it is absent or deleted.

        Cost: a few us for a cached entry, a disk read for others.
        """
        try:
            raw_key = key.encode()
            # No call in between: nobody may be interrupted with RocksDB's snapshot in hand.
            raw = self.view[raw_key]
        except Exception as error:
            if self._is_absent(key, error):
                return default
            if not is_rocksdbs(error):
                raise
            raise typed(error, self._source.path) from error
        if raw[:1] == b"\0":
            return _new_entry(KvEntry, (key, raw[1:], b""))
        return self._entry(key, raw)

    def _is_absent(self, key: object, error: Exception) -> bool:
        if error.args == ABSENT or isinstance(error, UnicodeEncodeError):
            return True  # no key has a lone surrogate
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}") from None
        return False

    def _entry(self, key: str, raw: bytes) -> KvEntry:
        try:
            value, version = decode_entry(raw)
        except ValueError as error:
            raise CorruptLogError(self._source.path, 0, f"key {key[:40]!r}: {error}") from None
        return _new_entry(KvEntry, (key, value, version))

    def _entry_blocks(
        self, low: str, high: str | None, reverse: bool = False
    ) -> Iterator[list[KvEntry]]:
        self._source.opened()
        raw_blocks = self._raw_blocks(*encoded_bounds(low, high), reverse)
        return map(partial(self._decoded, reverse=reverse), raw_blocks)

    def _decoded(self, raw_block: list[tuple[bytes, bytes]], reverse: bool) -> list[KvEntry]:
        block = []
        for raw_key, raw in raw_block:
            key = self._key(raw_key)
            if raw[:1] == b"\0":
                block.append(_new_entry(KvEntry, (key, raw[1:], b"")))
            else:
                block.append(self._entry(key, raw))
        if reverse:
            block.reverse()
        return block

    def __len__(self) -> int:
        """The exact number of live entries.

        Cost of the first call: reads them all, about 1 us each; then nothing.
        """
        self._source.opened()
        if self._entries is None:
            self._entries = sum(map(len, self._raw_blocks(b"", ENTRIES_END)))
        return self._entries

    def cursor(self) -> WatchCursor:
        """Every update of the stream up to this position is folded in."""
        return self._cursor

    def __repr__(self) -> str:
        return f"<RocksDbFold at batch {self.seq}, {self._cursor!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a snapshot reads from its database and cannot be pickled; send its entries"
        )

    # For the engine.

    def parts(self) -> list[object]:
        """See `Snapshot`. Returns []: freeing a fold is cheap."""
        return []

    @property
    def reads_from(self) -> Source:
        """The opening of the database that it reads from."""
        return self._source

    def read_through(self, other: RocksDbFold) -> None:
        """Continue to read where `other`, which is the same state, is read from."""
        self._trail, self._changed = other._trail, (other._trail, [])  # first: see `_raw_blocks`
        self._source = other._source
        self.view = other.view

    @property
    def noted_bytes(self) -> int:
        """Bytes of all keys that were noted in trails before it: see `Trail.start_bytes`."""
        return self._trail.start_bytes

    def end(self) -> None:
        """Release RocksDB's snapshot: every read raises the source's error from now on."""
        self.view = self._source

    def changed_since(self) -> list[bytes]:
        """The keys that were changed after this fold, ascending; possibly a few more.

        Cost: nothing if no commit followed.
        """
        node, keys = self._changed
        fresh: set[bytes] = set()
        while True:
            following = node.following  # first: once it is set, the keys of `node` are complete
            fresh.update(node.keys())
            if following is None:
                break
            node = following
        if fresh:
            keys = sorted(fresh.union(keys))
            self._changed = node, keys
        return keys

    def lookup(self, raw_key: bytes) -> bytes | None:
        """The encoded entry of an encoded key; None if it is absent."""
        try:
            return self.view[raw_key]
        except Exception as error:
            if error.args == ABSENT:
                return None
            if not is_rocksdbs(error):
                raise
            raise typed(error, self._source.path) from error

    def _key(self, raw_key: bytes) -> str:
        try:
            return raw_key.decode()
        except UnicodeDecodeError as error:
            raise CorruptLogError(
                self._source.path, 0, f"key {raw_key[:40]!r} is not UTF-8: {error.reason}"
            ) from None

    def _raw_blocks(
        self, low: bytes, high: bytes, reverse: bool = False
    ) -> Iterator[list[tuple[bytes, bytes]]]:
        """The encoded entries with low <= key < high in pieces, none empty, each ascending.

        With `reverse`, the last piece first.
        """
        while low < high:
            block, edge = self._newest_block(low, high, reverse)
            # Read after the iterator was created: this covers all changes that it can have seen.
            keys = self.changed_since()
            if edge is None:
                start, stop, low = low, high, high
            elif reverse:
                start, stop, high = edge, high, edge
            else:
                start, stop, low = low, edge, edge
            if keys:
                part = keys[bisect_left(keys, start) : bisect_left(keys, stop)]
                block = self._mended(block, part)
            if block:
                yield block

    def _newest_block(
        self, low: bytes, high: bytes, reverse: bool
    ) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """The first block of the newest state, or the last; and the bound of the rest.

        The bound is None if nothing remains.
        """
        source = self._source
        block: list[tuple[bytes, bytes]] = []
        room = BLOCK_BYTES
        edge = None
        with translated(partial(typed, path=source.path)):
            for item in scan(source.opened(), low, high, source.read_options, reverse):
                block.append(item)
                room -= len(item[1])
                if room <= 0 or len(block) == BLOCK_ENTRIES:
                    edge = item[0] if reverse else item[0] + b"\0"
                    break
        if reverse:
            block.reverse()
        return block, edge

    def _mended(
        self, block: list[tuple[bytes, bytes]], keys: Iterable[bytes]
    ) -> list[tuple[bytes, bytes]]:
        """`block` with this fold's entries for `keys`."""
        entries = dict(block)
        for key in keys:
            raw = self.lookup(key)
            if raw is None:
                entries.pop(key, None)
            else:
                entries[key] = raw
        return sorted(entries.items())


def encoded_bounds(low: str, high: str | None) -> tuple[bytes, bytes]:
    """The encoded bounds. A bound may hold a surrogate, which no key does.

    Surrogates sort between U+D7FF and U+E000 in the order of bytes, too.
    """
    stop = ENTRIES_END if high is None else high.encode(errors="surrogatepass")
    return low.encode(errors="surrogatepass"), stop
