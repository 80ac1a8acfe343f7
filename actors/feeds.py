"""Feeds: who is told of changes, and how, without ever holding up the writer.

The writer hands each published commit group to every subscription: one append to a bounded buffer. The rest (filtering,
decoding, the state at the start, the difference after a lag) is done on the subscriber's side, from immutable snapshots. A
subscriber that is too slow loses its buffer, not its place: it is told `Lagged`, and then the exact difference between the
snapshot that it had seen and the present one. So it costs bounded memory, and misses nothing but steps in between.

    Feeds         the subscriptions of a store or a follower        told by: the writer, or the follower's thread
    Buffer        the groups that wait for one subscriber           filled by these, emptied by the subscriber
    Subscription  the events of one subscriber, in order            read by one thread: a Watch's, or a Delivery's (delivery.py)
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from foldlog.protocol.errors import CursorExpired, FoldlogError
from foldlog.protocol.events import Changed, Event, Lagged, Rewound, Synced
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, Put, batches_body, decode_batches
from foldlog.storage.fold.diff import diff
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.backlog import batches_since

BUFFER_GROUPS = 1024
"""Commit groups that wait for a subscriber before it lags."""
BUFFER_UPDATES = 32_768
"""Updates in them: what a fold settles as one, so that waiting groups hold no more than two versions of each of its pieces."""
BUFFER_BYTES = 16 * 1024 * 1024
"""What they may hold, encoded. One group always fits, whatever its size."""

Since: TypeAlias = WatchCursor | FoldSnapshot | None


class Group:
    """A commit group that was published; or, without batches, a state that was reached by steps that are not known."""

    __slots__ = ("_batches", "_decoded", "first_seq", "fold", "rewound", "size", "updates")

    def __init__(
        self,
        fold: FoldSnapshot,
        first_seq: int,
        batches: Sequence[Batch | DecodedBatch],
        size: int,
        rewound: str = "",
    ) -> None:
        self.fold, self.first_seq, self.size, self.rewound = fold, first_seq, size, rewound
        self.updates = sum(
            batch.length if isinstance(batch, Batch) else len(batch.keys) for batch in batches
        )
        self._batches = batches
        self._decoded: list[DecodedBatch] | None = None

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    @property
    def batches(self) -> Sequence[DecodedBatch]:
        """The batches with their updates in order. Decoded on the first call, for all subscribers."""
        if self._decoded is None:
            self._decoded = [
                decode_batches(batches_body((batch.item,)))[0]
                if isinstance(batch, Batch)
                else batch
                for batch in self._batches
            ]
        return self._decoded


class Buffer:
    """What waits for one subscriber."""

    def __init__(self) -> None:
        # Reentrant, all locks here: a collection of garbage within may close what is dropped.
        self._changed = threading.Condition(threading.RLock())
        self._groups: deque[Group] = deque()
        self._updates = self._bytes = 0
        self._lost: Lost | None = None
        self.ended: str | None = None
        """Why nothing more will come; None while it may. What waits is still told."""
        self.deadline: float | None = None
        """Of the subscriber's present call (time.monotonic())."""
        self.waited_before = 0
        """Groups that waited when that call began, and do still: they are told, however little time it gives."""

    def __len__(self) -> int:
        """Groups that wait."""
        return len(self._groups)

    def push(self, group: Group) -> None:
        """Add what was published. Past the bounds, everything that waits is dropped, and only its end is remembered."""
        with self._changed:
            self._groups.append(group)
            self._updates += group.updates
            self._bytes += group.size
            over = (
                len(self._groups) > BUFFER_GROUPS
                or self._updates > BUFFER_UPDATES
                or self._bytes > BUFFER_BYTES
            )
            if over and len(self._groups) > 1:
                lost = self._lost or Lost(group.fold, 0, "")
                batches = lost.batches + sum(map(len, self._groups))
                rewound = [waiting.rewound for waiting in self._groups if waiting.rewound]
                self._lost = Lost(group.fold, batches, rewound[-1] if rewound else lost.rewound)
                self._clear()
            self._changed.notify()

    def _clear(self) -> None:
        self._groups.clear()
        self._updates = self._bytes = 0

    def start_at(self, fold: FoldSnapshot) -> None:
        """Forget what was published before `fold`, which the subscriber begins with."""
        with self._changed:
            if any(group.fold is fold for group in self._groups):
                while self._groups[0].fold is not fold:
                    self._drop_first()
                self._drop_first()

    def _drop_first(self) -> Group:
        group = self._groups.popleft()
        self.waited_before -= 1
        self._updates -= group.updates
        self._bytes -= group.size
        return group

    def take(self) -> Group | Lost | None:
        """What comes next, waiting for it until the deadline. None: nothing came, or it is over."""
        with self._changed:
            if not self._groups and self._lost is None and self.ended is None:
                rest = None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)
                self._changed.wait_for(
                    lambda: self._groups or self._lost is not None or self.ended is not None, rest
                )
            if self._lost is not None:
                lost, self._lost = self._lost, None
                return lost
            return self._drop_first() if self._groups else None

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed, and all is told that waited before."""
        return (
            self.deadline is not None
            and self.waited_before <= 0
            and time.monotonic() >= self.deadline
        )

    def end(self, reason: str, *, drop: bool = False) -> None:
        """Nothing more will come. With `drop`, nor is told what waits."""
        with self._changed:
            if drop:
                self._clear()
                self._lost = None
            self.ended = self.ended or reason
            self._changed.notify_all()

    def after_fork(self, reason: str) -> None:
        """In a forked child, where nobody publishes, and the lock may be held for ever."""
        self._changed = threading.Condition(threading.RLock())
        self._clear()
        self._lost = None
        self.ended = self.ended or reason


class Lost:
    """Groups were dropped; this is the last of them."""

    __slots__ = ("batches", "fold", "rewound")

    def __init__(self, fold: FoldSnapshot, batches: int, rewound: str) -> None:
        self.fold, self.batches, self.rewound = fold, batches, rewound


class Feeds:
    """The subscriptions of one store or follower."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Replaced whole under the lock, read without it by whoever publishes.
        self._buffers: tuple[Buffer, ...] = ()
        self._ended: str | None = None
        _all_feeds.add(self)

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return bool(self._buffers)

    def publish(
        self, fold: FoldSnapshot, first_seq: int, batches: Sequence[Batch | DecodedBatch], size: int
    ) -> None:
        """Tell of a commit group, `size` bytes encoded. Cost: an append for each subscription."""
        if self._buffers:
            self._push(Group(fold, first_seq, batches, size))

    def jump(self, fold: FoldSnapshot, rewound: str = "") -> None:
        """Tell that the state is `fold`: by steps that are not known, or the same as before, in another file."""
        if self._buffers:
            self._push(Group(fold, 0, (), 0, rewound))

    def _push(self, group: Group) -> None:
        for buffer in self._buffers:
            buffer.push(group)

    def add(self, buffer: Buffer) -> None:
        """Let `buffer` have all that is published from here on."""
        with self._lock:
            if self._ended is None:
                self._buffers = (*self._buffers, buffer)
                return
        buffer.end(self._ended)

    def remove(self, buffer: Buffer) -> None:
        """Let `buffer` have nothing more."""
        with self._lock:
            self._buffers = tuple(other for other in self._buffers if other is not buffer)

    def end(self, reason: str) -> None:
        """End all subscriptions, and those to come."""
        with self._lock:
            self._ended = reason
            buffers, self._buffers = self._buffers, ()
        for buffer in buffers:
            buffer.end(reason)

    def after_fork(self) -> None:
        self._lock = threading.RLock()
        self._ended = "the process was forked: nobody tells of changes here"
        buffers, self._buffers = self._buffers, ()
        for buffer in buffers:
            buffer.after_fork(self._ended)


