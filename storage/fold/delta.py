"""Changes newer than the base: runs, and the delta they settle into.

A run is a dict of changes, never modified once a fold holds it. Each batch becomes a run.
Neighbouring runs are merged until each is at least four times as large as the next newer one, so
that a record is copied about log4(n) times and a `get` probes a handful of dicts.

A run that has grown to the size of the delta (8,192 to 32,768 changes) settles into it. The delta
consists of pieces of up to `PIECE_ENTRIES` changes, by key, and only pieces that a change falls
into are copied. Settling is spread over the batches that follow, so that no batch waits while a
whole delta is copied: that took 130 ms with 700,000 changes. And no single call into C touches more
entries than a run has: merging a million at once held the interpreter lock, and so stopped every
thread, for 100 ms or more.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from foldlog.protocol.updates import SLICE, Change, DecodedBatch, KvEntry
from foldlog.storage.fold.leaf import text_bytes

MERGE_RATIO = 4
SETTLE_ENTRIES = 32_768
"""Changes of a run that settles, at most; at least a quarter, since many runs slow a `get` down.

Each settling copies nearly every piece: settling a large delta in quarters made batches of 100 take
half as long again.
"""
PIECE_ENTRIES = 1024
COLLECTED_ENTRIES = 32_768
STEP_ENTRIES = 256
"""Changes that must arrive between two steps of settling.

