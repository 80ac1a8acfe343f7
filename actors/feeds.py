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
"""Commit groups that wait for a subscriber before it lags."""
BUFFER_UPDATES = 32_768
"""Updates in them: what a fold settles as one, so that waiting groups hold no more than two versions of each of its pieces."""
BUFFER_BYTES = 16 * 1024 * 1024
"""What they may hold, encoded. One group always fits, whatever its size."""

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
    """The past of folds over a log, which every fold leads to by itself."""

    def batches_since(
        self, snapshot: FoldSnapshot, cursor: WatchCursor
    ) -> Iterator[tuple[int, DecodedBatch]] | None:
        """See `backlog.batches_since`."""
        return batches_since(snapshot, cursor)

    def difference(
        self, old: FoldSnapshot, new: FoldSnapshot, prefix: str = ""
    ) -> Iterator[Put | Delete]:
        """See `diff`. StoreClosed for the snapshots of an engine that is gone, which do not outlive it."""
        if not (isinstance(old, FoldSnapshot) and isinstance(new, FoldSnapshot)):
            raise StoreClosed("the store is closed")
        return diff(old, new, prefix)


Since: TypeAlias = CursorLike | Snapshot | None


class Group:
    """A commit group that was published; or, without batches, a state that was reached by steps that are not known."""

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
        """Of all groups of the feeds up to this one, so that a buffer counts what waits by its ends."""
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
                decode_batches(batches_body((batch.item,)), 1)[0]
                if isinstance(batch, Batch)
                else batch
                for batch in self._batches
            ]
        return self._decoded


