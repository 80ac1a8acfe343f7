"""A subscription: the events of one subscriber, in order, made from immutable snapshots."""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TypeAlias

from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.prefixes import PrefixIndex
from foldlog.actors.feeds.ring import Group, Lost, Place
from foldlog.protocol.engine import Past, Snapshot
from foldlog.protocol.errors import CursorExpired, FoldlogError, ReentrantCall, is_own_fault
from foldlog.protocol.events import Changed, Event, Lagged, Rewound, Synced
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import CursorLike, WatchCursor, as_cursor
from foldlog.protocol.updates import DecodedBatch, Put
from foldlog.storage.handover import discard, is_over

Since: TypeAlias = CursorLike | Snapshot | None

_getframe = sys._getframe


class Part:
    """A stretch of events that leads to one fold, and how many of them were delivered.

    Events come from generators, and a generator is dead once an exception has passed through it.
    So the position is kept beside it, and an interrupted part is remade from there.
    """

    def __init__(
        self,
        make: Callable[[int, Event | None], Iterator[Event]],
        fold: Snapshot,
        source: Group | Lost | None = None,
    ) -> None:
        """`make` gives the events after a count, given that count and the last event before it."""
        self._make, self.fold, self.source = make, fold, source
        self._events: Iterator[Event] | None = None
        self._made = 0
        self.told = 0
        self._offered: Event | None = None
        self._last: Event | None = None

    def offer(self) -> Event | None:
        """The next event; the same again until it is accepted. None at the end."""
        # If this is interrupted, the generator is not used again.
        events, self._events = self._events, None
        if events is None or self._made != self.told:
            events = self._make(self.told, self._last)
            self._made = self.told
        self._offered = event = next(events, None)
        self._made += 1
        self._events = events
        return event

    def accept(self) -> None:
        """The offered event has reached its subscriber."""
        self._last = self._offered
        self.told += 1


