"""How any engine's snapshot is read: all reads but `get`, over blocks of entries in key order; and
by segments, for a writer of files.

A segment is a span of keys. If it is a whole leaf that did not change, or changed in a few values
only, the leaf can be carried over, without a decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol, TypeVar, overload

from foldlog.protocol.options import Count, check_flag
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Change, KvEntry
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.fold.leaf import Columns

_SMALL_RANGE_BLOCKS = 16  # a range of fewer blocks ends before a full garbage collection starts
_LIMIT = Count("limit", 0)
D = TypeVar("D")


class SnapshotReads(ABC):
    """The reads of an immutable state. A subclass adds `get`, `__len__` and `_entry_blocks`."""

    __slots__ = ()

    @overload
    def get(self, key: str) -> KvEntry | None: ...
    @overload
    def get(self, key: str, default: D) -> KvEntry | D: ...
    @abstractmethod
    def get(self, key: str, default: object = None) -> object:
        """The live entry of `key`, or `default` if it is absent or deleted."""

    @abstractmethod
    def _entry_blocks(
        self, low: str, high: str | None, reverse: bool = False
    ) -> Iterator[list[KvEntry]]:
        """The live entries with low <= key < high, ascending, in pieces, none empty.

        With `reverse`, descending. The error of a state that can no longer be read comes at the
        call, not at the first piece.
        """

    def get_many(self, keys: Iterable[str]) -> dict[str, KvEntry]:
        """The live entries among `keys`, by key, in the order of `keys`.

        Absent keys are left out.
        """
        if isinstance(keys, str):
            raise TypeError("keys is an iterable of str, not a str")
        get = self.get
        return {key: entry for key in keys if (entry := get(key)) is not None}

    def range(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        stop: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> list[KvEntry]:
        """The live entries under `prefix`, ascending by key.

        Keys are ordered by code point, which is the order of their UTF-8 bytes. Only keys with
        `start` <= key < `stop` are returned, and at most the first `limit`. With `reverse`,
        descending by key: the bounds stay the same, and `limit` counts from the last key.

        Cost: 0.3-0.5 us an entry, and up to 20 us for each end that cuts through a leaf; on
        RocksDB, 1-2 us an entry.
        """
        if limit is not None or reverse is not False or start is not None or stop is not None:
            return list(
                self.iter_range(prefix, start=start, stop=stop, limit=limit, reverse=reverse)
            )
        entries: list[KvEntry] = []
        blocks = self.blocks(prefix)
        for block in islice(blocks, _SMALL_RANGE_BLOCKS):
            entries += block
        with no_full_collections():
            for block in blocks:
                entries += block
        return entries

    def iter_range(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        stop: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> Iterator[KvEntry]:
        """`range`, entry by entry: reads and holds one block at a time, only as needed."""
        low, high = range_bounds(prefix, start, stop)
        check_flag("reverse", reverse)
        if limit is not None:
            limit = _LIMIT.check(limit)
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
        """`range` in pieces, none empty; only keys after `after`, if given."""
        low, high = range_bounds(prefix, None if after is None else after + "\0", None)
        return self._entry_blocks(low, high)

    def entries_after(self, prefix: str, after: str | None) -> Iterator[KvEntry]:
        """The live entries under `prefix` after the key `after`, one by one."""
        return chain.from_iterable(self.blocks(prefix, after))

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The live keys under `prefix`, ascending."""
        return (entry.key for entry in self.iter_range(prefix))

    def __iter__(self) -> Iterator[str]:
        """The live keys, ascending."""
        return self.keys()

    def items(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """(key, value) of the live entries under `prefix`, ascending."""
        return ((entry.key, entry.value) for entry in self.iter_range(prefix))

    def __contains__(self, key: object) -> bool:
        """True if `key` is live."""
        return isinstance(key, str) and self.get(key) is not None

    @abstractmethod
    def cursor(self) -> WatchCursor:
        """Every update of the stream up to this position is folded in."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of live entries."""

    def __bool__(self) -> bool:
        return True  # a snapshot of an empty store is still a snapshot


class Segment(Protocol):
    """The live entries of one span of keys."""

    @property
    def is_leaf(self) -> bool:
        """True if the span is that of a whole leaf, which `carried` may return."""

    @property
    def unchanged_leaf(self) -> int | None:
        """The number of the leaf that holds just these entries; None if none does."""

    def carried(self) -> tuple[bytes, int | None] | None:
        """The body of the leaf, with its checksum if it is unchanged.

        None if the entries must be encoded. Cost: a read, and 4 us a change.
        """

    def columns(self) -> Columns:
        """The entries, in key order."""

    def live_changes(self) -> list[Change] | None:
        """The entries, in key order, as the fold has them in memory; None if some are in a leaf."""


class Writable(Protocol):
    """What can be written to a new file: a fold, or another engine's state in its place."""

    @property
    def seq(self) -> int:
        """The sequence of its last batch."""

    @property
    def origin(self) -> bytes:
        """The upstream of its cursor."""

    @property
    def base_entries(self) -> int:
        """Entries of its base, for progress."""

    @property
    def is_in_memory(self) -> bool:
        """True if all entries are in memory."""

    def cursor(self) -> WatchCursor:
        """The cursor of its last batch."""

    def segments(self) -> Iterator[Segment]:
        """All of it, in key order."""


def range_bounds(prefix: str, start: str | None, stop: str | None) -> tuple[str, str | None]:
    """Bounds, low <= key < high, of the keys under `prefix` with start <= key < stop."""
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
    for name, bound in (("start", start), ("stop", stop)):
        if bound is not None and not isinstance(bound, str):
            raise TypeError(f"{name} is a str, not {type(bound).__name__}")
    high = prefix_end(prefix)
    if stop is not None:
        high = stop if high is None else min(high, stop)
    return max(prefix, start or ""), high


def prefix_end(prefix: str) -> str | None:
    """The least string above all that start with `prefix`; None if there is none."""
    stem = prefix.rstrip("\U0010ffff")
    return stem[:-1] + chr(ord(stem[-1]) + 1) if stem else None