A step copies the list of pieces, at 4 ns each.
"""
HOT_ENTRIES = 4096
HOT_ENTRY_BYTES = 1024
"""A larger entry, key and value together, is not kept at hand; so what is takes at most 6 MB."""
SORT_ENTRIES = 8192
"""Keys sorted by one call, which holds the interpreter lock for about 4 ms."""


class Run(dict[str, Change]):
    """Changes by key, and their sorted keys once a range has asked for them."""

    __slots__ = ("_order",)
    _order: list[str]

    def order(self) -> list[str]:
        """The keys, ascending. Sorted on the first call, and kept."""
        try:
            return self._order
        except AttributeError:
            keys = list(self)
            order: list[str] = []
            for start in range(0, len(keys), SORT_ENTRIES):
                order += sorted(keys[start : start + SORT_ENTRIES])
            order.sort()  # merges the sorted stretches
            self._order = order
            return order

    def copy_into(self, result: dict[str, Change], low: str, high: str | None) -> None:
        """Add the changes with low <= key < high."""
        order = self.order()
        keys = order[
            bisect_left(order, low) : len(order) if high is None else bisect_left(order, high)
        ]
        result.update(zip(keys, map(self.__getitem__, keys), strict=True))


def pushed(runs: tuple[Run, ...], newest: dict[str, Change]) -> tuple[Run, ...]:
    """`runs`, newest first, with `newest` in front.

    Neighbours are merged until each is at least four times as large as the one before it.
    """
    if not newest:
        return runs
    merged = newest
    count = 0
    for run in runs:
        if len(run) >= MERGE_RATIO * len(merged):
            break
        older = Run(run)
        older.update(merged)
        merged = older
        count += 1
    return (merged if count else Run(merged), *runs[count:])  # type: ignore[arg-type]


_NOTHING = Run()


class Delta:
    """Settled changes, in pieces by key, and the run that is settling into them. Immutable."""

    __slots__ = ("_done", "_pieces", "firsts", "hot", "settle_entries", "settling")

    def __init__(
        self,
        firsts: list[str],
        pieces: list[Run],
        settling: Run = _NOTHING,
        done: int = 0,
        settle_entries: int | None = None,
    ) -> None:
        # firsts[i] <= every key of pieces[i] < firsts[i + 1]. firsts[0] is "", so that every key
        # has a piece.
        self.firsts, self._pieces = firsts, pieces
        self.hot: dict[str, KvEntry] = {}
        """Live entries that were read through this delta, from it or from the base below.

        A hot key then costs one probe here, not a search of the pieces and one of the base. Any
        thread may add and replace; losing a race loses an entry, no more.
        """
        self.settling = settling
        """The run that is settling, newer than the pieces; empty if none is.

        It has been merged into the first `_done` pieces.
        """
        self._done = done
        if settle_entries is None:
            settle_entries = min(max(SETTLE_ENTRIES // 4, sum(map(len, pieces))), SETTLE_ENTRIES)
        self.settle_entries = settle_entries
        """A run settles once it has this many changes."""

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self._pieces)

    def __iter__(self) -> Iterator[Run]:
        """The pieces and the settling run, newest last."""
        yield from self._pieces
        if self.settling:
            yield self.settling

    def get(self, key: str) -> Change | None:
        return self.settling.get(key) or self._pieces[bisect_right(self.firsts, key) - 1].get(key)

    def remember(self, entry: KvEntry) -> None:
        """Keep an entry at hand that was just read."""
        if text_bytes(entry.key) + len(entry.value) <= HOT_ENTRY_BYTES:
            if len(self.hot) >= HOT_ENTRIES:
                self.hot = {}
            self.hot[entry.key] = entry

    def with_due(self, runs: tuple[Run, ...], arrived: int) -> tuple[Delta, tuple[Run, ...]]:
        """The delta and the runs, newest first, after a batch of `arrived` changes.

        The batch's share of what is due has settled.
        """
        if len(runs[-1]) >= self.settle_entries:
            return self._advanced()._taking(runs), ()
        if self.settling and len(runs[0]) >= STEP_ENTRIES:
            # Such runs come at least once in 4/3 STEP_ENTRIES changes, so settling finishes before
            # the next run is due.
            share = 2 * max(arrived, STEP_ENTRIES) / self.settle_entries
            return self._advanced(int(share * len(self)) + 1), runs
        return self, runs

    def with_runs(self, runs: tuple[Run, ...]) -> Delta:
        """The delta with `runs`, newest first, settled into it.

        Cost: a copy of each piece that a change falls into.
        """
        return self._advanced()._taking(runs)._advanced()

    def _taking(self, runs: tuple[Run, ...]) -> Delta:
        newest = Run()
        for run in reversed(runs):
            newest.update(run)
        return Delta(self.firsts or [""], self._pieces or [Run()], newest, 0, self.settle_entries)

    def _advanced(self, count: int = sys.maxsize) -> Delta:
        """The delta with the settling run merged into `count` more pieces."""
        newest = self.settling
        if not newest:
            return self
        keys = newest.order()
        start, end = self._done, min(self._done + count, len(self))
        firsts, pieces = self.firsts[:start], self._pieces[:start]
        at = bisect_left(keys, self.firsts[start])
        for number in range(start, end):
            first, piece = self.firsts[number], self._pieces[number]
            stop = (
                bisect_left(keys, self.firsts[number + 1], at)
                if number + 1 < len(self)
                else len(keys)
            )
            if stop == at:
                firsts.append(first)
                pieces.append(piece)
                continue
            changed = Run(piece)
            here = keys[at:stop]
            changed.update(zip(here, map(newest.__getitem__, here), strict=True))
            at = stop
            if len(changed) <= PIECE_ENTRIES:
                firsts.append(first)
                pieces.append(changed)
                continue
            order = changed.order()
            for begin in range(0, len(order), PIECE_ENTRIES // 2):
                part = order[begin : begin + PIECE_ENTRIES // 2]
                firsts.append(part[0] if begin else first)
                pieces.append(Run(zip(part, map(changed.__getitem__, part), strict=True)))
        if end == len(self):
            return Delta(firsts, pieces)
        done = len(pieces)
        return Delta(
            firsts + self.firsts[end:],
            pieces + self._pieces[end:],
            newest,
            done,
            self.settle_entries,
        )

    def copy_into(self, result: dict[str, Change], low: str, high: str | None) -> bool:
        """Add the changes with low <= key < high. False if an empty `result` is then not in key
        order."""
        if not self._pieces:
            return True
        start = bisect_right(self.firsts, low) - 1
        stop = len(self.firsts) if high is None else bisect_left(self.firsts, high)
        for piece in self._pieces[start:stop]:
            piece.copy_into(result, low, high)
        settled = len(result)
        if self.settling:
            self.settling.copy_into(result, low, high)
        return settled in (0, len(result))  # a key that is there already keeps its place


EMPTY_DELTA = Delta([], [])


class Collected:
    """Collects the changes of a replayed log, and settles them once, at the end.

    Nobody reads meanwhile. Settling as they arrive would copy each change about log(n) times; this
    copies each once.
    """

    def __init__(self) -> None:
        self._runs = [Run()]

    def add(self, changes: dict[str, Change]) -> None:
        """Add changes newer than all before."""
        self._runs[-1].update(changes)
        if len(self._runs[-1]) >= COLLECTED_ENTRIES:
            self._runs.append(Run())

    def add_batch(self, batch: DecodedBatch) -> None:
        """Add a batch newer than all before."""
        if len(batch.keys) > SLICE:
            for changes in batch.changes():
                self.add(changes)
            return
        batch.change_into(self._runs[-1])
        if len(self._runs[-1]) >= COLLECTED_ENTRIES:
            self._runs.append(Run())

    def settled(self) -> tuple[Delta, tuple[Run, ...]]:
        """All changes so far, as a delta, or as runs if they are few."""
        runs: list[Run] = []
        for run in filter(None, self._runs):
            if runs and len(runs[-1]) + len(run) <= COLLECTED_ENTRIES:
                runs[-1] = Run(runs[-1])
                runs[-1].update(run)
            else:
                runs.append(run)
        self._runs = [*runs, Run()]  # what was handed out never changes again
        if sum(map(len, runs)) < SETTLE_ENTRIES // 4:  # a first range sorts a run in 4 ms
            return EMPTY_DELTA, tuple(reversed(runs))
        step = PIECE_ENTRIES // 2
        firsts = ["", *sorted({key for run in runs for key in run.order()[step::step]})]
        pieces = [Run() for _ in firsts]
        for run in runs:
            order = run.order()
            stops = [bisect_left(order, first) for first in firsts[1:]]
            for piece, start, stop in zip(pieces, [0, *stops], [*stops, len(order)], strict=True):
                keys = order[start:stop]
                piece.update(zip(keys, map(run.__getitem__, keys), strict=True))
        return Delta(firsts, pieces), ()
