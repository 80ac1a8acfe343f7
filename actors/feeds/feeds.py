"""Feeds: tell subscribers of changes without ever delaying the writer.

The writer adds each published commit group to one ring, whatever the number of subscribers, and
wakes those who sleep and whose prefix it touches. The rest (filtering, decoding, the initial state,
the difference after a lag) is done on the subscriber's side, from immutable snapshots. A subscriber
that is too slow loses groups but not its place. It is told `Lagged`, and then the exact difference
between the last snapshot it saw and the current one. So memory is bounded, and only intermediate
steps are missed.

    Feeds          the subscriptions of a store or a follower
                   fed by the writer or the follower's thread
    Ring           the last groups, once for all (ring.py)
    Bookmark       how far one subscriber has read (bookmark.py)
    PrefixIndex    who is to be woken by what (prefixes.py)
    Subscription   the events of one subscriber, in order (subscription.py)
                   read by one thread: a Watch's, or the dispatcher's for an actor (dispatcher.py)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.dispatcher import Dispatcher
from foldlog.actors.feeds.prefixes import PrefixIndex, listed
from foldlog.actors.feeds.ring import Group, Ring
from foldlog.protocol.engine import Past, Snapshot
from foldlog.protocol.updates import Batch, DecodedBatch
from foldlog.storage.engines.append_log.past import LogPast
from foldlog.storage.forks import Rank, tell_after_fork


class Waiter:
    """Waits until a published state satisfies a condition."""

    __slots__ = ("__weakref__", "is_reached", "wake")

    def __init__(self, is_reached: Callable[[Snapshot], bool], wake: Callable[[], object]) -> None:
        """Both are called by the publisher: they must be quick, and never block or raise."""
        self.is_reached, self.wake = is_reached, wake


class Feeds:
    """The subscriptions of one store or follower."""

    def __init__(self) -> None:
        self.past: Past = LogPast()
        """The source of the past of the snapshots: a store's writer puts its engine here."""
        self._subscribed: dict[Bookmark, None] = {}
        self._waiters: dict[weakref.ref[Waiter], None] = {}
        self._ring = Ring()
        self._index = PrefixIndex()
        self.dispatcher = Dispatcher(self._ring, self._index)
        """Serves the subscribed actors."""
        self.ended: str | None = None
        """Why nothing more will be published; None while it may."""
        self.refusal: Exception | None = None
        """Why nothing can be published now, where waiting makes no sense."""
        tell_after_fork(self, Rank.FEEDS)

    @property
    def bookmarks(self) -> tuple[Bookmark, ...]:
        """Of all subscriptions."""
        return listed(self._subscribed)

    @property
    def wanted(self) -> bool:
        """True if anyone is subscribed, or waits for a state."""
        return bool(self._subscribed or self._waiters)

    @property
    def has_subscribers(self) -> bool:
        """True if anyone is subscribed, and so told of each batch."""
        return bool(self._subscribed)

    @property
    def backlog(self) -> tuple[int, ...]:
        """The number of waiting groups, for each subscription."""
        return tuple(map(len, self.bookmarks))

    def publish(
        self,
        fold: Snapshot,
        first_seq: int,
        batches: Sequence[Batch | DecodedBatch],
        size: int | None = None,
    ) -> None:
        """Publish a commit group of `size` encoded bytes (None: of encoded batches, their own).

        Cost: the same for any number of subscribers, plus a wake-up for each that sleeps and whose
        prefix it touches.
        """
        if self._subscribed:
            self._push(Group(fold, first_seq, batches, size))
        elif self._ring.newest is not None:
            self._forget()
        if self._waiters:
            self._wake_reached(fold)

    def jump(self, fold: Snapshot, rewound: str = "") -> None:
        """Publish that the state is `fold`: reached by unknown steps, or the same as before but in
        another file."""
        if self._subscribed:
            self._push(Group(fold, 0, (), 0, rewound))
        else:
            self._forget()
        self._wake_reached(fold)

    def _push(self, group: Group) -> None:
        after = self._ring.append(group)
        self._index.tell(group, after)
        self._ring.advance(after)

    def _forget(self) -> None:
        self._ring.forget()
        self._index.told = None

    def _wake_reached(self, fold: Snapshot) -> None:
        for ref in listed(self._waiters):
            waiter = ref()
            if waiter is not None and waiter.is_reached(fold):
                waiter.wake()

    def add(self, bookmark: Bookmark, index: PrefixIndex | None = None) -> None:
        """Give `bookmark` everything published from here on. `index` wakes it, if it is not that of
        the publisher."""
        self._subscribed[bookmark] = None  # first: nothing is published unless someone wants it
        bookmark.place(self._ring, self._index if index is None else index, self._subscribed)
        # Checked after adding: `end` sets it before it looks at the bookmarks.
        if self.ended is not None:
            self.remove(bookmark)
            bookmark.end(self.ended)

    def remove(self, bookmark: Bookmark) -> None:
        """Give `bookmark` nothing more."""
        self._subscribed.pop(bookmark, None)
        bookmark.leave()
        if self.ended is not None and not self._subscribed:
            self._forget()

    def add_waiter(self, waiter: Waiter) -> None:
        """Wake `waiter` by each state that it waits for, and at the end; for as long as the caller
        holds it. So one that is interrupted, wherever that is, leaves nothing behind."""
        self._waiters[weakref.ref(waiter, self._waiters.pop)] = None
        if self.ended is not None:
            waiter.wake()

    def refuse_waiters(self, error: Exception) -> None:
        """For as long as it is the `refusal`, waiters fail with `error`."""
        self.refusal = error
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        for ref in listed(self._waiters):
            waiter = ref()
            if waiter is not None:
                waiter.wake()

    def end(self, reason: str) -> None:
        """End all subscriptions, current and future. What waits is still delivered."""
        self.ended = reason
        self.past = LogPast()
        for bookmark in self.bookmarks:
            bookmark.end(reason)
        self._wake_waiters()
        if not self._subscribed:
            self._forget()

    def look_after(self) -> None:
        """See `Dispatcher.look_after`."""
        self.dispatcher.look_after()

    def after_fork(self) -> None:
        self.ended = "the process was forked: nobody tells of changes here"
        for bookmark in self.bookmarks:
            self._subscribed.pop(bookmark, None)
            bookmark.after_fork(self.ended)
        self._waiters.clear()
        self._forget()
        self.dispatcher.after_fork()