class Subscription:
    """The events of one subscriber. One thread reads them; any thread may close."""

    def __init__(
        self,
        feeds: Feeds,
        current: Callable[[], Snapshot],
        prefix: str,
        since: Since,
        bookmark: Bookmark | None = None,
        index: PrefixIndex | None = None,
    ) -> None:
        """CursorExpired if the log does not reach back to `since`. A subscription holds no
        reference to the store. `index` wakes it: see `Feeds.add`."""
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
        if since is not None and not isinstance(since, Snapshot):
            since = as_cursor(since)
        self.bookmark = Bookmark(prefix) if bookmark is None else bookmark
        self.feeds = feeds
        self._prefix = prefix
        self._line: deque[object] = deque()
        """The frames that read or wait to read."""
        self.ended: str | None = None
        """Why it is over; None while there may be events."""
        if bookmark is None:
            # First: if this is interrupted, the bookmark goes with it. One that is given may hold
            # the subscription, and would then keep it alive.
            weakref.finalize(self, feeds.remove, self.bookmark).atexit = False
        try:
            # Added first, so that nothing published while the start is read is missed.
            feeds.add(self.bookmark, index)
            at = current()
            make = _start(feeds.past, at, prefix, since)
            self.bookmark.start_at(at)
        except BaseException:
            feeds.remove(self.bookmark)
            raise
        # Everything up to `_at` was delivered, always: so a difference from it is exact.
        self._at: Snapshot | None = at
        self._part: Part | None = Part(make, at)

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over."""
        event = self.offer(timeout_s)
        if event is not None:
            self.accept()
        return event

    def accept(self) -> None:
        """The offered event has reached the subscriber. Until then it is offered again."""
        part = self._part
        if part is not None:
            part.accept()

    def offer(self, timeout_s: float | None) -> Event | None:
        """`next`, but the event is yet to be accepted. ReentrantCall if a read is in progress."""
        line = self._line
        try:
            line.append(_getframe())
            while (first := line[0]) is not _getframe():
                # In a forked child, the frame may be of a thread that is not there.
                if not is_over(first) and not self.bookmark.is_dropped:
                    raise ReentrantCall("the watch is being read already")
                discard(line, first)
                del first
            if timeout_s is not None:
                timeout_s = time.monotonic() + check_timeout(timeout_s)
            self.bookmark.begin(timeout_s)
            return self._offer()
        except (OSError, FoldlogError) as error:
            # A snapshot whose file was overwritten cannot be read.
            if is_own_fault(error) and not isinstance(error, ReentrantCall):
                self.close(f"the difference cannot be told: {error}")
            raise
        finally:
            first = None
            discard(line, _getframe())

    def _offer(self) -> Event | None:
        while True:
            part, at = self._part, self._at
            if at is None or self.ended is not None:
                self._part = self._at = None  # set again, if it was closed during a read
                return None
            if part is None:
                source = self.bookmark.first()
                if source is None:
                    if self.bookmark.ended is not None and not self.bookmark.has_more:
                        self.close(self.bookmark.ended)
                    return None
                if self._passes(source, at):
                    if self.bookmark.is_late:
                        return None
                    continue
                assert not isinstance(source, Place)
                part = self._part = _part_of(self.feeds.past, source, at, self._prefix)
            event = part.offer()
            if event is not None:
                return event
            self._end(part, at)
            if not part.told and self.bookmark.is_late:
                return None

    def _passes(self, source: Group | Lost | Place, at: Snapshot) -> bool:
        """True if there is nothing to tell: nothing under the prefix has changed. One look."""
        if isinstance(source, Lost):
            return False
        if isinstance(source, Group) and (
            source.fold.seq <= at.seq or not source.follows(at.seq) or source.touches(self._prefix)
        ):
            return False
        if source.fold.seq >= at.seq:
            self._at = source.fold
        self.bookmark.drop(source)
        return True

    def _end(self, part: Part, at: Snapshot) -> None:
        """The part is delivered. Each step may be repeated if this is interrupted."""
        source = part.source
        if isinstance(source, Lost) or (source and source.rewound) or part.fold.seq >= at.seq:
            # Even if nothing differs: the fold may be in a newer file, releasing the older one.
            self._at = part.fold
        if source is not None:
            self.bookmark.drop(source)
        self._part = None

    def close(self, reason: str = "closed by its subscriber") -> None:
        """Stop listening. Waiting events are dropped."""
        self.ended = self.ended or reason
        self._part = self._at = None  # releases the snapshot
        self.feeds.remove(self.bookmark)
        self.bookmark.end(reason, drop=True)


def _start(
    past: Past, at: Snapshot, prefix: str, since: WatchCursor | Snapshot | None
) -> Callable[[int, Event | None], Iterator[Event]]:
    synced = Synced(at.cursor(), at.seq)
    if isinstance(since, Snapshot):
        return _again(lambda: chain(_difference(past, since, at, prefix), (synced,)))
    if since is None or since.is_none:

        def state(told: int, last: Event | None) -> Iterator[Event]:
            if isinstance(last, Synced):
                return iter(())
            after = last.update.key if isinstance(last, Changed) else None
            entries = chain.from_iterable(at.blocks(prefix, after))
            return chain(
                (Changed(Put(*entry), at.cursor(), at.seq) for entry in entries), (synced,)
            )

        return state

    def changes() -> Iterator[Event]:
        batches = past.batches_since(at, since)
        if batches is None:
            raise CursorExpired(
                f"cursor {since.shown} is not in the log any more: it was compacted, or never there"
            )
        return chain(
            (event for seq, batch in batches for event in _changes(seq, batch, prefix)), (synced,)
        )

    begun = [changes()]  # raises its errors now
    return _again(lambda: begun.pop() if begun else changes())


def _again(make: Callable[[], Iterator[Event]]) -> Callable[[int, Event | None], Iterator[Event]]:
    """Events remade from the beginning, skipping those already delivered."""
    return lambda told, last: islice(make(), told, None)


def _part_of(past: Past, source: Group | Lost, at: Snapshot, prefix: str) -> Part:
    return Part(_again(lambda: _told(past, source, at, prefix)), source.fold, source)


def _told(past: Past, taken: Group | Lost, at: Snapshot, prefix: str) -> Iterator[Event]:
    """The events of a group for a subscriber that is at `at`."""
    fold = taken.fold
    if isinstance(taken, Lost) or taken.rewound:
        if isinstance(taken, Lost):
            yield Lagged(at.cursor(), taken.batches)
        if taken.rewound:
            yield Rewound(taken.rewound)
        yield from _difference(past, at, fold, prefix)
        yield Synced(fold.cursor(), fold.seq)
    elif fold.seq <= at.seq:
        return  # published before the initial state, or a compaction
    elif len(taken) and taken.first_seq <= at.seq + 1:
        for seq, changes in taken.events:
            if seq > at.seq:
                yield from (each for each in changes if each.update.key.startswith(prefix))
    else:
        yield from _difference(past, at, fold, prefix)


def _difference(past: Past, old: Snapshot, new: Snapshot, prefix: str) -> Iterator[Event]:
    return (Changed(update, new.cursor(), new.seq) for update in past.difference(old, new, prefix))


def _changes(seq: int, batch: DecodedBatch, prefix: str) -> Iterator[Event]:
    if prefix and not any(key.startswith(prefix) for key in batch.keys):
        return
    for update in batch.updates():
        if update.key.startswith(prefix):
            yield Changed(update, batch.cursor, seq)
