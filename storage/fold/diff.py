"""The difference between two folds, at the cost of what changed: what they share is skipped.

Runs and pieces of the delta are shared as objects, and so are the changes in them. A base is shared
as an object until the log is compacted. After that, a leaf that the compaction copied keeps its
identity, and is not read. Equal entries make equal leaves, so a compaction rewrites only the leaves
in which something changed. Leaves from two files that have the same checksums are compared byte by
byte, once: a checksum shows that a leaf is undamaged, not that two leaves are equal.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from heapq import merge

from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.updates import Change, Delete, Put
from foldlog.storage.fold import leaf
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.delta import Run
from foldlog.storage.fold.reading import SnapshotReads, prefix_end
from foldlog.storage.fold.snapshot import FoldSnapshot


def diff(old: FoldSnapshot, new: FoldSnapshot, prefix: str = "") -> Iterator[Put | Delete]:
    """The changes that lead from `old` to `new`, ascending by key.

    A Put or Delete for each key under `prefix` that differs. Exact, even if `new` is the older one,
    or of another log. A Delete carries the version of the removal if it is still known.

    Cost: see `foldlog.diff`. CorruptLogError if a leaf that is needed does not verify.
    """
    if old is new:
        return
    high = prefix_end(prefix)
    if high is not None and prefix >= high:
        return
    loose = sorted(
        key for key in _loose_suspects(old, new) if key >= prefix and (high is None or key < high)
    )
    last = None
    for key in merge(loose, _leaf_suspects(old.base, new.base, prefix, high)):
        if key == last:
            continue
        last = key
        before, after = old.get(key), new.get(key)
        if after is None:
            if before is not None:
                yield Delete(key, _removal_version(new, key))
        elif before != after:
            yield Put(*after)


def merged_diff(old: SnapshotReads, new: SnapshotReads, prefix: str) -> Iterator[Put | Delete]:
    """`diff` for two snapshots that share nothing: reads both. A Delete carries no version."""
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


def _loose_suspects(old: FoldSnapshot, new: FoldSnapshot) -> set[str]:
    """The keys that may differ because of what runs and deltas hold."""
    before, after = _own_changes(old, new), _own_changes(new, old)
    keys = {key for key, change in after.items() if before.get(key) is not change}
    keys.update(key for key in before if key not in after)
    return keys


def _own_changes(fold: FoldSnapshot, other: FoldSnapshot) -> dict[str, Change]:
    """The changes of `fold` in runs and pieces that `other` does not share."""
    shared = set(map(id, other.runs)) | set(map(id, other.delta))
    changes: dict[str, Change] = {}
    pieces: list[Run] = [*fold.delta, *reversed(fold.runs)]
    for piece in pieces:
        if id(piece) not in shared:
            changes.update(piece)
    return changes


def _leaf_suspects(old: Base, new: Base, low: str, high: str | None) -> Iterator[str]:
    """The keys, ascending, whose entries in the leaves differ.

    The key space is cut at the start of each leaf that the other base lacks. Between two cuts there
    is at most one such leaf of each base, and everything else is equal.
    """
    if old is new:
        return
    own = dict(zip((old, new), _unshared(old, new, low, high), strict=True))
    cuts = {low}
    for base, numbers in own.items():
        cuts.update(map(base.firsts.__getitem__, numbers))
    lows = sorted(cut for cut in cuts if cut >= low and (high is None or cut < high))
    sides = [_OwnLeaves(base, set(numbers)) for base, numbers in own.items()]
    for start, end in zip(lows, [*lows[1:], high], strict=True):
        before, after = (side.entries(start, end) for side in sides)
        if before != after:
            yield from sorted({key for key, _ in before.items() ^ after.items()})


def _unshared(old: Base, new: Base, low: str, high: str | None) -> tuple[list[int], list[int]]:
    """The leaves of each base, with keys in low <= key < high, that the other lacks."""
    before, after = (
        {base.identity(n): n for n in _touched(base, low, high)} for base in (old, new)
    )
    for identity in before.keys() & after.keys():
        del before[identity], after[identity]
    looks = {old.looks(number): (identity, number) for identity, number in before.items()}
    for identity, number in list(after.items()):
        if (found := looks.get(new.looks(number))) is None:
            continue
        if old.body(found[1]) == new.body(number):
            new.same_as(number, old, found[1])
            del before[found[0]], after[identity]
    return sorted(before.values()), sorted(after.values())


def _touched(base: Base, low: str, high: str | None) -> range:
    """The leaves that may hold keys in low <= key < high."""
    stop = len(base) if high is None else bisect_left(base.firsts, high)
    return range(max(bisect_right(base.firsts, low) - 1, 0), stop)


class _OwnLeaves:
    """The leaves of a base that the other one lacks, read in order."""

    def __init__(self, base: Base, numbers: set[int]) -> None:
        self._base, self._numbers = base, numbers
        self._number = -1
        self._columns = leaf.Columns([], [], [])

    def entries(self, low: str, high: str | None) -> dict[str, tuple[bytes, bytes]]:
        """Value and version by key, for low <= key < high within one leaf."""
        number = bisect_right(self._base.firsts, low) - 1
        if number not in self._numbers:
            return {}
        if number != self._number:
            self._number, self._columns = number, self._base.columns(number)
        keys, values, versions = self._columns
        part = slice(*leaf.bounds(keys, low, high))
        return dict(zip(keys[part], zip(values[part], versions[part], strict=True), strict=True))


def _removal_version(fold: FoldSnapshot, key: str) -> VersionToken:
    for run in fold.runs:
        if key in run:
            return VersionToken(run[key][2])
    change = fold.delta.get(key) if fold.delta.firsts else None
    return VersionToken.unknown() if change is None else VersionToken(change[2])
