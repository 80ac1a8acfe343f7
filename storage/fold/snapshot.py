"""The fold: one immutable state of the store, at one cursor. Readers hold it as a snapshot.

    runs    the newest changes, a handful of dicts                 storage/fold/delta.py
    delta   older changes, in pieces by key                        storage/fold/delta.py
    base    the state at the last compaction, on disk              storage/fold/base.py

A key is looked up in this order. A batch makes a new fold that shares all but its newest run with
the old one, so that the cost of publishing is proportional to the batch, not to the store.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

from foldlog.protocol.errors import StoreClosed
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import SLICE, Batch, Change, KvEntry
from foldlog.storage.fold import leaf
from foldlog.storage.fold.base import EMPTY_BASE, Base
from foldlog.storage.fold.cache import SHARDS
from foldlog.storage.fold.delta import EMPTY_DELTA, Delta, Run, pushed
from foldlog.storage.fold.leaf import Columns
from foldlog.storage.fold.reading import Segment, SnapshotReads
from foldlog.storage.log.files import ReadHandle

_SHARD_MASK = SHARDS - 1
# Keys in a span of a fold that is all runs: the least that a range with a limit looks at.
_UNSETTLED_SPAN_KEYS = 256
_MOST_OF_A_LEAF = 2 / 3
_PATCHED_CHANGES = 32  # up to so many, patching a leaf is faster than decoding it
_new_entry = tuple.__new__
D = TypeVar("D")


class Span(NamedTuple):
    """A range of keys, low <= key < high, within one leaf of the base."""

    leaf: int
    """The number of the leaf, or -1 before the first."""
    whole: bool
    """True if the span covers the leaf."""
    low: str
    high: str | None
    """None: to the end."""
    changes: dict[str, Change]
    """All changes in the span that are newer than the base."""
    in_order: bool
    """True if `changes` are in key order."""


class FoldSnapshot(SnapshotReads):
    """An immutable state of a store. Any thread may read it, for any length of time.

    A snapshot held across a compaction keeps the replaced file of its base open. The file has no
    name any more; its disk space is freed when the last such snapshot is gone.
    """

    __slots__ = ("__weakref__", "_cursor", "_entries", "base", "delta", "origin", "runs", "seq")

    def __init__(
        self,
        base: Base,
        delta: Delta,
        runs: tuple[Run, ...],
        seq: int,
        cursor: WatchCursor,
        origin: bytes = b"",
    ) -> None:
        self.base, self.delta, self.runs = base, delta, runs
        self.seq = seq
        """The sequence of its last batch: 0 if empty, +1 for each batch, across compactions."""
        self._cursor = cursor
        self.origin = origin
        """The identity of the upstream whose position the cursor is; empty if never named."""
        self._entries: int | None = None

    @classmethod
    def empty(cls) -> FoldSnapshot:
        """Batch 0: the state of every store before its first batch."""
        return cls(EMPTY_BASE, EMPTY_DELTA, (), 0, WatchCursor.none())

    @overload
    def get(self, key: str) -> KvEntry | None: ...
    @overload
    def get(self, key: str, default: D) -> KvEntry | D: ...
    def get(self, key: str, default: object = None) -> object:
        """The live entry of `key`, or `default` if it is absent or deleted.

        Cost: 0.2-0.3 us for an entry that was read before, 3-8 us for the first read from disk.
        """
        for run in self.runs:
            if key in run:
                change = run[key]
                return default if change[1] is None else _new_entry(KvEntry, change)
        delta = self.delta
        if delta.firsts:
            entry = delta.hot.get(key)
            return self._get_older(key, default) if entry is None else entry
        known = self.base.recent[hash(key) & _SHARD_MASK].get(key)
        if known is None:
            if not isinstance(key, str):
                raise _not_a_key(key)
            known = self.base.read(key)
            if known is None:
                return default
        return _new_entry(KvEntry, known)

    def _get_older(self, key: str, default: object) -> object:
        if not isinstance(key, str):
            raise _not_a_key(key)
        delta = self.delta
        change = delta.get(key)
        if change is None:
            change = self.base.recent[hash(key) & _SHARD_MASK].get(key) or self.base.read(key)
        if change is None or change[1] is None:
            return default
        entry: KvEntry = _new_entry(KvEntry, change)
        delta.remember(entry)
        return entry

    def _entry_blocks(
        self, low: str, high: str | None, reverse: bool = False
    ) -> Iterator[list[KvEntry]]:
        for columns in self.columns(low, high, reverse=reverse):
            if columns.keys:
                block = list(map(_new_entry, repeat(KvEntry), zip(*columns, strict=True)))
                if reverse:
                    block.reverse()
                yield block

    def __len__(self) -> int:
        """The number of live entries.

        Cost of the first call: 1 us a leaf, and O(changes since the last compaction); then nothing.
        """
        if self._entries is None:
            entries = self.base.entries
            for span in self.spans("", None):
                if span.changes:
                    keys = self._leaf_keys(span)
                    entries -= sum(map(span.changes.__contains__, keys))
                    entries += sum(change[1] is not None for change in span.changes.values())
            self._entries = entries
        return self._entries

    def cursor(self) -> WatchCursor:
        """Every update of the stream up to this position is folded in."""
        return self._cursor

    def __repr__(self) -> str:
        return f"<FoldSnapshot at batch {self.seq}, {self._cursor!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a snapshot reads from its log's file and cannot be pickled; "
            "open a follower there, or send its entries"
        )

    # For the engine.

    @property
    def source(self) -> ReadHandle | None:
        """The file that the base is read from."""
        return self.base.handle

    def parts(self) -> list[object]:
        """What the fold is made of, to be released piece by piece.

        Freeing a large fold at once holds the interpreter lock for 100 ms or more. Closing the last
        descriptor of a file without a name frees its pages, which takes as long. Parts shared with
        other snapshots stay alive. The descriptor comes last, and is the first to be released: the
        disk may be short of the space.
        """
        return [*self.base.cache.parts(), *self.delta, *self.runs, self.base.handle]

    @property
    def cached_bytes(self) -> int:
        """The memory that entries and leaf indexes read from the base take, in bytes."""
        return self.base.cache.held_bytes

    def limit_cache(self, limit_bytes: int) -> None:
        """Bound `cached_bytes`, in later folds, too. For a fold that nobody reads yet."""
        if self.base is not EMPTY_BASE:
            self.base.cache.set_limit(limit_bytes)

    def retire(self) -> None:
        """Another base has taken over: keep nothing more that is read from this one."""
        self.limit_cache(0)

    # For who writes it to a file.

    @property
    def base_entries(self) -> int:
        """The number of entries in the base."""
        return self.base.entries

    @property
    def base_leaves(self) -> int:
        """The number of leaves in the base."""
        return len(self.base)

    @property
    def is_in_memory(self) -> bool:
        """True if it has no base on disk."""
        return self.base is EMPTY_BASE

    def segments(self) -> Iterator[Segment]:
        """All live entries, in key order, a leaf or less at a time."""
        return (_FoldSegment(self, span) for span in self.spans("", None))

    def check_base(self) -> None:
        """Undecodable unless the leaves of the base are in order, and have the digest it states."""
        self.base.check()

    def hand_over(self, base: Base, copies: Mapping[int, int]) -> None:
        """Let `base`, to which this fold was written, take over its cache. See `Base.inherit`."""
        base.inherit(self.base, copies, (*self.delta, *reversed(self.runs)))

    def over(self, base: Base, delta: Delta = EMPTY_DELTA) -> FoldSnapshot:
        """The changes of this fold, which has no base, on top of `base` and `delta`."""
        if delta.firsts:
            newest_first = tuple(self.delta)[::-1]
            delta = delta.with_runs(newest_first) if newest_first else delta
        else:
            delta = self.delta
        return FoldSnapshot(base, delta, self.runs, self.seq, self._cursor, self.origin)

    def at(self, cursor: WatchCursor) -> FoldSnapshot:
        """The same state, at another cursor of no known upstream."""
        return FoldSnapshot(self.base, self.delta, self.runs, self.seq, cursor)

    def with_batch(
        self,
        changes: tuple[dict[str, Change], ...],
        seq: int,
        cursor: WatchCursor,
        origin: bytes = b"",
    ) -> FoldSnapshot:
        """The fold after one more batch. Cost: about 1 us a change, at any size of the store."""
        delta, runs = self.delta, self.runs
        for newest in changes:
            runs = pushed(runs, newest)
            if runs and (delta.settling or len(runs[-1]) >= delta.settle_entries):
                delta, runs = delta.with_due(runs, len(newest))
        return FoldSnapshot(self.base, delta, runs, seq, cursor, origin)

    def with_group(self, batches: Sequence[Batch]) -> FoldSnapshot:
        """The fold after a commit group of at least one batch.

        Small batches share one run: 0.1 us each, not 1.5.
        """
        if len(batches) == 1:
            only = batches[0]
            return self.with_batch(only.changes, self.seq + 1, only.cursor, only.origin)
        runs: list[dict[str, Change]] = [{}]
        for changes in chain.from_iterable(batch.changes for batch in batches):
            if len(runs[-1]) + len(changes) > SLICE:
                runs.append({})
            runs[-1].update(changes)
        last = batches[-1]
        return self.with_batch(tuple(runs), self.seq + len(batches), last.cursor, last.origin)

    def spans(self, low: str, high: str | None, *, reverse: bool = False) -> Iterator[Span]:
        """The spans of low <= key < high, ascending; with `reverse`, the last span first.

        They are cut at each leaf and at each piece of the delta.
        """
        firsts, pieces = self.base.firsts, self.delta.firsts
        if not firsts and not pieces and self.runs:
            pieces = self.runs[-1].order()[::_UNSETTLED_SPAN_KEYS]
        cuts = merge(
            _between(firsts, low, high, reverse),
            _between(pieces, low, high, reverse),
            reverse=reverse,
        )
        if reverse:
            for end, start in pairwise(chain((high,), cuts, (low,))):
                if end != start and start is not None:
                    yield self._span(start, end)
        else:
            for start, end in pairwise(chain((low,), cuts, (high,))):
                if end != start and start is not None:  # else a leaf and a piece begin there
                    yield self._span(start, end)

    def _span(self, start: str, end: str | None) -> Span:
        firsts = self.base.firsts
        number = bisect_right(firsts, start) - 1
        leaf_high = firsts[number + 1] if number + 1 < len(firsts) else None
        whole = number >= 0 and start <= firsts[number] and end == leaf_high
        changes: dict[str, Change] = {}
        in_order = self.delta.copy_into(changes, start, end)
        for run in reversed(self.runs):
            before = len(changes)
            run.copy_into(changes, start, end)
            in_order = in_order and before in (0, len(changes))
        return Span(number, whole, start, end, changes, in_order)

    def columns(self, low: str, high: str | None, *, reverse: bool = False) -> Iterator[Columns]:
        """The live entries with low <= key < high by span; with `reverse`, the last span first."""
        if high is not None and low >= high:
            return
        for span in self.spans(low, high, reverse=reverse):
            yield self.span_columns(span)

    def span_columns(self, span: Span) -> Columns:
        """The live entries of a span."""
        if span.leaf < 0:
            return leaf.columns_of(span.changes, in_order=span.in_order)
        low, high = (None, None) if span.whole else (span.low, span.high)
        if not span.changes:
            return self.base.columns(span.leaf, low, high)
        if self._is_overwritten(span):
            return leaf.columns_of(span.changes, in_order=span.in_order)
        body, keys = self.base.sound_body(span.leaf)
        return leaf.merged_columns(body, span.changes, low, high, keys)

    def _is_overwritten(self, span: Span) -> bool:
        """True if no entry of the leaf is left in the span, as far as it is worth looking.

        Cost: reads the leaf's keys if that seems likely.
        """
        count = self.base.count(span.leaf)
        if len(span.changes) < (count if span.whole else count * _MOST_OF_A_LEAF):
            return False
        keys = self.base.keys(span.leaf)
        start, stop = leaf.bounds(keys, span.low, span.high)
        return stop - start <= len(span.changes) and all(
            map(span.changes.__contains__, keys[start:stop])
        )

    def _leaf_keys(self, span: Span) -> list[str]:
        if span.leaf < 0:
            return []
        keys = self.base.index(span.leaf).keys
        start, stop = leaf.bounds(keys, span.low, span.high)
        return keys[start:stop]


def _not_a_key(key: object) -> TypeError:
    return TypeError(f"a key is a str, not {type(key).__name__}")


def _between(starts: list[str], low: str, high: str | None, reverse: bool = False) -> Iterator[str]:
    """Those of `starts` above `low` and below `high`; lazy, since a range may be left early."""
    stop = len(starts) if high is None else bisect_left(starts, high)
    numbers = range(bisect_right(starts, low), stop)
    return map(starts.__getitem__, reversed(numbers) if reverse else numbers)


class _FoldSegment:
    """See `Segment`."""

    __slots__ = ("_fold", "_span")

    def __init__(self, fold: FoldSnapshot, span: Span) -> None:
        self._fold, self._span = fold, span

    @property
    def is_leaf(self) -> bool:
        return self._span.whole

    @property
    def unchanged_leaf(self) -> int | None:
        span = self._span
        return span.leaf if span.whole and not span.changes else None

    def carried(self) -> tuple[bytes, int | None] | None:
        base, number, changes = self._fold.base, self._span.leaf, self._span.changes
        if len(changes) > _PATCHED_CHANGES:
            return None
        body = base.body(number)
        if not changes:
            return body, base.crc(number)
        patched = leaf.patched_leaf(body, changes)
        return None if patched is None else (patched, None)

    def columns(self) -> Columns:
        span, base = self._span, self._fold.base
        if span.changes or span.whole or span.leaf < 0:
            return self._fold.span_columns(span)
        body, keys = base.sound_body(span.leaf)  # one read, where a range would make two
        return leaf.decode_leaf(body, span.low, span.high, keys)

    def live_changes(self) -> list[Change] | None:
        if self._span.leaf >= 0:
            return None
        changes = sorted(self._span.changes.items())
        return [change for _, change in changes if change[1] is not None]


class ClosedFold:
    """Replaces the fold of a closed store: every use raises StoreClosed, at no cost before."""

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "_reason", reason)

    def __getattribute__(self, name: str) -> Any:
        raise StoreClosed(object.__getattribute__(self, "_reason"))
