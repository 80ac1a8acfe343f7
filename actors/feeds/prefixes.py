"""Who sleeps until a key under a prefix changes.

A sleeper leaves a spot under its prefix. Whoever tells of a group looks up the prefixes of the keys
that changed, and wakes only the sleepers whose prefix is among them. So the cost of a group depends
on its keys and on how many lengths of prefix there are, but not on how many sleep.

A spot also tells the sleeper what it may skip. As long as it is not released, no group that was
told of has changed anything under the prefix.

One thread at a time tells; any thread may join or leave, and may be interrupted doing so. Telling
may be interrupted too: the next group that is told then has unknown steps, and wakes all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import TypeVar

from foldlog.actors.feeds.ring import Group, Place
from foldlog.protocol.messages import plain

T = TypeVar("T")

REFRESH = 1024
"""Looks after which lengths that no prefix has any more are forgotten."""


class Spot:
    """A sleeper's place in the index, used once."""

    __slots__ = ("admitted", "before", "left", "prefix", "released", "wake")

    def __init__(self, prefix: str, wake: Callable[[], object]) -> None:
        self.prefix, self.wake = plain(prefix), wake
        self.before: Place | None = None
        """Set when it is released: the place before the group that did it. None if unknown."""
        self.released = False
        self.admitted = self.left = False

    def release(self, before: Place | None) -> None:
        if not self.released:
            self.before = before
            self.released = True
        self.wake()


class PrefixIndex:
    """See the module."""

    def __init__(self) -> None:
        self.told: Place | None = None
        """Everything before it has been told. Replaced after the sleepers were woken."""
        # Joining and leaving are left to the teller: one owner, and so no lock.
        self._joined: dict[Spot, None] = {}
        self._left: dict[Spot, None] = {}
        self._parked: dict[str, dict[Spot, None]] = {}
        self._lengths: set[int] = set()
        self._until_refresh = REFRESH

    def join(self, prefix: str, wake: Callable[[], object]) -> Spot:
        """Call `wake` once, when a key under `prefix` has changed, or anything may have. Look at
        the ring after this: a group may have come just before."""
        spot = Spot(prefix, wake)
        self._joined[spot] = None
        return spot

    def leave(self, spot: Spot) -> None:
        """Forget the sleeper."""
        spot.left = True  # first: `_admit` sets `admitted`, then looks at this
        self._joined.pop(spot, None)
        if spot.admitted and not spot.released:
            self._left[spot] = None

    def tell(self, group: Group, after: Place) -> None:
        """Wake those whose prefix `group` touches, or all if its steps are unknown. `after` is the
        place after the group."""
        if self._joined or self._left:
            self._admit()
        if self._parked:
            before = self.told
            if before is None or not group.follows(before.fold.seq):
                self.wake_all()
            else:
                for prefix in self._touched(group.keys):
                    self._release(prefix, before)
        self.told = after

    def tell_run(self, groups: Sequence[Group]) -> Place:
        """`tell` for groups that were published one after another. Returns the place after them.

        Those that touch no prefix take one look together, which costs a third.
        """
        last = groups[-1]
        after = Place(last.fold, last.next)
        if self._joined or self._left:
            self._admit()
        if not self._parked or self._is_untouched_by(groups):
            self.told = after
        else:
            for group in groups:
                self.tell(group, Place(group.fold, group.next))
        return after

    def _is_untouched_by(self, groups: Sequence[Group]) -> bool:
        if self.told is None or "" in self._parked:
            return False
        seq = self.told.fold.seq
        for group in groups:
            if not group.follows(seq):
                return False
            seq = group.fold.seq
        return not self._touched(chain.from_iterable(group.keys for group in groups))

    def wake_all(self) -> None:
        """Wake all sleepers: the steps that follow are not known."""
        self._admit()
        for prefix in listed(self._parked):
            self._release(prefix, self.told)
        self._lengths = set()

    def _release(self, prefix: str, before: Place | None) -> None:
        for spot in self._parked[prefix]:
            spot.release(before)
        del self._parked[prefix]  # last: if this is interrupted, no sleeper is forgotten

    def _admit(self) -> None:
        for spot in listed(self._joined):
            spot.admitted = True
            if not spot.left:
                self._lengths.add(len(spot.prefix))
                self._parked.setdefault(spot.prefix, {})[spot] = None
            self._joined.pop(spot, None)  # last, see `_release`
        for spot in listed(self._left):
            spots = self._parked.get(spot.prefix)
            if spots is not None:
                spots.pop(spot, None)
                if not spots:
                    del self._parked[spot.prefix]
            self._left.pop(spot, None)

    def _touched(self, columns: Iterable[Collection[str]]) -> set[str]:
        """The prefixes of the keys in all columns that someone sleeps under."""
        parked = self._parked
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._until_refresh, self._lengths = REFRESH, set(map(len, parked))
        touched: set[str] = set()
        keys = set().union(*columns)
        for length in self._lengths:
            if not length:
                touched.update(("",) if "" in parked else ())
                continue
            touched.update([prefix for key in keys if (prefix := key[:length]) in parked])
        return touched


def listed(items: Iterable[T]) -> tuple[T, ...]:
    """What is in a dict that other threads, or a garbage collection meanwhile, may change."""
    while True:
        try:
            return tuple(items)
        except RuntimeError:  # it changed size during the iteration
            continue
