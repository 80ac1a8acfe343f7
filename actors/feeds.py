"""Feeds: tell subscribers of changes without ever delaying the writer.

The writer hands each published commit group to every subscription: one append to a bounded buffer.
The rest (filtering, decoding, the initial state, the difference after a lag) is done on the
subscriber's side, from immutable snapshots. A subscriber that is too slow loses its buffer but not
its place. It is told `Lagged`, and then the exact difference between the last snapshot it saw and
the current one. So memory is bounded, and only intermediate steps are missed.

    Feeds         the subscriptions of a store or a follower
                  fed by the writer or the follower's thread
    Buffer        the groups that wait for one subscriber
                  filled by Feeds, emptied by the subscriber
    Subscription  the events of one subscriber, in order
                  read by one thread: a Watch's, or a Delivery's (delivery.py)
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from foldlog.actors.adapter import is_own_fault
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.errors import CursorExpired, FoldlogError, ReentrantCall, StoreClosed
from foldlog.protocol.events import Changed, Event, Lagged, Rewound, Synced
from foldlog.protocol.forks import Rank, tell_after_fork
from foldlog.protocol.options import check_timeout
from foldlog.protocol.tokens import CursorLike, WatchCursor, as_cursor
from foldlog.protocol.updates import Batch, DecodedBatch, Delete, Put, batches_body, decode_batches
from foldlog.storage.fold.diff import diff
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.handover import RECHECK_S, Wakeup, is_over
from foldlog.storage.log.backlog import batches_since

BUFFER_GROUPS = 1024
"""Commit groups that may wait before a subscriber lags."""
BUFFER_UPDATES = 32_768
"""Updates that may wait: as many as a fold settles at once, so that waiting groups hold no more
than two versions of each of its pieces."""
BUFFER_BYTES = 16 * 1024 * 1024
"""Encoded bytes that may wait. One group always fits, whatever its size."""

_getframe = sys._getframe


class Past(Protocol):
    """What leads from one snapshot to another. See `Engine`."""

    def batches_since(
        self, snapshot: Any, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `Engine.batches_since`."""

    def difference(self, old: Any, new: Any, prefix: str = "") -> Iterator[Put | Delete]:
        """See `Engine.difference`."""


