"""Feeds: who is told of changes, and how, without ever holding up the writer.

The writer hands each published commit group to every subscription: one append to a bounded buffer. The rest (filtering,
decoding, the state at the start, the difference after a lag) is done on the subscriber's side, from immutable snapshots. A
subscriber that is too slow loses its buffer, not its place: it is told `Lagged`, and then the exact difference between the
snapshot that it had seen and the present one. So it costs bounded memory, and misses nothing but steps in between.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import pykka

from foldlog.actors.adapter import log
from foldlog.protocol.errors import CursorExpired
from foldlog.protocol.events import Changed, Ended, Event, Lagged, Rewound, Synced
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Batch, DecodedBatch, Put, Update, batches_body, decode_batches
from foldlog.storage.diff import diff
from foldlog.storage.fold import FoldSnapshot

BUFFER_GROUPS = 256
"""Commit groups that wait for a subscriber before it lags."""
BUFFER_BYTES = 16 * 1024 * 1024
"""What these may hold, encoded."""
IN_FLIGHT = 64
"""Events that an actor may have in its mailbox, unhandled, before no more are sent."""
MAX_FAILURES = 3
"""Events in a row that an actor may fail on before it is unsubscribed."""

Since: TypeAlias = WatchCursor | FoldSnapshot | None
Backlog: TypeAlias = Callable[[WatchCursor, int], "list[tuple[int, DecodedBatch]] | None"]
"""The batches since a cursor, up to a sequence; None if the log does not reach back so far."""


class Group(NamedTuple):
    """A commit group that was published, or a jump whose steps are not known (no batches)."""

    fold: FoldSnapshot
    first_seq: int
    batches: Sequence[Batch | DecodedBatch]
    weight: int
    """Bytes, about."""
    rewound: str = ""


class Feeds:
    """The subscriptions of one store or follower."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced whole under the lock, read without it by whoever publishes.
        self._watches: tuple[Watch, ...] = ()
        self._ended: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return bool(self._watches)

    def publish(self, fold: FoldSnapshot, first_seq: int, batches: Sequence[Batch | DecodedBatch], weight: int = 0) -> None:
        """Tell of a commit group. Cost: an append for each subscription."""
        self._push(Group(fold, first_seq, batches, weight))

    def jump(self, fold: FoldSnapshot, rewound: str = "") -> None:
        """Tell that the state is another, by steps that are not known."""
        self._push(Group(fold, 0, (), 0, rewound))

    def _push(self, group: Group) -> None:
        for watch in self._watches:
            watch.push(group)

    def add(self, watch: Watch) -> None:
        """Let `watch` hear of all that is published from here on."""
        with self._lock:
            self._watches = (*self._watches, watch)
            ended = self._ended
        if ended is not None:
            watch.end(ended)

    def remove(self, watch: Watch) -> None:
        with self._lock:
            self._watches = tuple(other for other in self._watches if other is not watch)

    def end(self, reason: str) -> None:
        """End all subscriptions, and those to come."""
        with self._lock:
            self._ended = reason
            watches, self._watches = self._watches, ()
        for watch in watches:
            watch.end(reason)