_all_feeds: weakref.WeakSet[Feeds] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for feeds in list(_all_feeds):
        feeds.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Subscription:
    """The events of one subscriber. One thread reads them; any thread may close."""

    def __init__(
        self, feeds: Feeds, current: Callable[[], FoldSnapshot], prefix: str, since: Since
    ) -> None:
        """CursorExpired if the log does not reach back to `since`. It does not keep the store from being dropped."""
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
        if since is not None and not isinstance(since, (WatchCursor, FoldSnapshot)):
            raise TypeError(f"since is a WatchCursor or a FoldSnapshot, not {type(since).__name__}")
        self.buffer = Buffer()
        self.feeds = feeds
        feeds.add(
            self.buffer
        )  # first: what is published while the start is read must not fall between
        try:
            at = current()
            start = _start(at, prefix, since)
        except BaseException:
            feeds.remove(self.buffer)
            raise
        self.buffer.start_at(at)
        self._events: Iterator[Event | None] = _events(self.buffer, at, start, prefix)
        self.ended: str | None = None
        """Why it is over; None while there may be events."""

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over."""
        if timeout_s is not None:
            timeout_s = time.monotonic() + check_timeout(timeout_s)
        self.buffer.deadline = timeout_s
        self.buffer.waited_before = len(self.buffer)
        try:
            return next(self._events)
        except StopIteration:
            self._finish(self.buffer.ended or "over")
        except (
            OSError,
            FoldlogError,
        ) as error:  # a snapshot whose file was overwritten does not read
            self._finish(f"the difference cannot be told: {error}")
            raise
        return None

    def _finish(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._events = iter(())  # and with it, the snapshot
        self.feeds.remove(self.buffer)
        self.buffer.end(reason, drop=True)

    def close(self, reason: str = "closed by its subscriber") -> None:
        """Listen no more. Events that wait are dropped."""
        self._finish(reason)


def _start(at: FoldSnapshot, prefix: str, since: Since) -> Iterator[Event]:
    if isinstance(since, FoldSnapshot):
        return _difference(since, at, prefix)
    if since is None or since.is_none:
        return (
            Changed(Put(*entry), at.cursor(), at.seq)
            for block in at.blocks(prefix)
            for entry in block
        )
    batches = batches_since(at, since)
    if batches is None:
        raise CursorExpired(
            f"cursor {since.shown} is not in the log any more: it was compacted, or never there"
        )
    return (event for seq, batch in batches for event in _changes(seq, batch, prefix))


def _events(
    buffer: Buffer, at: FoldSnapshot, start: Iterator[Event], prefix: str
) -> Iterator[Event | None]:
    """What was told reaches up to `at`, always: with it, a difference is exact."""
    yield from start
    del start
    yield Synced(at.cursor(), at.seq)
    while True:
        taken = buffer.take()
        if taken is None:
            if buffer.ended is not None and not len(buffer):
                return
            yield None
            continue
        told = False
        for event in _told(taken, at, prefix):
            yield event
            told = True
        if isinstance(taken, Lost) or taken.rewound or taken.fold.seq >= at.seq:
            at = (
                taken.fold
            )  # also if nothing differs: it may stand in a newer file, and let go of the older one
        del taken
        if not told and buffer.is_late:
            yield None


def _told(taken: Group | Lost, at: FoldSnapshot, prefix: str) -> Iterator[Event]:
    """What a subscriber that was told up to `at` is told of a group."""
    fold = taken.fold
    if isinstance(taken, Lost) or taken.rewound:
        if isinstance(taken, Lost):
            yield Lagged(at.cursor(), taken.batches)
        if taken.rewound:
            yield Rewound(taken.rewound)
        yield from _difference(at, fold, prefix)
        yield Synced(fold.cursor(), fold.seq)
    elif fold.seq <= at.seq:
        return  # published before the state that this began with, or a compaction
    elif len(taken) and taken.first_seq <= at.seq + 1:
        for seq, batch in enumerate(taken.batches, taken.first_seq):
            if seq > at.seq:
                yield from _changes(seq, batch, prefix)
    else:
        yield from _difference(at, fold, prefix)


def _difference(old: FoldSnapshot, new: FoldSnapshot, prefix: str) -> Iterator[Event]:
    return (Changed(update, new.cursor(), new.seq) for update in diff(old, new, prefix))


def _changes(seq: int, batch: DecodedBatch, prefix: str) -> Iterator[Event]:
    if prefix and not any(key.startswith(prefix) for key in batch.keys):
        return
    for update in batch.updates():
        if update.key.startswith(prefix):
            yield Changed(update, batch.cursor, seq)


class Watch:
    """An iterator of events: the state or the changes since, one Synced, then changes as they come.

    One thread reads it. `next(timeout_s)` waits no longer than that; iterating waits for as long as it takes, and ends when
    the watch or its store is closed. It keeps its store from being dropped.
    """

    def __init__(self, subscription: Subscription, owner: object) -> None:
        """Not for callers: use `store.watch` or `follower.watch`."""
        self._subscription, self._owner = subscription, owner
        finalizer = weakref.finalize(self, subscription.feeds.remove, subscription.buffer)
        finalizer.atexit = False

    @property
    def ended(self) -> str | None:
        """Why it is over; None while there may be events."""
        return self._subscription.ended

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._subscription.next(None)
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`)."""
        return self._subscription.next(timeout_s)

    def close(self) -> None:
        """Listen no more. Events that wait are dropped; a thread that waits for one is let go. Any thread may call it."""
        self._subscription.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
