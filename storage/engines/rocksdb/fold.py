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

import copy
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, overload

from foldlog.protocol.errors import CorruptLogError, FoldlogError, StoreClosed
from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, KvEntry, Put
from foldlog.storage.engines.rocksdb.errors import ABSENT, typed
from foldlog.storage.engines.rocksdb.record import ENTRIES_END, decode_entry
from foldlog.storage.engines.rocksdb.scan import scan
from foldlog.storage.fold.snapshot import check_limit, range_bounds

if TYPE_CHECKING:
    from rocksdict import Rdict, ReadOptions

BLOCK_ENTRIES = 1024
BLOCK_BYTES = 1024 * 1024
"""A block ends with the entry that brings its values to this size."""
_new_entry = tuple.__new__
D = TypeVar("D")


class Trail:
    """The keys that one commit changed, and the trail of the next commit.

    The newest trail is empty, except during a commit.
    """

    __slots__ = ("__weakref__", "following", "parts")

    def __init__(self) -> None:
        # Written by the engine only. Invariant: names a key before the database holds its change.
        self.parts: tuple[Sequence[bytes], ...] = ()
        """The changed keys, encoded, in one or more sequences."""
        self.following: Trail | None = None

    def keys(self) -> Iterator[bytes]:
        """The changed keys, encoded."""
        return chain.from_iterable(self.parts)


class View(Protocol):
    """Encoded entries by encoded key: RocksDB's snapshot, or a substitute."""

    def __getitem__(self, raw_key: bytes, /) -> bytes:
        """Raises what the binding raises: for an absent key, an error with the args `ABSENT`."""


class Source:
    """The open database that folds read from.

    Once it has ended, it becomes the view of all of them, and every read raises.
    """

    __slots__ = ("db", "ended", "path", "read_options")

    def __init__(self, db: Rdict, path: Path, read_options: Callable[[], ReadOptions]) -> None:
        self.db: Rdict | None = db
        self.path = path
        self.read_options = read_options
        self.ended: FoldlogError = StoreClosed(f"{path} is closed")
        """What a read raises once `db` is None."""

    def refuse(self) -> NoReturn:
        """Raise the error of a source that has ended."""
        raise copy.copy(self.ended)  # a copy for each: threads would mix their tracebacks

    def __getitem__(self, raw_key: bytes, /) -> NoReturn:
        self.refuse()


