"""What a base keeps in memory of what was read from its file: entries and leaf indexes, bounded.

    recent    entries by hash, in shards     probed by every `get`; nothing is noted there
    older     the same shards                entries that move back to `recent` when they are used
    indexes   one for each leaf, or None     the least used go first: the clock algorithm

Both share one limit. Indexes take up to three quarters of it, since reading an entry without the
index of its leaf costs five times as much; entries get the rest. Room is made in one shard after
the other, in turn: the least used quarter of its entries goes, and of the others the first half
becomes `older`. So this touches a 256th of the cache, and frees a quarter of that. From half of the
limit on, one shard after the other is split without dropping anything: what is in use has moved
back before the first entry goes.

There is no lock, since an exception could leave it held. A lost race between two threads, or an
exception at any point, loses a cached entry, or counts one wrongly until its shard is trimmed; an
index, until as many are dropped as there are leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain, compress, repeat
from operator import add, and_, is_not, itemgetter

from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.updates import Change
from foldlog.storage.fold.leaf import KEY_OVERHEAD, Columns, Index, text_bytes

SHARDS = 256
"""The cache is split by hash, so that making room frees only a part at a time."""
ENTRY_OVERHEAD = 210 + KEY_OVERHEAD
"""Bytes of the objects of a cached entry: a tuple, a key, two `bytes`, and a slot in a dict."""
_TRIMMED_PART = 4
_LARGEST_PART = 64  # a single entry takes no more than this part of the limit
_key_of, _value_of = itemgetter(0), itemgetter(1)


class Cache:
    """Entries and indexes that were read from one base. Any thread may use it."""

    __slots__ = (
        "_bytes",
        "_drops_to_count",
        "_entry_bytes",
        "_hand",
        "_index_bytes",
        "_kept",
        "_quiet_bytes",
        "has_older",
        "indexes",
        "limit_bytes",
        "older",
        "recent",
        "used",
    )

    def __init__(self, limit_bytes: int = CACHE_BYTES.default) -> None:
        self.set_limit(limit_bytes)
        self.recent: list[dict[str, Change]] = [{} for _ in range(SHARDS)]
        """By hash of the key. The list stays the same object."""
        self.older: list[dict[str, Change]] = [{} for _ in range(SHARDS)]
        self.has_older = False
        """False while `older` is empty, so that nobody needs to look there."""
        self._bytes = [0] * SHARDS  # of `recent` and `older` together
        self._entry_bytes = 0  # their sum
        self._hand = 0  # the shard to be trimmed next
        self.indexes: list[Index | None] = []
        """By number of the leaf."""
        self.used = bytearray()
        """By number of the leaf; 1 for an index that was used since the hand passed it."""
        self._kept: deque[tuple[int, Index]] = deque()  # what `indexes` holds, hand first
        self._index_bytes = 0
        self._drops_to_count = 0

    def set_limit(self, limit_bytes: int) -> None:
        """Bound `held_bytes` from now on. 0: keep nothing more."""
        self.limit_bytes = limit_bytes
        self._quiet_bytes = limit_bytes // 2  # up to here there is nothing to do

    @property
    def held_bytes(self) -> int:
        """An estimate of the memory that the entries and indexes take."""
        return self._entry_bytes + self._index_bytes

    def add_leaf(self) -> None:
        """Make place for the index of one more leaf."""
        self.indexes.append(None)
        self.used.append(0)

    # Entries.

    def take_older(self, key: str) -> Change | None:
        """The entry of `key`, if it is among the older ones; it becomes a recent one."""
        shard = hash(key) & SHARDS - 1
        change = self.older[shard].pop(key, None)
        if change is not None and self.recent[shard].setdefault(key, change) is not change:
            self._uncount(shard, change)  # it was in both
        return change

    def add(self, change: Change) -> None:
        """Keep an entry that was read, unless its value is too large."""
        key, value, _ = change
        # `cached_size`, whose calls take as long as the rest
        size = len(value or b"") + ENTRY_OVERHEAD
        size += len(key) if key.isascii() else text_bytes(key)
        if size * _LARGEST_PART > self.limit_bytes:
            return
        shard = hash(key) & SHARDS - 1
        if self.recent[shard].setdefault(key, change) is change:
            self._bytes[shard] += size
            self._entry_bytes += size
            if self._entry_bytes + self._index_bytes > self._quiet_bytes:
                self._make_room()

    def add_leaf_entries(self, columns: Columns) -> None:
        """`add` for each entry of one leaf, without the check for size. Cost: 0.3 us each, and the
        memory that they are kept in.

        One that is among the older ones, too, is counted twice until its shard is trimmed.
        """
        keys, values, _ = columns
        rows: list[Change] = [*zip(*columns)]
        numbers = [*map(and_, map(hash, keys), repeat(SHARDS - 1))]
        texts = map(len, keys) if "".join(keys).isascii() else map(text_bytes, keys)
        sizes, added = self._bytes, 0
        # Counted before they are kept: what interrupts this leaves them counted too high.
        for number, size in zip(numbers, map(add, map(len, values), texts)):
            size += ENTRY_OVERHEAD
            sizes[number] += size
            added += size
        self._entry_bytes += added
        shards = map(self.recent.__getitem__, numbers)
        kept = [*map(dict.setdefault, shards, keys, rows)]  # one probe for each: it costs the most
        for number, row in compress(zip(numbers, kept), map(is_not, kept, rows)):
            self._uncount(number, row)
        self._make_room()

    def _uncount(self, shard: int, change: Change) -> None:
        size = cached_size(change)
        self._bytes[shard] -= size
        self._entry_bytes -= size

    def _make_room(self) -> None:
        """Split shards ahead of the limit, and drop the least used entries beyond it."""
        while self._entry_bytes + self._index_bytes > self._quiet_bytes and any(self._bytes):
            shard, self._hand = self._hand, (self._hand + 1) % SHARDS
            order = [*(self.older[shard] | self.recent[shard]).values()]
            first = 0
            if self._quiet_bytes < self.limit_bytes:
                step = self.limit_bytes // (2 * SHARDS) + 1
                self._quiet_bytes = min(self._quiet_bytes + step, self.limit_bytes)
            else:
                first = -(-len(order) // _TRIMMED_PART)
            middle = (first + len(order)) // 2
            self.has_older = True
            self.older[shard] = {change[0]: change for change in order[first:middle]}
            self.recent[shard] = {change[0]: change for change in order[middle:]}
            self._bytes[shard] = _size_of(order[first:])
            self._entry_bytes = sum(self._bytes)

    # Indexes.

    def use_index(self, number: int) -> Index | None:
        """The index of a leaf, if it is kept."""
        self.used[number] = 1
        return self.indexes[number]

    def keep_index(self, number: int, index: Index) -> None:
        """Keep the index of a leaf, and drop those that were not used for longest."""
        most = self.limit_bytes // 4 * 3
        if index.kept_bytes > most:
            return
        self.indexes[number] = index
        self.used[number] = 0  # used once: the next use counts
        self._kept.append((number, index))
        self._index_bytes += index.kept_bytes
        while self._index_bytes > most and self._kept:
            self._drop_index()
        self._make_room()

    def number_keys(self, index: Index) -> None:
        """`Index.number_keys`, for an index that is kept."""
        if index.numbers is None:
            self._index_bytes += index.number_keys()
            self._make_room()

    def _drop_index(self) -> None:
        self._drops_to_count -= 1
        if self._drops_to_count < 0:
            self._count_indexes()
        with suppress(IndexError):  # another thread took the last one
            number, index = self._kept.popleft()
            while self.used[number] and self._kept:
                self.used[number] = 0
                self._kept.append((number, index))
                number, index = self._kept.popleft()
            if self.indexes[number] is index:
                self.indexes[number] = None
            self._index_bytes -= index.kept_bytes

    def _count_indexes(self) -> None:
        """Count anew, and queue what is not queued: an exception may have come between the steps
        of keeping an index, or of dropping one. Once for as many drops as there are leaves."""
        self._drops_to_count = len(self.indexes)
        queued = {number for number, _ in self._kept.copy()}
        held = [(number, index) for number, index in enumerate(self.indexes) if index is not None]
        self._kept.extend([pair for pair in held if pair[0] not in queued])
        self._index_bytes = sum(index.kept_bytes for _, index in held)

    # From one base to the next.

    def inherit(
        self, old: Cache, copies: Mapping[int, int], changes: Iterable[Mapping[str, Change]]
    ) -> None:
        """See `Base.inherit`."""
        self.limit_bytes, self._quiet_bytes = old.limit_bytes, old._quiet_bytes
        if not any(old._bytes) and not old._kept:
            return
        self.recent[:] = [shard.copy() for shard in old.recent]
        self.older[:] = [shard.copy() for shard in old.older]
        self.has_older = old.has_older
        # Copied last: an entry read meanwhile is then counted too high, never too low.
        self._bytes = old._bytes.copy()
        self._entry_bytes = sum(self._bytes)
        for key, change in chain.from_iterable(piece.items() for piece in changes):
            shard = hash(key) & SHARDS - 1
            # From both: an entry that moved while it was read or copied is in both.
            recent, older = self.recent[shard].pop(key, None), self.older[shard].pop(key, None)
            read = recent or older
            if read is not None:
                self._uncount(shard, read)
                if change[1] is not None:
                    self.add(change)
        for number, origin in copies.items():
            index = old.indexes[origin]
            if index is not None:
                self.keep_index(number, index)

    def parts(self) -> list[object]:
        """What it holds, in pieces of a leaf or a shard. With a limit of 0, it gives them away."""
        parts: list[object] = [*filter(None, (*self.recent, *self.older, *self.indexes))]
        if not self.limit_bytes:
            self.recent[:] = [{} for _ in range(SHARDS)]
            self.older[:] = [{} for _ in range(SHARDS)]
            self._bytes = [0] * SHARDS
            self._entry_bytes = self._index_bytes = 0
            self._kept.clear()
            self.indexes[:] = [None] * len(self.indexes)
        return parts


def cached_size(change: Change) -> int:
    """Bytes that a cached entry takes: an estimate that is rather too high."""
    return len(change[1] or b"") + text_bytes(change[0]) + ENTRY_OVERHEAD


def _size_of(changes: list[Change]) -> int:
    """The sum of `cached_size`, in half the time for keys in ASCII."""
    keys = "".join(map(_key_of, changes))
    if not keys.isascii():
        return sum(map(cached_size, changes))
    values: Iterable[bytes] = map(_value_of, changes)
    return sum(map(len, values)) + len(keys) + ENTRY_OVERHEAD * len(changes)
