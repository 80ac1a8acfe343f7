"""The ring: the last commit groups of a store or a follower, kept once for all subscribers.

The publisher fills the last cell and adds an empty one. A subscriber holds the first cell that it
has not read. (The idea is that of the LMAX Disruptor: one ring, and a position for each reader.) So
publishing costs the same for any number of subscribers. Cells are linked forward only: a group that
every subscriber has read is freed at once.

A group that is too old is taken out of its cell. Who still has that cell to read has lost what
follows, and continues at the newest state.

One thread at a time publishes; any thread may read. Publishing may be interrupted anywhere, and
then continues with the next group.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence
from itertools import chain
from typing import NamedTuple

from foldlog.protocol.decoding import decode_batches
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.events import Changed
from foldlog.protocol.updates import Batch, DecodedBatch, batches_body

RING_GROUPS = 1024
"""Commit groups that may wait before a subscriber lags."""
RING_UPDATES = 32_768
"""Updates that may wait: as many as a fold settles at once, so that waiting groups hold no more
than two versions of each of its pieces."""
RING_BYTES = 16 * 1024 * 1024
"""Encoded bytes that may wait. One group always fits, whatever its size."""
_new = tuple.__new__  # a NamedTuple in half the time


class Evicted:
    """What a cell holds once its group was too old."""


EVICTED = Evicted()


class Cell:
    """The place of one group in the ring. What precedes it is known when it is made."""

    __slots__ = (
        "__weakref__",
        "batches",
        "content",
        "number",
        "rewind",
        "size",
        "updates",
    )

    def __init__(
        self,
        number: int = 0,
        batches: int = 0,
        updates: int = 0,
        size: int = 0,
        rewind: tuple[str, int] = ("", -1),
    ) -> None:
        self.content: Group | Evicted | None = None
        """None until it is published."""
        self.number = number
        """Of the group, counted since the ring began."""
        self.batches, self.updates, self.size = batches, updates, size
        """Totals of all groups before it."""
        self.rewind = rewind
        """The last rewind before it, and the number of its group."""

    def after(self, group: Group) -> Cell:
        """The cell that follows this one once `group` is in it."""
        return Cell(
            self.number + 1,
            self.batches + len(group._batches),
            self.updates + group.updates,
            self.size + group.size,
            (group.rewound, self.number) if group.rewound else self.rewind,
        )


class Group:
    """A published commit group; or, without batches, a state reached by unknown steps."""

    __slots__ = (
        "_batches",
        "_decoded",
        "_events",
        "_sorted",
        "first_seq",
        "fold",
        "next",
        "rewound",
        "size",
        "updates",
    )

    def __init__(
        self,
        fold: Snapshot,
        first_seq: int,
        batches: Sequence[Batch | DecodedBatch],
        size: int | None = None,
        rewound: str = "",
    ) -> None:
        """`size` in encoded bytes; None: that of the batches, which are then encoded ones."""
        self.fold, self.first_seq, self.rewound = fold, first_seq, rewound
        self._batches = batches
        if size is None:
            length = size = 0
            for batch in batches:
                length += batch.length  # type: ignore[union-attr]
                size += len(batch.item)  # type: ignore[union-attr]
            self.updates, self.size = length, size
        else:
            self.updates = sum([_length(batch) for batch in batches]) if batches else 0
            self.size = size
        self.next: Cell
        # Each is made on the first call, for all subscribers, and replaced whole. Until then, it is
        # not set: most groups are not read.
        self._decoded: list[DecodedBatch]
        self._events: list[tuple[int, list[Changed]]]
        self._sorted: list[str]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    @property
    def batches(self) -> Sequence[DecodedBatch]:
        """The batches with their updates in order. Decoded once, for all subscribers."""
        try:
            return self._decoded
        except AttributeError:
            self._decoded = decoded = [
                decode_batches(batches_body((batch.item,)), 1)[0]
                if isinstance(batch, Batch)
                else batch
                for batch in self._batches
            ]
            return decoded

    @property
    def events(self) -> list[tuple[int, list[Changed]]]:
        """The sequence and the changes of each batch. Made once, for all subscribers."""
        try:
            return self._events
        except AttributeError:
            self._events = events = [
                (seq, [Changed(update, batch.cursor, seq) for update in batch.updates()])
                for seq, batch in enumerate(self.batches, self.first_seq)
            ]
            return events

    @property
    def keys(self) -> list[Collection[str]]:
        """The keys that it changes, without decoding anything."""
        return [
            keys
            for batch in self._batches
            for keys in (batch.changes if isinstance(batch, Batch) else (batch.keys,))
        ]

    def touches(self, prefix: str) -> bool:
        """True if a key that it changes starts with `prefix`. Sorts the keys once, for all
        subscribers."""
        if not prefix:
            return True
        try:
            keys = self._sorted
        except AttributeError:
            keys = self._sorted = sorted(chain.from_iterable(self.keys))
        at = bisect_left(keys, prefix)
        return at < len(keys) and keys[at].startswith(prefix)

    def run(self, most: int) -> list[Group]:
        """This group and those that were published after it, up to `most`."""
        groups = [self]
        while len(groups) < most and isinstance(group := groups[-1].next.content, Group):
            groups.append(group)
        return groups

    def follows(self, seq: int) -> bool:
        """True if its batches are all that leads from batch `seq` to its fold."""
        return len(self) > 0 and self.first_seq <= seq + 1 and not self.rewound


def _length(batch: Batch | DecodedBatch) -> int:
    """The number of its updates."""
    return batch.length if isinstance(batch, Batch) else len(batch.keys)


class Lost(NamedTuple):
    """Groups were taken out of the ring before they were read. `fold` is the newest state."""

    fold: Snapshot
    batches: int
    """How many were not told."""
    rewound: str
    """Why the state went back meanwhile; "" if it did not."""
    next: Cell


class Place(NamedTuple):
    """A place in the ring: the state that everything before the cell `next` led to."""

    fold: Snapshot
    next: Cell


class Ring:
    """See the module."""

    def __init__(self) -> None:
        self._tail = Cell()
        # The cells that hold a group, oldest first. They are not kept: one that all subscribers
        # have read is gone, and so are those before it.
        self._window: deque[weakref.ref[Cell]] = deque()
        self.newest: Place | None = None
        """Where the last group led to. None while nobody is subscribed."""

    def __len__(self) -> int:
        """The most groups that may wait for a subscriber now."""
        return len(self._window)

    @property
    def tail(self) -> Cell:
        """The cell of the next group."""
        cell = self._tail
        while isinstance(cell.content, Group):  # its publisher was interrupted, or is not yet done
            cell = cell.content.next
        return cell

    def append(self, group: Group) -> Place:
        """Add a group. Returns the place after it, to be given to `advance`."""
        cell = self._tail
        if cell.content is not None:
            cell = self.tail
        group.next = after = cell.after(group)
        self._window.append(weakref.ref(cell))
        cell.content = group  # from here on it can be read
        self._tail = after
        return _new(Place, (group.fold, after))

    def advance(self, newest: Place) -> None:
        """Everything before `newest` has been told. Take out what is over the bounds."""
        self.newest = newest
        window, tail = self._window, newest.next
        while window:
            cell = window[0]()
            if cell is not None:
                if len(window) == 1 or (
                    len(window) <= RING_GROUPS
                    and tail.updates - cell.updates <= RING_UPDATES
                    and tail.size - cell.size <= RING_BYTES
                ):
                    return
                cell.content = EVICTED
            window.popleft()

    def lost_since(self, cell: Cell) -> Lost | None:
        """What to tell to whom the group of `cell` was taken away. None if nobody is subscribed any
        more."""
        newest = self.newest
        if newest is None:
            return None
        tail = newest.next
        rewound, rewound_at = tail.rewind
        if rewound_at < cell.number:
            rewound = ""
        return Lost(newest.fold, tail.batches - cell.batches, rewound, tail)

    def forget(self) -> None:
        """Nobody is subscribed: release the newest state. Only the publisher calls it, or whoever
        comes after the last group."""
        self.newest = None
        self._window.clear()