class RocksDbFold:
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
            raw = self.view[key.encode()]
        except Exception as error:
            self._raise_unless_absent(key, error)
            return default
        if raw[:1] == b"\0":
            return _new_entry(KvEntry, (key, raw[1:], b""))
        return self._entry(key, raw)

    def get_many(self, keys: Iterable[str]) -> dict[str, KvEntry]:
        """The live entries among `keys`, by key, in the order of `keys`."""
        if isinstance(keys, str):
            raise TypeError("keys is an iterable of str, not a str")
        get = self.get
        return {key: entry for key in keys if (entry := get(key)) is not None}

    def _raise_unless_absent(self, key: object, error: Exception) -> None:
        if error.args == ABSENT or isinstance(error, UnicodeEncodeError):
            return  # no key has a lone surrogate
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}") from None
        if isinstance(error, FoldlogError):
            raise error
        raise typed(error, self._source.path) from error

    def _entry(self, key: str, raw: bytes) -> KvEntry:
        try:
            value, version = decode_entry(raw)
        except ValueError as error:
            raise CorruptLogError(self._source.path, 0, f"key {key[:40]!r}: {error}") from None
        return _new_entry(KvEntry, (key, value, version))

    def range(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        stop: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> list[KvEntry]:
        """The live entries under `prefix`, ascending by key (by code point).

        Only keys with `start` <= key < `stop` are returned, and at most the first `limit`. With
        `reverse`, descending by key: the bounds stay the same, and `limit` counts from the last
        key.
        """
        return list(self.iter_range(prefix, start=start, stop=stop, limit=limit, reverse=reverse))

    def iter_range(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        stop: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> Iterator[KvEntry]:
        """`range`, entry by entry: reads and holds one block at a time."""
        low, high = _encoded_bounds(*range_bounds(prefix, start, stop))
        check_limit(limit)
        if self._source.db is None:
            self._source.refuse()  # at the call, not at the first entry
        entries = chain.from_iterable(self._entry_blocks(low, high, reverse))
        return entries if limit is None else islice(entries, limit)

    def for_each_in_range(self, prefix: str, f: Callable[[KvEntry], Any]) -> None:
        """Call `f` with each live entry under `prefix`, ascending. Memory: one block.

        An exception from `f` stops the scan and propagates.
        """
        for block in self.blocks(prefix):
            for entry in block:
                f(entry)

    def blocks(self, prefix: str = "", after: str | None = None) -> Iterator[list[KvEntry]]:
        """`range` in pieces of 1 to 1024 entries; only keys after `after`, if given."""
        low, high = range_bounds(prefix, None if after is None else after + "\0", None)
        yield from self._entry_blocks(*_encoded_bounds(low, high))

    def _entry_blocks(
        self, low: bytes, high: bytes, reverse: bool = False
    ) -> Iterator[list[KvEntry]]:
        for raw_block in self._raw_blocks(low, high, reverse):
            block = []
            for raw_key, raw in raw_block:
                key = self._key(raw_key)
                if raw[:1] == b"\0":
                    block.append(_new_entry(KvEntry, (key, raw[1:], b"")))
                else:
                    block.append(self._entry(key, raw))
            if reverse:
                block.reverse()
            yield block

    def entries_after(self, prefix: str, after: str | None) -> Iterator[KvEntry]:
        """The live entries under `prefix` after the key `after`, one by one."""
        for block in self.blocks(prefix, after):
            yield from block

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The live keys under `prefix`, ascending."""
        return (entry.key for entry in self.iter_range(prefix))

    __iter__ = keys

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """(key, value) of the live entries under `prefix`, ascending."""
        return ((entry.key, entry.value) for entry in self.iter_range(prefix))

    def __contains__(self, key: object) -> bool:
        """True if `key` is live."""
        return isinstance(key, str) and self.get(key) is not None

    def __len__(self) -> int:
        """The exact number of live entries.

        Cost of the first call: reads them all, about 1 us each; then nothing.
        """
        if self._source.db is None:
            self._source.refuse()
        if self._entries is None:
            self._entries = sum(map(len, self._raw_blocks(b"", ENTRIES_END)))
        return self._entries

    def __bool__(self) -> bool:
        return True  # a snapshot of an empty store is still a snapshot

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
            fresh.update(node.keys())
            if node.following is None:
                break
            node = node.following
        if fresh:
            keys = sorted(fresh.union(keys))
            self._changed = node, keys
        return keys

    def lookup(self, raw_key: bytes) -> bytes | None:
        """The encoded entry of an encoded key; None if it is absent."""
        try:
            return self.view[raw_key]
        except Exception as error:
            self._raise_unless_absent("", error)
            return None

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
        db = source.db
        if db is None:
            source.refuse()
        block: list[tuple[bytes, bytes]] = []
        room = BLOCK_BYTES
        edge = None
        try:
            for item in scan(db, low, high, source.read_options, reverse):
                block.append(item)
                room -= len(item[1])
                if room <= 0 or len(block) == BLOCK_ENTRIES:
                    edge = item[0] if reverse else item[0] + b"\0"
                    break
        except Exception as error:
            raise typed(error, source.path) from error
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


class _StagedView:
    def __init__(self, below: View, staged: Mapping[bytes, bytes | None]) -> None:
        self.below, self.staged = below, staged

    def __getitem__(self, raw_key: bytes, /) -> bytes:
        if raw_key not in self.staged:
            return self.below[raw_key]
        raw = self.staged[raw_key]
        if raw is None:
            raise LookupError(*ABSENT)
        return raw


class StagedFold(RocksDbFold):
    """A fold plus batches that are not yet written, for writes that depend on the state."""

    __slots__ = ("staged",)

    def __init__(
        self,
        base: RocksDbFold,
        staged: Mapping[bytes, bytes | None],
        seq: int,
        cursor: WatchCursor,
        origin: bytes = b"",
    ) -> None:
        view = _StagedView(base.view, staged)
        super().__init__(base._source, view, base._trail, seq, cursor, origin)
        self.staged = staged
        """Encoded entries by encoded key; None for a removed one."""

    def changed_since(self) -> list[bytes]:
        return sorted({*super().changed_since(), *self.staged})


def difference(old: RocksDbFold, new: RocksDbFold, prefix: str = "") -> Iterator[Put | Delete]:
    """The changes that lead from `old` to `new`, ascending by key.

    A Put or Delete for each key under `prefix` that differs. Exact, even if `new` is the older one,
    or of another database. A Delete carries no version: the database does not keep it. Cost: two
    reads for each key that was written between the two, if one process published both; otherwise
    it reads both in full, a block at a time.
    """
    low, high = _encoded_bounds(*range_bounds(prefix, None, None))
    suspects = _written_between(old, new)
    if suspects is None:
        suspects = _written_between(new, old)
    if suspects is None:
        yield from _merged_difference(old, new, prefix)
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


def _merged_difference(old: RocksDbFold, new: RocksDbFold, prefix: str) -> Iterator[Put | Delete]:
    before, after = old.entries_after(prefix, None), new.entries_after(prefix, None)
    mine, theirs = next(before, None), next(after, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine.key < theirs.key):
            assert mine is not None
            yield Delete(mine.key)
            mine = next(before, None)
        elif mine is None or theirs.key < mine.key:
            yield Put(*theirs)
            theirs = next(after, None)
        else:
            if mine != theirs:
                yield Put(*theirs)
            mine, theirs = next(before, None), next(after, None)


def _encoded_bounds(low: str, high: str | None) -> tuple[bytes, bytes]:
    """The encoded bounds. A bound may hold a surrogate, which no key does.

    Surrogates sort between U+D7FF and U+E000 in the order of bytes, too.
    """
    stop = ENTRIES_END if high is None else high.encode(errors="surrogatepass")
    return low.encode(errors="surrogatepass"), stop
