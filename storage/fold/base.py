"""The base: the leaves of a log's last compaction, on disk, read on demand.

Opening notes the offset and first key of each leaf. A `get` reads the leaf's index once (about 90
bytes an entry) and the one value. Both are kept in a bounded cache (`cache.py`), so that a hot key
costs one dict probe. Once an eighth of a leaf has been read, prefetch the rest, if the cache can
hold the whole base. A range caches nothing; it reads whole leaves, and of a leaf that it cuts the
index and the values that it returns.

Everything is read with `pread` from a descriptor that lives as long as the base. A base is
immutable, can be read by any thread, and outlives the log's replacement by a newer file.

Not `mmap`: if someone truncates a mapped file, the process dies of SIGBUS.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import count

from blake3 import blake3
from crc32c import crc32c

from foldlog.protocol.decoding import Undecodable
from foldlog.protocol.errors import CorruptLogError, is_own_fault
from foldlog.protocol.updates import Change
from foldlog.storage.fold import leaf
from foldlog.storage.fold.cache import ENTRY_OVERHEAD, Cache
from foldlog.storage.fold.leaf import Columns, Index
from foldlog.storage.log.files import ReadHandle

_INDEX, _ALL = 1, 2  # what of a leaf was checked
_uids = count()
_READ_AHEAD_PART = 8
"""Prefetch a leaf once one in this many of its entries has been read singly.

