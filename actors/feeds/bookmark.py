"""A bookmark: how far one subscriber has read in the ring, and how it is woken."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized

from foldlog.actors.feeds.prefixes import PrefixIndex, Spot
from foldlog.actors.feeds.ring import Cell, Group, Lost, Place, Ring
from foldlog.protocol.engine import Snapshot
from foldlog.storage.handover import RECHECK_S, Wakeup

RECHECK_EACH_S = 0.003
"""Sleeping subscribers look now and then whether they were forgotten: so many together do not do
that more often than this."""


class Bookmark:
    """What one subscriber has yet to read. One thread at a time reads it, any may end it; the
    publisher never waits for either."""

    def __init__(self, prefix: str = "", wake: Callable[[], object] | None = None) -> None:
        """`wake` is called by the publisher, and must never block. None: the reader sleeps in
        `first`."""
        self.prefix = prefix
        self._wakeup = Wakeup()
        self.wake = self._wakeup.set if wake is None else wake
        self.cell = Cell()
        """The first group that was not read."""
        self.ended: str | None = None
        """Why nothing more will come; None while it may. What already waits is still delivered."""
        self.deadline: float | None = None
        """The deadline of the subscriber's current call (time.monotonic())."""
        self.is_dropped = False
        """What waits is not to be delivered."""
        self._until = 0
        """Groups before this number waited when that call began. They are delivered however short
        its timeout."""
        self._ring = Ring()
        self._index = PrefixIndex()
        self._crowd: Sized = ()
        self._spot: Spot | None = None
        self._may_skip = False
        """True if the next group had not been published when the spot was taken: then the spot
        misses none. Otherwise, the groups are read one by one."""

    def place(self, ring: Ring, index: PrefixIndex, crowd: Sized = ()) -> None:
        """Begin with what is published from here on. `index` wakes it; `crowd` are those who sleep
        beside it."""
        self._ring, self._index, self._crowd = ring, index, crowd
        self.cell = ring.tail

    def __len__(self) -> int:
        """The number of groups that wait."""
        spot = self._spot  # any thread may call this, while the reader replaces it
        if spot is not None and not spot.released and self._place_of(spot) is not None:
            return 0  # none of them changes anything under the prefix
        return max(min(self._ring.tail.number - self.cell.number, len(self._ring)), 0)

    def begin(self, deadline: float | None) -> None:
        """A call begins that ends at `deadline`."""
        self.deadline = deadline
        self._until = 0 if deadline is None else self._ring.tail.number

    def start_at(self, fold: Snapshot) -> None:
        """Forget what was published before `fold`, the subscriber's initial state."""
        cell = self.cell
        while isinstance(group := cell.content, Group):
            cell = group.next
            if group.fold is fold:
                self.cell = cell
                return

    def first(self) -> Group | Lost | Place | None:
        """What comes next, waiting for it until the deadline. None if nothing came or the feed is
        over. It stays until `drop`.

        A Place: nothing before it changes anything under the prefix.
        """
        while True:
            ended = self.ended  # first: a last group may come just before the end
            source = self._waiting()
            if source is not None:
                return source
            if ended is not None:
                return None
            rest = max(RECHECK_S, len(self._crowd) * RECHECK_EACH_S)
            if self.deadline is not None:
                rest = min(rest, self.deadline - time.monotonic())
                if rest <= 0:
                    return None
            self.sleep(rest)

    def _waiting(self) -> Group | Lost | Place | None:
        passed = self._passed()
        if passed is not None:
            return passed
        content = self.cell.content
        if content is None or isinstance(content, Group):
            return content
        return self._ring.lost_since(self.cell)

    def _passed(self) -> Place | None:
        """The place up to which nothing under the prefix has changed, if that is further on."""
        spot = self._spot
        if spot is None:
            return None
        place = self._place_of(spot)
        if place is None and spot.released:
            self._spot = None
        return place

    def _place_of(self, spot: Spot) -> Place | None:
        told = self._index.told  # first: the spot is released before this moves past the change
        place = spot.before if spot.released else told
        if self._may_skip and place is not None and place.next.number > self.cell.number:
            return place
        return None

    def join(self) -> None:
        """Be woken by the next change under the prefix. Look again after this."""
        spot = self._spot
        if spot is None or spot.released:
            self._may_skip = False
            self._spot = self._index.join(self.prefix, self.wake)
        if self.cell.content is None:
            self._may_skip = True

    def sleep(self, timeout_s: float) -> None:
        """Sleep until something may have come, up to `timeout_s`."""
        self.join()
        if self._waiting() is None and self.ended is None:
            self._wakeup.wait(timeout_s)

    def drop(self, told: Group | Lost | Place) -> None:
        """It was delivered in full."""
        if told.next.number > self.cell.number:
            self.cell = told.next
            if self.is_dropped:  # by another thread, between the two lines
                self._discard()

    @property
    def has_more(self) -> bool:
        """True if anything waits."""
        return self.cell.content is not None

    @property
    def is_late(self) -> bool:
        """True if the deadline has passed and all that waited before the call is delivered."""
        return (
            self.deadline is not None
            and self.cell.number >= self._until
            and time.monotonic() >= self.deadline
        )

    def end(self, reason: str, *, drop: bool = False) -> None:
        """Nothing more will come. With `drop`, what waits is discarded."""
        self.ended = self.ended or reason
        if drop:
            self.is_dropped = True
            self._discard()
            self.leave()
        self.wake()

    def _discard(self) -> None:
        self.cell = Cell(sys.maxsize)

    def leave(self) -> None:
        """Do not be woken any more."""
        spot, self._spot = self._spot, None
        if spot is not None:
            self._index.leave(spot)

    def after_fork(self, reason: str) -> None:
        """In a forked child, where nobody publishes."""
        self._wakeup = Wakeup()
        self._spot = None
        self.is_dropped = True
        self._discard()
        self.ended = self.ended or reason