class Watch:
    """An iterator of events: the state or the changes since, one Synced, then changes as they come.

    One thread reads it. `next(timeout_s)` waits no longer than that; iterating waits for as long as it takes, and ends when
    the watch or its store is closed.
    """

    def __init__(self, feeds: Feeds, current: Callable[[], FoldSnapshot], backlog: Backlog, prefix: str, since: Since) -> None:
        """Not for callers: use `store.watch` or `follower.watch`. CursorExpired if the log does not reach back to `since`."""
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix is a str, not {type(prefix).__name__}")
        if since is not None and not isinstance(since, (WatchCursor, FoldSnapshot)):
            raise TypeError(f"since is a WatchCursor or a FoldSnapshot, not {type(since).__name__}")
        self._feeds, self._current, self._prefix = feeds, current, prefix
        self._changed = threading.Condition()
        self._groups: deque[Group] = deque()
        self._bytes = 0
        self._dropped = 0
        self.ended: str | None = None
        """Why it is over; None while it is not."""
        feeds.add(self)  # first: what is published while the start is read must not fall between
        try:
            self._at = current()
            self._start = self._starting_events(backlog, since)
        except BaseException:
            feeds.remove(self)
            raise
        self._events = self._run()
        self._timeout_s: float | None = None

    # The publisher's side.

    def push(self, group: Group) -> None:
        with self._changed:
            self._groups.append(group)
            self._bytes += group.weight
            if len(self._groups) > BUFFER_GROUPS or self._bytes > BUFFER_BYTES:
                self._dropped += sum(len(waiting.batches) for waiting in self._groups)
                self._groups.clear()
                self._bytes = 0
            self._changed.notify()

    def end(self, reason: str) -> None:
        with self._changed:
            self.ended = self.ended or reason
            self._changed.notify_all()

    # The subscriber's side.

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self.next(None)
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`)."""
        self._timeout_s = timeout_s
        return next(self._events, None)

    def close(self) -> None:
        """Listen no more. Events that wait are dropped."""
        self._feeds.remove(self)
        with self._changed:
            self._groups.clear()
            self._dropped = 0
        self.end("closed by its subscriber")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _starting_events(self, backlog: Backlog, since: Since) -> Iterator[Event]:
        at = self._at
        if isinstance(since, FoldSnapshot):
            return self._difference(since, at)
        if since is None or since.is_none:
            return (Changed(Put(*entry), at.cursor(), at.seq) for block in at.blocks(self._prefix) for entry in block)
        batches = backlog(since, at.seq)
        if batches is None:
            raise CursorExpired(f"{since!r} is not in the log any more: it was compacted, or never there")
        return (event for seq, batch in batches for event in self._changes(seq, batch))

    def _run(self) -> Iterator[Event | None]:
        yield from self._start
        yield Synced(self._at.cursor(), self._at.seq)
        while True:
            dropped, group = self._take()
            if dropped:
                now = self._current()
                yield Lagged(self._at.cursor(), dropped)
                yield from self._catch_up(now)
            elif group is None:
                if self.ended is not None:
                    return
                yield None
            elif group.rewound:
                yield Rewound(group.rewound)
                yield from self._catch_up(group.fold)
            elif group.fold.seq > self._at.seq:
                if group.batches and group.first_seq <= self._at.seq + 1:
                    for seq, batch in enumerate(group.batches, group.first_seq):
                        if seq > self._at.seq:
                            yield from self._changes(seq, batch)
                else:
                    yield from self._difference(self._at, group.fold)
                self._at = group.fold

    def _take(self) -> tuple[int, Group | None]:
        """How many batches were dropped, or else the next group, waiting for it."""
        with self._changed:
            if not self._groups and not self._dropped and self.ended is None:
                self._changed.wait_for(lambda: self._groups or self._dropped or self.ended is not None, self._timeout_s)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                return dropped, None
            if not self._groups:
                return 0, None
            group = self._groups.popleft()
            self._bytes -= group.weight
            return 0, group

    def _catch_up(self, now: FoldSnapshot) -> Iterator[Event]:
        yield from self._difference(self._at, now)
        self._at = now
        yield Synced(now.cursor(), now.seq)

    def _difference(self, old: FoldSnapshot, new: FoldSnapshot) -> Iterator[Event]:
        return (Changed(update, new.cursor(), new.seq) for update in diff(old, new, self._prefix))

    def _changes(self, seq: int, batch: Batch | DecodedBatch) -> Iterator[Event]:
        if isinstance(batch, Batch):
            (batch,) = decode_batches(batches_body((batch.item,)))
        update: Update
        for update in batch.updates():
            if update.key.startswith(self._prefix):
                yield Changed(update, batch.cursor, seq)


class Delivery:
    """Tells an actor the events of a watch, from a thread of its own.

    Each event is a message to the actor. At most `IN_FLIGHT` are in its mailbox unhandled, so a slow actor lags as any slow
    subscriber does. An actor that fails on `MAX_FAILURES` events in a row, or is dead, is unsubscribed.
    """

    def __init__(self, ref: pykka.ActorRef[Any], watch: Watch) -> None:
        self._ref, self._watch = ref, watch
        self.thread = threading.Thread(target=self._run, name="foldlog-delivery", daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        """Tell no more. Returns at once; an event may still be on its way."""
        self._watch.close()

    def _run(self) -> None:
        in_flight: deque[pykka.Future[Any]] = deque()
        failures = 0
        try:
            for event in self._watch:
                in_flight.append(self._ref.ask(event, block=False))
                while len(in_flight) >= IN_FLIGHT or (in_flight and failures):
                    failures = self._settle(in_flight.popleft(), failures)
            while in_flight:
                failures = self._settle(in_flight.popleft(), failures)
            if self._ref.is_alive():
                self._ref.tell(Ended(self._watch.ended or "over"))
        except pykka.ActorDeadError:
            pass  # nobody is left to tell
        except Exception:
            log.exception("a subscription ended")
        finally:
            self._watch.close()

    def _settle(self, future: pykka.Future[Any], failures: int) -> int:
        while True:
            try:
                future.get(timeout=1.0)
            except pykka.Timeout:
                if self._watch.ended is not None:
                    raise pykka.ActorDeadError("it does not answer, and the subscription is over") from None
            except pykka.ActorDeadError:
                raise
            except Exception as error:
                log.warning("a subscriber failed on an event: %s", error)
                if failures + 1 >= MAX_FAILURES:
                    self._watch.end(f"the actor failed on {MAX_FAILURES} events in a row: {error}")
                return failures + 1
            else:
                return 0
