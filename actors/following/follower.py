"""The follower's thread: polls a tail when woken, publishes what it finds, survives every error.

There is nothing to restart: the log belongs to the writer, and a failed poll is followed by the
next one. Errors are reported in the state, and readers keep the last snapshot.

A fork leaves the thread behind in the parent. In the child, the first use of the follower reads the
log from the beginning and starts another thread (`_Asleep`).
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections import deque
from math import inf
from pathlib import Path
from typing import Any

from watchdog.events import FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent

from foldlog.actors.base.answers import Answer
from foldlog.actors.base.threads import OwnThread
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.following.filewatch import FileWatch
from foldlog.protocol.errors import FoldlogError, RequestTimeout
from foldlog.protocol.logger import log
from foldlog.storage.fold.snapshot import ClosedFold, FoldSnapshot
from foldlog.storage.forks import Rank, tell_after_fork
from foldlog.storage.handover import Bell, Latch, Wakeup
from foldlog.storage.log.files import Files
from foldlog.storage.log.tail import Advance, Jump, Tail

PAUSE_S = 0.002
"""Pause after a poll that found something: more is likely to follow at once."""
CLOSE_TIMEOUT_S = 10.0
BUSY_PAUSE_S = 0.008
"""The least pause between polls while the log is busy. On average it delays a change by half of
this."""
MAX_BUSY_PAUSE_S = 0.05
"""The longest pause while the log is busy: it bounds the delay of a change."""
REST_SHARE = 15.0
"""A follower of a busy log rests for this multiple of what a poll took. So several followers leave
most of the processors to the writer, as long as they keep up; and what a longer pause brings is
folded at once. On busy processors each wake-up finds cold caches, which takes as long as reading 50
frames: with 7, eight followers took a third more for a frame."""
BUSY_WINDOW_S = 0.25
BUSY_BATCHES = 20
"""Batches of the window that make the log count as busy, until there are none in a window. An event
costs watchdog 150 us of processor time, a poll 25. So a busy log is polled, and events are not
requested."""
EVENTS = (FileModifiedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent)
"""Events that wake a follower. Not opening and closing, which it does itself."""


class FollowerState(enum.StrEnum):
    """What a follower sees of the log. It can be read in every state but CLOSED."""

    WAITING = "waiting"
    """There has been no log under the name yet."""
    FOLLOWING = "following"
    MISSING = "missing"
    """The log is gone; the last snapshot is served."""
    REPLACED = "replaced"
    """Another log, or an older state, has taken the name since this follower was opened; it is
    followed now."""
    FAILED = "failed"
    """The log cannot be read (`reason`); the last snapshot is served, and reading is retried."""
    CLOSED = "closed"


def busy_pause_s(worked_s: float) -> float:
    """How long to pause while the log is busy, after polls that took `worked_s` of processor
    time."""
    return min(max(worked_s * REST_SHARE, BUSY_PAUSE_S), MAX_BUSY_PAUSE_S)


class FollowerThread:
    """See the module."""

    def __init__(self, path: Path, files: Files, poll_interval_s: float, cache_bytes: int) -> None:
        self.path = path
        self._files, self._cache_bytes = files, cache_bytes
        self._poll_interval_s = poll_interval_s
        # Written by this thread alone, replaced whole. A FoldSnapshot, `_Asleep` or ClosedFold.
        # Invariant: its sequence falls only with the state REPLACED.
        self.snapshot: Any = FoldSnapshot.empty()
        self.published_at = time.monotonic()
        self.state = FollowerState.WAITING
        self.reason = ""
        self.delay_s = 0.0
        """From the last write to the log, by the file's modification time (granularity 4 ms), to
        its publication here."""
        self.reloads = 0
        """Times that the whole state was read again, with the steps in between unknown."""
        self._rewound = ""
        self._untold: str | None = None
        """The `rewound` of steps of which subscribers were not told, since that failed (no memory,
        say); None if there are none."""
        self._had_log = False
        self._asleep: _Asleep | None = None
        self._closing = False
        self._prepare()

    def open(self, timeout_s: float) -> None:
        """Read what is there, and follow what comes. RequestTimeout after `timeout_s`. Nothing
        stays open if this raises or is interrupted."""
        deadline = time.monotonic() + timeout_s
        self._tail.give_up_at = deadline
        self._catch_up()
        if self._error is not None:
            raise self._error
        self._tail.give_up_at = inf
        try:
            self._start(max(deadline - time.monotonic(), 0.0))
            tell_after_fork(self, Rank.FOLLOWER)
        except BaseException:
            self.ask_to_close()
            raise

    def _prepare(self) -> None:
        """Set up what belongs to one process: none of it is of use after a fork."""
        self.pid = os.getpid()
        self._tail = Tail(self._files, self.path, self._cache_bytes)
        self.woken = Wakeup()
        self.feeds = Feeds()
        self.advanced = Bell()
        """Rung after each publish, and at the end."""
        self._watch: FileWatch | None = None  # made by the thread: the opener may be interrupted
        self._started: Answer[None] = Answer()
        self._ended = Latch()
        self._waking = threading.Lock()
        """Held by a thread that wakes it, never by a caller's."""
        self._error: Exception | None = None
        self._has_event = False
        self._found_at: deque[float] = deque(maxlen=BUSY_BATCHES)
        """When the last batches were found."""
        self._worked_s = 0.0
        """Processor time of the polls since the last pause."""
        self.busy = False
        """Changes come so often that the log is polled for them."""

    def _catch_up(self) -> None:
        """Read what is in the log now, on the caller's thread: it is there when follow()
        returns."""
        while self._poll():
            if self._tail.started and not self._tail.behind:
                break

    def _start(self, timeout_s: float | None = None) -> None:
        self.woken.set()  # for changes before the watch began
        self.thread = OwnThread("foldlog-follower", self._run, self._end)
        if not (self.thread.begin(timeout_s) and self._started.wait(timeout_s)):
            raise RequestTimeout(f"{self.path}: no thread was started within {timeout_s} s")

    def after_fork(self) -> None:
        """In a forked child: the first use resumes following. The parent's resources are neither
        touched nor waited for."""
        if self._closing:
            return
        _left_behind.append((self._watch, self._tail))
        self._prepare()
        if self._asleep is None:  # else the parent was such a child itself
            self._asleep = _Asleep(self, self.snapshot)
            self.snapshot = self._asleep

    def wake(self) -> None:
        """Resume following in a forked child, if that is not done yet. RuntimeError or MemoryError
        if no thread can be started.

        On a thread of its own: a caller that is interrupted would leave it half done, and a signal
        handler that uses the follower would come between.
        """
        if self._asleep is None or self._closing:
            return
        woken: Answer[None] = Answer()
        thread = OwnThread("foldlog-waking", lambda: self._wake(woken))
        thread.begin()
        try:
            woken.result()
        finally:
            thread.join(1.0)

    def _wake(self, woken: Answer[None]) -> None:
        try:
            with self._waking:
                if self._asleep is not None and not self._closing:
                    self._resume(self._asleep)
            woken.finish(None)
        except Exception as error:
            woken.finish(None, error)

    def _resume(self, asleep: _Asleep) -> None:
        self._catch_up()
        fold, before = self.snapshot, asleep.before
        # There is nothing to read, and the state says why.
        if fold is asleep:
            self.snapshot = before
        elif fold.seq < before.seq:
            self._rewound = f"the log is at batch {fold.seq}, and was at {before.seq} before"
            self._set_state()
        try:
            self._start()
        except (RuntimeError, MemoryError):
            self.snapshot = asleep
            raise
        self._asleep = None

    @property
    def file_watch(self) -> FileWatch:
        """The watch that wakes the thread, once the thread has begun."""
        assert self._watch is not None, "the thread has not begun"
        return self._watch

    def _on_event(self) -> None:
        self._has_event = True
        self.woken.set()

    def _run(self) -> None:
        while not self._closing:
            if self._watch is None:
                self._watch = FileWatch(self.path, EVENTS, self._on_event)
            if not self._started.done():
                self._started.finish(None)
            self._round()

    def _round(self) -> None:
        """Sleep until there may be something, and read what there is."""
        self.woken.wait(
            min(busy_pause_s(self._worked_s), self._poll_interval_s)
            if self.busy
            else self._poll_interval_s
        )
        self.feeds.look_after()
        has_event, self._has_event = self._has_event, False
        self._worked_s = 0.0
        while not self._closing and self._poll_timed():
            if not self.busy and not has_event:
                self.file_watch.refresh()  # there was a change, but no event
                has_event = True
            if self._tail.behind:
                continue
            self._set_busy(time.monotonic())
            if self.busy:
                return
            time.sleep(PAUSE_S)
        self._set_busy(time.monotonic())

    def _set_busy(self, now: float) -> None:
        recent = [found for found in self._found_at if now - found < BUSY_WINDOW_S]
        if not self.busy and len(recent) == BUSY_BATCHES:
            self.busy = True
            self.file_watch.stop()
        elif self.busy and not recent:
            self.busy = False
            self.file_watch.start()
            self.woken.set()  # for changes before the watch began

    def _poll_timed(self) -> bool:
        began = time.thread_time()
        try:
            return self._poll()
        finally:
            self._worked_s += time.thread_time() - began

    def _poll(self) -> bool:
        """Take one step. True if it found something."""
        try:
            return self._step()
        except Exception as error:
            # A bug must not end the thread: the next poll may succeed.
            if not isinstance(error, (OSError, FoldlogError)):
                log.exception("%s: following failed", self.path)
            self._fail(error)
            return False

    def _step(self) -> bool:
        was_started = self._tail.started
        self._tail.keeps_batches = self.feeds.has_subscribers
        step = self._tail.poll() or self._unpublished()
        self._error = self.feeds.refusal = None
        self._had_log |= self._tail.started
        rewound = ""
        if step is not None:
            self.snapshot, self.published_at = step.fold, time.monotonic()
            rewound = step.rewound if isinstance(step, Jump) else ""
            if isinstance(step, Jump):
                self.reloads += was_started
            if rewound:
                log.warning("%s: %s", self.path, rewound)
                self._rewound = rewound
        self._set_state()
        if step is not None:
            batches = step.length if isinstance(step, Advance) else 1
            self._found_at.extend([time.monotonic()] * min(batches, BUSY_BATCHES))
            self.delay_s = max(time.time() - self._tail.written_at, 0.0)
        if step is not None or self._untold is not None:
            self._tell(step, rewound)
        return step is not None

    def _unpublished(self) -> Jump | None:
        """A state that was read, and not published: there was no memory for it, say."""
        fold, before = self._tail.fold, self.snapshot
        if fold is before or not self._tail.started or not isinstance(before, FoldSnapshot):
            return None
        went_back = fold.seq < before.seq
        return Jump(fold, f"the log went back: from batch {before.seq}" if went_back else "")

    def _tell(self, step: Advance | Jump | None, rewound: str) -> None:
        """Tell subscribers of a step, and of those of which telling failed."""
        untold = self._untold
        self._untold = rewound or untold or ""
        try:
            if untold is None and isinstance(step, Advance) and step.length:
                batches = step.batches
                if batches is None and self.feeds.has_subscribers:
                    batches = self._tail.batches_again()  # the first came during this poll
                self.feeds.publish(step.fold, step.first_seq, batches or (), step.size)
            else:
                self.feeds.jump(self.snapshot, self._untold)
            self._untold = None
        finally:
            self.advanced.ring()

    def _set_state(self) -> None:
        if self._tail.missing:
            state, reason = FollowerState.WAITING, "there is no file under the name"
            if self._had_log:
                state = FollowerState.MISSING
        elif self._rewound:
            state, reason = FollowerState.REPLACED, self._rewound
        else:
            state, reason = FollowerState.FOLLOWING, ""
        if state is not self.state:
            log.info("%s: %s", self.path, state)
        self.state, self.reason = state, reason

    def _fail(self, error: Exception) -> None:
        if str(error) != self.reason:
            log.warning("%s: cannot be read: %s", self.path, error)
        self._error = error
        self.state, self.reason = FollowerState.FAILED, str(error)
        if self._tail.is_directory:
            self.feeds.refuse_waiters(error)

    def ask_to_close(self) -> None:
        """Tell the thread to end. Never blocks."""
        self._closing = True
        self.woken.set()

    def close(self) -> None:
        """Stop and wait for the thread to end; from the thread itself, returns at once."""
        if self._asleep is not None:
            self._closing = True
            self._let_go()
            self._asleep = None  # last: an interrupted close is repeated
            return
        self.ask_to_close()
        if threading.current_thread() is not self.thread and self._ended.wait(CLOSE_TIMEOUT_S):
            self.thread.join(1.0)

    def _end(self) -> None:
        self._started.finish(None)
        if self._watch is not None:
            self._watch.stop()
        self._let_go()
        self._ended.set()

    def _let_go(self) -> None:
        self.state, self.reason = FollowerState.CLOSED, ""
        self.feeds.end(f"the follower of {self.path} was closed")
        self.snapshot = ClosedFold(f"the follower of {self.path} is closed")
        self.advanced.ring()


class _Asleep:
    """The snapshot of a follower in a forked child until its first use, which resumes the
    follower."""

    def __init__(self, thread: FollowerThread, before: Any) -> None:
        self.thread, self.before = thread, before

    def __getattr__(self, name: str) -> Any:
        self.thread.wake()
        return getattr(self.thread.snapshot, name)


_left_behind: list[object] = []
"""What a forked child must not stop, close or free: it shares the descriptors with its parent."""
