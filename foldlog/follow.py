"""A follower: a read-only store, in another process or the same one, that tails a writer's log."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.following.follower import FollowerState, FollowerThread
from foldlog.health import Health, follower_health
from foldlog.protocol.options import CACHE_BYTES, JOB_TIMEOUT_S, POLL_INTERVAL_S, check_timeout
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import OS_FILES, Files, check_files, resolve
from foldlog.watched import Watched


@dataclass(frozen=True, slots=True)
class FollowerStats:
    """Statistics of a follower at one moment."""

    state: FollowerState
    reason: str
    seq: int
    cursor: WatchCursor
    entries: int
    reloads: int
    """Times that the follower reloaded the log: it was compacted past the follower's position, cut,
    or replaced."""
    snapshot_age_s: float
    """Seconds since the last batch was seen."""
    delay_s: float
    """Seconds from the write of the last batch until it was seen here, accurate to a few
    milliseconds."""
    cached_bytes: int
    """Memory for what was read from the log, at most `cache_bytes`."""


def follow(
    path: StrPath,
    *,
    poll_interval_s: float = POLL_INTERVAL_S.default,
    cache_bytes: int = CACHE_BYTES.default,
    timeout_s: float | None = JOB_TIMEOUT_S,
    files: Files = OS_FILES,
) -> Follower:
    """Follow the log at `path`, which a writer in this or another process has open or will create.

    On return, reads see what is in the log. Appended batches appear within milliseconds, on file
    events, or within `poll_interval_s` where those fail. Takes no lock, writes nothing, repairs
    nothing. Memory: 3 MB for 1,000,000 compacted entries, plus what was read since, at most
    `cache_bytes`, and the changes since the last compaction.

    Raises CorruptLogError, InvalidFormatError or OSError if there is a log that cannot be read;
    RequestTimeout if it is not read within `timeout_s`. Then nothing stays open.

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
    cache_bytes = CACHE_BYTES.check(cache_bytes)
    check_files(files)
    timeout_s = check_timeout(timeout_s)
    log_path = resolve(path)
    thread = FollowerThread(log_path, files, poll_interval_s, cache_bytes)
    try:
        thread.open(timeout_s)
        return Follower(thread)
    except BaseException:
        thread.ask_to_close()
        raise


class Follower(Watched):
    """A follower of one log. Any thread may call any method.

    It works in a forked child, too: the first use there reloads the log, as `follow` does, and
    starts a thread. Watches and subscriptions from before the fork have ended in the child.
    """

    def __init__(self, thread: FollowerThread) -> None:
        """Not for callers: use `foldlog.follow`."""
        self._thread = self._published = thread
        self._finalizer = weakref.finalize(self, _close_dropped, thread)
        self._finalizer.atexit = False

    @property
    def path(self) -> Path:
        """The log's absolute path, with symbolic links resolved."""
        return self._thread.path

    @property
    def state(self) -> FollowerState:
        """The state of the log as the follower sees it."""
        self._thread.wake()
        return self._thread.state

    def stats(self) -> FollowerStats:
        """The follower's statistics. Cost: microseconds, plus counting the entries on the first
        call after a batch."""
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
            cached_bytes=snapshot.cached_bytes,
        )

    def health(self) -> Health:
        """Ready, degraded or failed, with reasons: for a readiness probe. Cost: microseconds."""
        thread = self._thread
        thread.wake()
        return follower_health(thread.state, thread.reason, thread.delay_s)

    def close(self) -> None:
        """Stop following. Closing twice is fine. Snapshots already taken stay usable."""
        self._thread.close()
        self._finalizer.detach()

    def snapshot(self) -> FoldSnapshot:
        """The current state: immutable, safe to hold and to share among threads. See
        `Store.snapshot`."""
        self._thread.wake()
        return super().snapshot()

    @property
    def _feeds(self) -> Feeds:
        return self._thread.feeds

    def _enter(self) -> None:
        self._thread.wake()
        self._thread.woken.set()  # check the log now: its file event may be late or lost

    def __reduce__(self) -> NoReturn:
        raise TypeError("a follower cannot be pickled; open one in the other process")

    def __repr__(self) -> str:
        return f"<foldlog.Follower {str(self.path)!r} {self.state}>"


def _close_dropped(thread: FollowerThread) -> None:
    if os.getpid() == thread.pid and thread.state is not FollowerState.CLOSED:
        # Only ask: the garbage collector may call this on any thread. First, since warnings may be
        # errors.
        thread.ask_to_close()
        warnings.warn(
            "a foldlog follower was dropped without close()", ResourceWarning, stacklevel=2
        )