class Buffer:
    """What waits for one subscriber. Filled by one thread at a time, emptied by one, ended by any; none waits for another."""

    def __init__(self) -> None:
        # Its elements are removed by who told them (`drop`), or all at once by who fills it (`push`).
        self._waiting: deque[Group | Lost] = deque()
        self._wakeup = Wakeup()
        self.ended: str | None = None
        """Why nothing more will come; None while it may. What waits is still told."""
        self.deadline: float | None = None
        """Of the subscriber's present call (time.monotonic())."""
        self.waited_before = 0
        """Groups that waited when that call began, and do still: they are told, however little time it gives."""

    def __len__(self) -> int:
        """Groups that wait."""
        return len(self._groups)

    @property
    def _groups(self) -> list[Group]:
        return [item for item in tuple(self._waiting) if isinstance(item, Group)]

    def push(self, group: Group) -> None:
        """Add what was published. Past the bounds, everything that waits is dropped, and only its end is remembered."""
        waiting = self._waiting
        waiting.append(group)
        if self._is_over_bounds(group):
            waiting.append(_lost(_drained(waiting)))
        self._wakeup.set()

    def _is_over_bounds(self, last: Group) -> bool:
        """Whether more waits than may. One group always fits."""
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
        """Forget what was published before `fold`, which the subscriber begins with."""
        waiting = tuple(self._waiting)
        for number, group in enumerate(waiting):
            if group.fold is fold:
                for older in waiting[: number + 1]:
                    self.drop(older)
                return

    def drop(self, told: Group | Lost) -> None:
        """It was told to its end, and waits no more."""
        with contextlib.suppress(ValueError):  # it was dropped with all that waited
            self._waiting.remove(told)
            self.waited_before -= isinstance(told, Group)

    def first(self) -> Group | Lost | None:
        """What comes next, waiting for it until the deadline. None: nothing came, or it is over. It stays until `drop`."""
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
        """Whether something waits."""
        return bool(self._waiting)

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
    """Groups were dropped; `fold` is what the last of them led to."""

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
    """What is remembered of groups that were dropped, and of those before them."""
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
        """What tells the past of the snapshots: a store's writer puts its engine here."""
        self._subscribed: dict[Buffer, None] = {}
        self._updates = self._bytes = 0  # published to these, ever
        self._ended: str | None = None
        tell_after_fork(self, Rank.FEEDS)

    @property
    def _buffers(self) -> tuple[Buffer, ...]:
        return tuple(self._subscribed)

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return bool(self._subscribed)

    @property
    def backlog(self) -> tuple[int, ...]:
        """Groups that wait, for each subscription."""
        return tuple(map(len, self._buffers))

    def publish(
        self, fold: Snapshot, first_seq: int, batches: Sequence[Batch | DecodedBatch], size: int
    ) -> None:
        """Tell of a commit group, `size` bytes encoded. Cost: an append for each subscription."""
        if self._subscribed:
            self._push(Group(fold, first_seq, batches, size))

    def jump(self, fold: Snapshot, rewound: str = "") -> None:
        """Tell that the state is `fold`: by steps that are not known, or the same as before, in another file."""
        if self._subscribed:
            self._push(Group(fold, 0, (), 0, rewound))

    def _push(self, group: Group) -> None:
        self._updates = group.total_updates = self._updates + group.updates
        self._bytes = group.total_bytes = self._bytes + group.size
        for buffer in self._buffers:
            buffer.push(group)

    def add(self, buffer: Buffer) -> None:
        """Let `buffer` have all that is published from here on."""
        self._subscribed[buffer] = None
        if (
            self._ended is not None
        ):  # looked at after adding: whoever ends it looks at the buffers after saying so
            self.remove(buffer)
            buffer.end(self._ended)

    def remove(self, buffer: Buffer) -> None:
        """Let `buffer` have nothing more."""
        self._subscribed.pop(buffer, None)

    def end(self, reason: str) -> None:
        """End all subscriptions, and those to come."""
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
    """A stretch of events that leads to one fold, and how much of it was told.

    Events are made by generators, and one that an exception has passed through is dead. So the position is kept beside it, and
    an interrupted part is made anew from there.
    """

    def __init__(
        self,
        make: Callable[[int, Event | None], Iterator[Event]],
        fold: Snapshot,
        source: Group | Lost | None = None,
    ) -> None:
        """`make` gives the events after so many, of which the last was the event given."""
        self._make, self.fold, self.source = make, fold, source
        self._events: Iterator[Event] | None = None
        self._made = 0
        self.told = 0
        self._offered: Event | None = None
        self._last: Event | None = None

    def offer(self) -> Event | None:
        """The next event; the same again until it is accepted. None at the end."""
        events, self._events = (
            self._events,
            None,
        )  # should this be interrupted, it is not gone on with
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
        """CursorExpired if the log does not reach back to `since`. It does not keep the store from being dropped."""
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
        if since is not None and not isinstance(since, Snapshot):
            since = as_cursor(since)
        self.buffer = Buffer() if buffer is None else buffer
        self.feeds = feeds
        self._prefix = prefix
        self._line: deque[object] = deque()
        """The frame that reads."""
        self.ended: str | None = None
        """Why it is over; None while there may be events."""
        try:
            feeds.add(
                self.buffer
            )  # first: what is published while the start is read must not fall between
            at = current()
            make = _start(feeds.past, at, prefix, since)
        except BaseException:
            feeds.remove(self.buffer)
            raise
        self.buffer.start_at(at)
        # What was told reaches up to `_at`, always: with it, a difference is exact.
        self._at: Snapshot | None = at
        self._part: Part | None = Part(make, at)

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over."""
        event = self.offer(timeout_s)
        if event is not None:
            self.accept()
        return event

    def accept(self) -> None:
        """What was offered has reached the subscriber. Until then it is offered again."""
        part = self._part
        if part is not None:
            part.accept()

    def offer(self, timeout_s: float | None) -> Event | None:
        """`next`, of what is to be accepted yet. ReentrantCall if it is being read already."""
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
            # A snapshot whose file was overwritten does not read.
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
        """It is told. Each step may be done again, should this be interrupted."""
        source = part.source
        if isinstance(source, Lost) or (source and source.rewound) or part.fold.seq >= at.seq:
            # Also if nothing differs: it may stand in a newer file, and let go of the older one.
            self._at = part.fold
        if source is not None:
            self.buffer.drop(source)
        self._part = None

    def _finish(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._part = self._at = None  # and with it, the snapshot
        self.feeds.remove(self.buffer)
        self.buffer.end(reason, drop=True)

    def close(self, reason: str = "closed by its subscriber") -> None:
        """Listen no more. Events that wait are dropped."""
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

    begun = [changes()]  # to complain at once
    return _again(lambda: begun.pop() if begun else changes())


def _again(make: Callable[[], Iterator[Event]]) -> Callable[[int, Event | None], Iterator[Event]]:
    """Events that are made from the beginning, and passed over as far as they were told."""
    return lambda told, last: islice(make(), told, None)


def _part_of(past: Past, source: Group | Lost, at: Snapshot, prefix: str) -> Part:
    return Part(_again(lambda: _told(past, source, at, prefix)), source.fold, source)


def _told(past: Past, taken: Group | Lost, at: Snapshot, prefix: str) -> Iterator[Event]:
    """What a subscriber that was told up to `at` is told of a group."""
    fold = taken.fold
    if isinstance(taken, Lost) or taken.rewound:
        if isinstance(taken, Lost):
            yield Lagged(at.cursor(), taken.batches)
        if taken.rewound:
            yield Rewound(taken.rewound)
        yield from _difference(past, at, fold, prefix)
        yield Synced(fold.cursor(), fold.seq)
    elif fold.seq <= at.seq:
        return  # published before the state that this began with, or a compaction
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
        event = None
        while event is None:
            event = self._subscription.offer(None)
            if event is None and self._subscription.ended is not None:
                raise StopIteration
        self._subscription.accept()
        return event

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`).

        One that was interrupted (by an exception of a signal handler, say) can be called again, and goes on where it was.
        ReentrantCall from a handler that came within it.
        """
        event = self._subscription.offer(timeout_s)
        if event is not None:
            self._subscription.accept()
        return event

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