An entry costs 3 us read alone, 0.6 us with the rest of its leaf.
"""


class Base:
    """The leaves of one file, in key order."""

    __slots__ = (
        "_counts",
        "_crcs",
        "_index_crcs",
        "_index_lens",
        "_last",
        "_lengths",
        "_offsets",
        "_origins",
        "_reads",
        "_sound",
        "_uid",
        "_weight",
        "cache",
        "digest",
        "entries",
        "firsts",
        "handle",
        "recent",
    )

    def __init__(self, handle: ReadHandle | None) -> None:
        self.handle = handle
        self.entries = 0
        self.digest = b""
        """BLAKE3 of all leaf bodies, as recorded at the end of the base; b"" if written here."""
        self.firsts: list[str] = []
        self._offsets = array("Q")  # of each body
        self._lengths = array("I")
        self._crcs = array("I")
        self._counts = array("H")
        self._index_lens = array("I")
        self._index_crcs = array("I")
        self._last = ""  # key of the last leaf
        self._sound = bytearray()  # by leaf; what was checked: 1 its index, 2 all of it
        # A leaf's identity, wherever it is now: the base and the number that it was created with.
        # Never equal for two leaves that differ; checksums could be forged to be.
        self._uid = next(_uids)
        self._origins: dict[int, tuple[int, int]] = {}
        self.cache = Cache()
        """What was read from the leaves lately. The next base inherits it, and its limit."""
        self.recent = self.cache.recent
        """Entries that were read lately, in shards by hash: for `FoldSnapshot.get`."""
        # Reads of single entries, by leaf, since its last prefetch. Races lose some.
        self._reads: list[int] = []
        self._weight = 0  # bytes that all entries would take in the cache

    def add_leaf(self, offset: int, body: bytes | memoryview, crc: int) -> None:
        """Note the leaf whose body is at `offset`.

        Undecodable if its keys do not follow those of the leaf before.
        """
        first, last = leaf.range_bounds(body)
        if last < first or (self.firsts and first <= self._last):
            raise Undecodable("leaves are not in key order")
        count, index_len, _, index_crc = leaf.HEADER.unpack_from(body)
        self._last = last
        self._sound.append(0)
        self.firsts.append(first)
        self._offsets.append(offset)
        self._lengths.append(len(body))
        self._crcs.append(crc)
        self._counts.append(count)
        self._index_lens.append(index_len)
        self._index_crcs.append(index_crc)
        self.cache.add_leaf()
        self._reads.append(0)
        self._weight += len(body) + index_len + count * (ENTRY_OVERHEAD + leaf.KEY_OVERHEAD)
        self.entries += count

    def inherit(
        self, old: Base, copies: Mapping[int, int], changes: Iterable[Mapping[str, Change]]
    ) -> None:
        """Take over the cache of `old`, updated with the `changes` since, oldest first.

        `copies` maps each leaf that is a byte-for-byte copy to its number in `old`. Cost: 20 ns for
        each cached entry and 0.1 us for each change; nothing if `old` was never read.
        """
        self._origins = {number: old.identity(origin) for number, origin in copies.items()}
        for number, origin in copies.items():
            self._sound[number] = old._sound[origin]
        self.cache.inherit(old.cache, copies, changes)

    def __len__(self) -> int:
        """The number of leaves."""
        return len(self.firsts)

    def count(self, number: int) -> int:
        """The number of entries in a leaf."""
        return self._counts[number]

    def crc(self, number: int) -> int:
        """The checksum of a leaf's body."""
        return self._crcs[number]

    def identity(self, number: int) -> tuple[int, int]:
        """What a leaf shares with its copies, and with nothing else.

        For leaves that were read from two files, see `looks`.
        """
        return self._origins.get(number) or (self._uid, number)

    def looks(self, number: int) -> tuple[str, int, int, int]:
        """What two leaves with the same body have in common: first key, length, checksums.

        Equal looks do not prove equal bodies.
        """
        return (
            self.firsts[number],
            self._lengths[number],
            self._crcs[number],
            self._index_crcs[number],
        )

    def same_as(self, number: int, other: Base, origin: int) -> None:
        """Record that a leaf is a byte-for-byte copy of leaf `origin` of `other`."""
        self._origins[number] = other.identity(origin)

    def read(self, key: str) -> Change | None:
        """The entry of `key`, from disk.

        Cost: 2-4 us, 1 us for an absent key; 20 us more on the first read of a leaf.
        """
        cache = self.cache
        if cache.has_older and (older := cache.take_older(key)) is not None:
            return older
        number = bisect_right(self.firsts, key) - 1
        if number < 0:
            return None
        index = cache.indexes[number]
        if index is None:
            index = self.index(number)
        else:
            cache.used[number] = 1
        numbers = index.numbers
        if numbers is not None:
            entry = numbers.get(key, -1)
            return None if entry < 0 else self._read_entry(number, index, entry)
        entry = bisect_left(index.keys, key)
        if entry == len(index.keys) or index.keys[entry] != key:
            return None
        return self._read_entry(number, index, entry)

    def _read_entry(self, number: int, index: Index, entry: int) -> Change:
        start, size, crc, version = index.locate(entry)
        value = self._pread(size, self._offsets[number] + start)
        key = index.keys[entry]
        if crc32c(value) != crc:
            raise self._corrupt(number, f"the value of key {key[:40]!r} does not verify")
        change = (key, value, version)
        self.cache.add(change)
        reads = self._reads[number] = self._reads[number] + 1
        if reads * _READ_AHEAD_PART > len(index.keys):
            self._read_ahead(number, index)
        return change

    def _read_ahead(self, number: int, index: Index) -> None:
        """Cache all entries of a leaf, if the whole base fits the cache. Cost: 0.6 us an entry."""
        self._reads[number] = 0
        if self._weight > self.cache.limit_bytes or self._lengths[number] > leaf.MAX_LEAF_BYTES:
            return
        try:
            columns = self.columns(number)
        except (CorruptLogError, OSError) as error:
            if not is_own_fault(error):
                raise
            return  # a read of the damaged entry reports it; the others can still be read singly
        # The keys of the index are equal to those in the columns, and already in memory.
        self.cache.add_leaf_entries(columns._replace(keys=index.keys))
        self.cache.number_keys(index)

    def index(self, number: int) -> Index:
        """The index of a leaf, kept from its first read on while the cache has room."""
        index = self.cache.use_index(number)
        if index is None:
            index = self._read_index(number)
            self._sound[number] = self._sound[number] or _INDEX
            self.cache.keep_index(number, index)
        return index

    def _read_index(self, number: int) -> Index:
        try:
            raw = self._pread(self._index_lens[number], self._offsets[number])
            index = Index(raw, self._lengths[number])
        except Undecodable as error:
            raise self._corrupt(number, str(error)) from None
        if index.crc != self._index_crcs[number]:
            raise self._corrupt(number, "a leaf's index is another than it was")
        return index

    def keys(self, number: int) -> list[str]:
        """The keys of a leaf, checked. Unlike `index`, keeps nothing of a leaf not read before."""
        index = self.cache.indexes[number]
        return (index or self._read_index(number)).keys

    def body(self, number: int) -> bytes:
        """The body of a leaf, read and verified."""
        body = self._pread(self._lengths[number], self._offsets[number])
        if crc32c(body) != self._crcs[number]:
            raise self._corrupt(number, "a leaf does not verify")
        return body

    def sound_body(self, number: int) -> tuple[bytes, list[str] | None]:
        """The body of a leaf, its contents checked; and its keys, if checking decoded them.

        Cost: on the first call, 0.2 us an entry; then that of `body`.
        """
        body = self.body(number)
        if self._sound[number] == _ALL:
            return body, None
        try:
            keys = leaf.check_order(body)
        except Undecodable as error:
            raise self._corrupt(number, str(error)) from None
        self._sound[number] = _ALL
        return body, keys

    def check(self) -> None:
        """Undecodable unless every leaf is valid and in order, and the digest that of them all.

        Cost: a read of all, 0.2 us an entry.
        """
        last_key = None
        digest = blake3()
        for number in range(len(self)):
            body = self.body(number)
            keys = leaf.check_order(body)
            if last_key is not None and keys[0] <= last_key:
                raise Undecodable(f"leaf {number} overlaps the one before it")
            last_key = keys[-1]
            digest.update(body)
        if digest.digest() != self.digest:
            raise Undecodable("the digest of the leaves is not the one at the end of the base")

    def columns(self, number: int, low: str | None = None, high: str | None = None) -> Columns:
        """The entries of a leaf with low <= key < high.

        Of a leaf that was not read as a whole before, only the index and what is within the bounds
        is checked, and with bounds, only that is read.
        """
        try:
            if low is not None or high is not None:
                return self._part(number, low, high)
            body = self.body(number)
            if self._sound[number] == _ALL:
                return leaf.decode_leaf(body)
            keys = leaf.decode_keys(body) if self._sound[number] else leaf.checked_keys(body)
            columns = leaf.checked_columns(body, keys, 0, len(keys))
        except Undecodable as error:
            raise self._corrupt(number, str(error)) from None
        self._sound[number] = _ALL
        return columns

    def _part(self, number: int, low: str | None, high: str | None) -> Columns:
        """See `columns`."""
        offset = self._offsets[number]
        raw = self._pread(self._index_lens[number], offset)
        keys = leaf.index_keys(raw, self._lengths[number], checked=self._sound[number] != 0)
        if leaf.HEADER.unpack_from(raw)[3] != self._index_crcs[number]:
            raise Undecodable("a leaf's index is another than it was")
        self._sound[number] = self._sound[number] or _INDEX
        start, stop = leaf.bounds(keys, low, high)
        if start == stop:
            return Columns([], [], [])
        first, last = leaf.value_span(raw, start, stop)
        values = self._pread(last - first, offset + len(raw) + first)
        return leaf.checked_columns(raw, keys, start, stop, values)

    def _pread(self, size: int, offset: int) -> bytes:
        assert self.handle is not None, "a base without a file has no leaves"
        try:
            return self.handle.read(size, offset)
        except EOFError as error:
            raise CorruptLogError(self.handle.path, offset, str(error)) from None

    def _corrupt(self, number: int, reason: str) -> CorruptLogError:
        assert self.handle is not None
        return CorruptLogError(self.handle.path, self._offsets[number], reason)


EMPTY_BASE = Base(None)