class LogPast:
    """The past of folds over a log, which each fold can reach by itself."""

    def batches_since(
        self, snapshot: FoldSnapshot, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `backlog.batches_since`."""
        return batches_since(snapshot, cursor)

    def difference(
        self, old: FoldSnapshot, new: FoldSnapshot, prefix: str = ""
    ) -> Iterator[Put | Delete]:
        """See `diff`. StoreClosed for snapshots of an engine that is closed, since they do not
        outlive it."""
        if not (isinstance(old, FoldSnapshot) and isinstance(new, FoldSnapshot)):
            raise StoreClosed("the store is closed")
        return diff(old, new, prefix)


Since: TypeAlias = CursorLike | Snapshot | None


class Group:
    """A published commit group; or, without batches, a state reached by unknown steps."""

    __slots__ = (
        "_batches",
        "_decoded",
        "first_seq",
        "fold",
        "rewound",
        "size",
        "total_bytes",
        "total_updates",
        "updates",
    )

    def __init__(
        self,
        fold: Snapshot,
        first_seq: int,
        batches: Sequence[Batch | DecodedBatch],
        size: int,
        rewound: str = "",
    ) -> None:
        self.fold, self.first_seq, self.size, self.rewound = fold, first_seq, size, rewound
        self.updates = sum(
            batch.length if isinstance(batch, Batch) else len(batch.keys) for batch in batches
        )
        self.total_updates, self.total_bytes = self.updates, size
        """Totals of all groups of the feeds up to this one. The difference between the two ends of
        a buffer gives what waits in it."""
        self._batches = batches
        self._decoded: list[DecodedBatch] | None = None

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    @property
    def batches(self) -> Sequence[DecodedBatch]:
        """The batches with their updates in order. Decoded on the first call, for all
        subscribers."""
        if self._decoded is None:
            self._decoded = [
                decode_batches(batches_body((batch.item,)), 1)[0]
                if isinstance(batch, Batch)
                else batch
                for batch in self._batches
            ]
        return self._decoded


class Buffer:
    """What waits for one subscriber. One thread at a time fills it, one empties it, any may end it;
    none waits for another."""

    def __init__(self) -> None:
        # Elements are removed by the reader (`drop`), or all at once by the filler (`push`).
        self._waiting: deque[Group | Lost] = deque()
        self._wakeup = Wakeup()
        self.ended: str | None = None
        """Why nothing more will come; None while it may. What already waits is still delivered."""
        self.deadline: float | None = None
        """The deadline of the subscriber's current call (time.monotonic())."""
        self.waited_before = 0
        """Groups waiting since before that call began. They are delivered however short its
        timeout."""

    def __len__(self) -> int:
        """The number of groups that wait."""
        return len(self._groups)

    @property
    def _groups(self) -> list[Group]:
        return [item for item in tuple(self._waiting) if isinstance(item, Group)]

    def push(self, group: Group) -> None:
        """Add a published group. Over the bounds, drop everything that waits and remember only the
        state it led to."""
        waiting = self._waiting
        waiting.append(group)
        if self._is_over_bounds(group):
            waiting.append(_lost(_drained(waiting)))
        self._wakeup.set()

    def _is_over_bounds(self, last: Group) -> bool:
        """True if more waits than is allowed. One group always fits."""
        try:
            first = self._waiting[0]
        except IndexError:
            return False
        groups = len(self._waiting) - isinstance(first, Lost)
        return groups > 1 and (
            groups > BUFFER_GROUPS
            or last.total_updates - first.total_updates + first.updates > BUFFER_UPDATES
            or last.total_bytes - first.total_bytes + first.size > BUFFER_BYTES
        )

    def start_at(self, fold: Snapshot) -> None:
        """Forget what was published before `fold`, the subscriber's initial state."""
        waiting = tuple(self._waiting)
        for number, group in enumerate(waiting):
            if group.fold is fold:
                for older in waiting[: number + 1]:
                    self.drop(older)
                return

    def drop(self, told: Group | Lost) -> None:
        """Remove a group that was delivered in full."""
        with contextlib.suppress(ValueError):  # it was dropped with everything that waited
            self._waiting.remove(told)
            self.waited_before -= isinstance(told, Group)

    def first(self) -> Group | Lost | None:
        """The next group, waiting for it until the deadline. None if nothing came or the feed is
        over. The group stays until `drop`."""
        while True:
            with contextlib.suppress(IndexError):
                return self._waiting[0]
            if self.ended is not None:
                return None
            rest = RECHECK_S
            if self.deadline is not None:
                rest = min(rest, self.deadline - time.monotonic())
                if rest <= 0:
                    return None
            self._wakeup.wait(rest)

    @property
    def has_more(self) -> bool:
        """True if anything waits."""
        return bool(self._waiting)

    @property
    def is_late(self) -> bool:
        """True if the deadline has passed and all that waited before the call is delivered."""
        return (
            self.deadline is not None
            and self.waited_before <= 0
            and time.monotonic() >= self.deadline
        )

    def end(self, reason: str, *, drop: bool = False) -> None:
        """Nothing more will come. With `drop`, what waits is discarded."""
        self.ended = self.ended or reason
        if drop:
            self._waiting.clear()
        self._wakeup.set()

    def after_fork(self, reason: str) -> None:
        """In a forked child, where nobody publishes."""
        self._wakeup = Wakeup()
        self._waiting.clear()
        self.ended = self.ended or reason


class Lost:
    """Groups were dropped; `fold` is the state that the last of them led to."""

    __slots__ = ("batches", "fold", "rewound", "size", "total_bytes", "total_updates", "updates")

    def __init__(self, fold: Snapshot, batches: int, rewound: str) -> None:
        self.fold, self.batches, self.rewound = fold, batches, rewound
        self.size = self.updates = 0
        self.total_updates = self.total_bytes = 0


def _drained(waiting: deque[Group | Lost]) -> list[Group | Lost]:
    drained: list[Group | Lost] = []
    with contextlib.suppress(IndexError):  # its reader removes from it, too
        while True:
            drained.append(waiting.popleft())
    return drained


def _lost(dropped: list[Group | Lost]) -> Lost:
    """What is remembered of groups dropped now or earlier."""
    batches = sum(item.batches if isinstance(item, Lost) else len(item) for item in dropped)
    rewound = [item.rewound for item in dropped if item.rewound]
    last = dropped[-1]
    lost = Lost(last.fold, batches, rewound[-1] if rewound else "")
    lost.total_updates, lost.total_bytes = last.total_updates, last.total_bytes
    return lost


class Feeds:
    """The subscriptions of one store or follower."""

    def __init__(self) -> None:
        self.past: Past = LogPast()
        """The source of the past of the snapshots: a store's writer puts its engine here."""
        self._subscribed: dict[Buffer, None] = {}
        self._updates = self._bytes = 0  # totals since these feeds began
        self._ended: str | None = None
        tell_after_fork(self, Rank.FEEDS)

    @property
    def _buffers(self) -> tuple[Buffer, ...]:
        return tuple(self._subscribed)

    @property
    def wanted(self) -> bool:
        """True if anyone is subscribed."""
        return bool(self._subscribed)

    @property
    def backlog(self) -> tuple[int, ...]:
        """The number of waiting groups, for each subscription."""
        return tuple(map(len, self._buffers))

    def publish(
        self, fold: Snapshot, first_seq: int, batches: Sequence[Batch | DecodedBatch], size: int
    ) -> None:
        """Publish a commit group of `size` encoded bytes. Cost: one append per subscription."""
        if self._subscribed:
            self._push(Group(fold, first_seq, batches, size))

    def jump(self, fold: Snapshot, rewound: str = "") -> None:
        """Publish that the state is `fold`: reached by unknown steps, or the same as before but in
        another file."""
        if self._subscribed:
            self._push(Group(fold, 0, (), 0, rewound))

    def _push(self, group: Group) -> None:
        self._updates = group.total_updates = self._updates + group.updates
        self._bytes = group.total_bytes = self._bytes + group.size
        for buffer in self._buffers:
            buffer.push(group)

    def add(self, buffer: Buffer) -> None:
        """Give `buffer` everything published from here on."""
        self._subscribed[buffer] = None
        # Checked after adding: `end` sets it before it looks at the buffers.
        if self._ended is not None:
            self.remove(buffer)
            buffer.end(self._ended)

    def remove(self, buffer: Buffer) -> None:
        """Give `buffer` nothing more."""
        self._subscribed.pop(buffer, None)

    def end(self, reason: str) -> None:
        """End all subscriptions, current and future."""
        self._ended = reason
        self.past = LogPast()
        for buffer in self._buffers:
            self.remove(buffer)
            buffer.end(reason)

    def after_fork(self) -> None:
        self._ended = "the process was forked: nobody tells of changes here"
        for buffer in self._buffers:
            self.remove(buffer)
            buffer.after_fork(self._ended)


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
        buffer: Buffer | None = None,
    ) -> None:
        """CursorExpired if the log does not reach back to `since`. A subscription holds no
        reference to the store."""
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
        if since is not None and not isinstance(since, Snapshot):
            since = as_cursor(since)
        self.buffer = Buffer() if buffer is None else buffer
        self.feeds = feeds
        self._prefix = prefix
        self._line: deque[object] = deque()
        """The frames that read or wait to read."""
        self.ended: str | None = None
        """Why it is over; None while there may be events."""
        try:
            # Added first, so that nothing published while the start is read is missed.
            feeds.add(self.buffer)
            at = current()
            make = _start(feeds.past, at, prefix, since)
        except BaseException:
            feeds.remove(self.buffer)
            raise
        self.buffer.start_at(at)
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
                if not is_over(first):
                    raise ReentrantCall("the watch is being read already")
                del first
                line.popleft()
            if timeout_s is not None:
                timeout_s = time.monotonic() + check_timeout(timeout_s)
            self.buffer.deadline = timeout_s
            self.buffer.waited_before = len(self.buffer) if timeout_s is not None else 0
            return self._offer()
        except (OSError, FoldlogError) as error:
            # A snapshot whose file was overwritten cannot be read.
            if is_own_fault(error) and not isinstance(error, ReentrantCall):
                self._finish(f"the difference cannot be told: {error}")
            raise
        finally:
            first = None
            with contextlib.suppress(ValueError):
                line.remove(_getframe())

    def _offer(self) -> Event | None:
        while True:
            part, at = self._part, self._at
            if at is None:
                return None
            if part is None:
                source = self.buffer.first()
                if source is None:
                    if self.buffer.ended is not None and not self.buffer.has_more:
                        self._finish(self.buffer.ended)
                    return None
                part = self._part = _part_of(self.feeds.past, source, at, self._prefix)
            event = part.offer()
            if event is not None:
                return event
            self._end(part, at)
            if not part.told and self.buffer.is_late:
                return None

    def _end(self, part: Part, at: Snapshot) -> None:
        """The part is delivered. Each step may be repeated if this is interrupted."""
        source = part.source
        if isinstance(source, Lost) or (source and source.rewound) or part.fold.seq >= at.seq:
            # Even if nothing differs: the fold may be in a newer file, releasing the older one.
            self._at = part.fold
        if source is not None:
            self.buffer.drop(source)
        self._part = None

    def _finish(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._part = self._at = None  # releases the snapshot
        self.feeds.remove(self.buffer)
        self.buffer.end(reason, drop=True)

    def close(self, reason: str = "closed by its subscriber") -> None:
        """Stop listening. Waiting events are dropped."""
        self._finish(reason)


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
        for seq, batch in enumerate(taken.batches, taken.first_seq):
            if seq > at.seq:
                yield from _changes(seq, batch, prefix)
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


class Watch:
    """An iterator of events: the state or the changes since, one Synced, then changes as they come.

    One thread reads it. `next(timeout_s)` waits no longer than that. Iterating waits without limit,
    and ends when the watch or its store is closed. A watch holds a reference to its store.
    """

    def __init__(self, subscription: Subscription, owner: object) -> None:
        """Not public: use `store.watch` or `follower.watch`."""
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
        event = None
        while event is None:
            event = self._subscription.offer(None)
            if event is None and self._subscription.ended is not None:
                raise StopIteration
        self._subscription.accept()
        return event

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`).

        After an interruption (an exception from a signal handler, say) it can be called again, and
        resumes where it was. ReentrantCall if a handler calls it during such a call.
        """
        event = self._subscription.offer(timeout_s)
        if event is not None:
            self._subscription.accept()
        return event

    def close(self) -> None:
        """Stop listening. Waiting events are dropped; a thread waiting for one returns. Any thread
        may call it."""
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
