"""A follower: a read-only store in another process (or this one) that tails the log of a writer."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pykka

from foldlog.actors.delivery import Delivery
from foldlog.actors.feeds import Since, Subscription, Watch
from foldlog.actors.follower import FollowerState, FollowerThread
from foldlog.health import Health, follower_health
from foldlog.protocol.errors import InvalidFormatError
from foldlog.protocol.options import POLL_INTERVAL_S
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import CursorLike, WatchCursor
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import OS_FILES, Files, resolve
from foldlog.storage.readable import Readable
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike, wait_until


@dataclass(frozen=True, slots=True)
class FollowerStats:
    """The books of a follower, at one moment."""

    state: FollowerState
    reason: str
    seq: int
    cursor: WatchCursor
    entries: int
    reloads: int
    """Times that the state was read anew: the log was compacted past it, cut, or replaced."""
    snapshot_age_s: float
    """Since the last batch was seen."""
    delay_s: float
    """How long after it was written the last batch was seen here, to within some milliseconds."""


def follow(
    path: StrPath, *, poll_interval_s: float = POLL_INTERVAL_S.default, files: Files = OS_FILES
) -> Follower:
    """Follow the log at `path`, which a writer in this or another process has open, or will create.

    What stands in the log is there on return; what is appended follows within milliseconds, woken by file events, and within
    `poll_interval_s` where these fail. Takes no lock, writes nothing, repairs nothing. Memory: about 30 MB for 1,000,000
    entries, and what was read since.

    Raises CorruptLogError, InvalidFormatError or OSError if there is a log that does not read.

    >>> with foldlog.open("routes.log") as routes, foldlog.follow("routes.log") as follower:
    ...     routes.put("a", b"10.0.0.1")
    ...     routes.apply([Put("b", b"10.0.0.2")], WatchCursor.from_u64(1))
    ...     follower.wait_for(WatchCursor.from_u64(1), timeout_s=20)
    ...     len(follower)
    VersionToken.from_u64(1)
    2
    2
    """
    poll_interval_s = POLL_INTERVAL_S.check(poll_interval_s)
    log_path = resolve(path)
    if log_path.is_dir():
        raise InvalidFormatError(
            log_path, 0, "is a directory: only logs are followed, a RocksDB store is not"
        )
    thread = FollowerThread(log_path, files, poll_interval_s)
    try:
        thread.open()
        return Follower(thread)
    except BaseException:
        thread.ask_to_close()
        raise


class Follower(Readable):
    """A log that is followed. Any thread may call any method.

    In a process that was forked from the follower's own, it goes on by itself: the first use there reads the log anew (as
    `follow` does) and starts a thread. Watches and subscriptions from before the fork have ended there.
    """

    def __init__(self, thread: FollowerThread) -> None:
        """Not for callers: use `foldlog.follow`."""
        self._thread = self._published = thread
        self._finalizer = weakref.finalize(self, _close_dropped, thread)
        self._finalizer.atexit = False

    def wait_for(
        self,
        cursor: CursorLike | None = None,
        timeout_s: float | None = WAIT_TIMEOUT_S,
        *,
        seq: SeqLike | None = None,
    ) -> None:
        """Return once reads see everything up to `cursor`, or up to the batch `seq`. RequestTimeout if that takes longer.

        `seq` may be the version that `put`, `create`, `update` or `delete` returned, or its number, sent over from the process
        that writes: a read after this sees that write. Cursors of one length are compared as bytes, which is the order of u64
        tokens and of versionstamps; others must be equal.
        """
        position = Position(cursor, seq)
        self._thread.wake()
        self._thread.woken.set()  # a look at the log, in case its event is late or lost
        wait_until(self._thread.feeds, self.snapshot, position, timeout_s)

    def watch(self, prefix: str = "", since: Since = None) -> Watch:
        """An iterator of events, as `Store.watch`; and Rewound, then the difference, if the log went back or was replaced."""
        self._thread.wake()
        return Watch(Subscription(self._thread.feeds, self.snapshot, prefix, since), self)

    def subscribe(
        self, actor_ref: pykka.ActorRef[Any], prefix: str = "", since: Since = None
    ) -> Delivery:
        """`watch`, told to an actor: each event is a message to it. See `Store.subscribe`."""
        self._thread.wake()
        return Delivery(actor_ref, Subscription(self._thread.feeds, self.snapshot, prefix, since))

    @property
    def path(self) -> Path:
        """The log, absolute, links resolved."""
        return self._thread.path

    @property
    def state(self) -> FollowerState:
        """What the follower sees of the log."""
        self._thread.wake()
        return self._thread.state

    def stats(self) -> FollowerStats:
        """The books."""
        self._thread.wake()
        thread, snapshot = self._thread, self.snapshot()
        return FollowerStats(
            state=thread.state,
            reason=thread.reason,
            seq=snapshot.seq,
            cursor=snapshot.cursor(),
            entries=len(snapshot),
            reloads=thread.reloads,
            snapshot_age_s=time.monotonic() - thread.published_at,
            delay_s=thread.delay_s,
        )

    def health(self) -> Health:
        """Whether there is something to read, and how fresh it is: for a readiness probe. Cost: microseconds."""
        thread = self._thread
        thread.wake()
        return follower_health(thread.state, thread.reason, thread.delay_s)

    def close(self) -> None:
        """Stop following. Closing twice is fine; snapshots that were taken stay usable."""
        self._thread.close()
        self._finalizer.detach()

    def snapshot(self) -> FoldSnapshot:
        """The state that reads see now: immutable, safe to hold and to share among threads. See `Store.snapshot`."""
        self._thread.wake()
        return super().snapshot()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a follower cannot be pickled; open one in the other process")

    def __repr__(self) -> str:
        return f"<foldlog.Follower {str(self.path)!r} {self.state}>"


def _close_dropped(thread: FollowerThread) -> None:
    if os.getpid() == thread.pid and thread.state is not FollowerState.CLOSED:
        # No more than that, since a collection of garbage calls this, on any thread; and first, since warnings may be errors.
        thread.ask_to_close()
        warnings.warn(
            "a foldlog follower was dropped without close()", ResourceWarning, stacklevel=2
        )
