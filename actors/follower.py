"""The follower's thread: polls a tail when woken, publishes what it finds, and outlives every error.

There is nothing to restart: the log is the writer's, and a poll that failed is followed by the next one. What went wrong is
reported as the state, and readers keep the last snapshot.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from pathlib import Path

from watchdog.events import FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent

from foldlog.actors.adapter import log
from foldlog.actors.feeds import Feeds
from foldlog.actors.filewatch import FileWatch
from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.files import Files
from foldlog.storage.fold import ClosedFold, FoldSnapshot
from foldlog.storage.tail import Jump, Tail

MIN_PAUSE_S = 0.002
"""Between polls: a writer at full speed wakes a follower more often than is worth it."""


class FollowerState(enum.StrEnum):
    """What a follower sees of the log. It reads in every state but CLOSED."""

    WAITING = "waiting"
    """There was no log under the name yet."""
    FOLLOWING = "following"
    MISSING = "missing"
    """The log is gone; what was read is served."""
    REPLACED = "replaced"
    """Another log, or an older state, took the name; it is followed now."""
    FAILED = "failed"
    """The log does not read (`reason`); what was read is served, and it is tried again."""
    CLOSED = "closed"


class FollowerThread:
    """See the module."""

    def __init__(self, path: Path, files: Files, poll_interval_s: float) -> None:
        self.path = path
        self._poll_interval_s = poll_interval_s
        self._tail = Tail(files, path)
        self.woken = threading.Event()
        self.feeds = Feeds()
        # Written by this thread alone, replaced whole. Invariant: its sequence falls only with the state REPLACED.
        self.snapshot: FoldSnapshot | ClosedFold = FoldSnapshot.empty()
        self.published_at = time.monotonic()
        self.advanced = threading.Condition()
        """Notified behind each publish, and at the end."""
        self.state = FollowerState.WAITING
        self.reason = ""
        self.reloads = 0
        """Times that the state was read anew, with the steps in between unknown."""
        self._closing = False
        self._poll()  # on the caller's thread: what stands in the log now is there when follow() returns
        if self.state is FollowerState.FAILED:
            raise self._error
        kinds = (FileModifiedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent)
        self._watch = FileWatch(path, kinds, self.woken.set)
        self.thread = threading.Thread(target=self._run, name="foldlog-follower", daemon=True)
        self.thread.start()

    @property
    def cursor(self) -> WatchCursor:
        return self.snapshot.cursor()

    def _run(self) -> None:
        while not self._closing:
            self.woken.wait(self._poll_interval_s)
            self.woken.clear()
            if not self._closing:
                self._poll()
                time.sleep(MIN_PAUSE_S)

    def _poll(self) -> None:
        try:
            steps = self._tail.poll()
            for step in steps:
                self.snapshot, self.published_at = step.fold, time.monotonic()
                if isinstance(step, Jump):
                    self.reloads += 1
                    self.feeds.jump(step.fold, step.rewound)
                elif self.feeds.wanted and step.batches:
                    self.feeds.publish(step.fold, step.first_seq, step.batches, 0)
            self._set_state([step.rewound for step in steps if isinstance(step, Jump) and step.rewound])
        except (OSError, FoldlogError) as error:
            self._fail(error)
            return
        except Exception as error:  # a bug must not end the thread: the next poll may do
            log.exception("%s: following failed", self.path)
            self._fail(error)
            return
        if steps:
            with self.advanced:
                self.advanced.notify_all()

    def _set_state(self, rewound: list[str]) -> None:
        if rewound:
            self.state, self.reason = FollowerState.REPLACED, rewound[-1]
            log.warning("%s: %s", self.path, self.reason)
        elif self._tail.missing:
            missing = FollowerState.MISSING if self._tail.started else FollowerState.WAITING
            if missing is not self.state:
                log.info("%s: there is no log", self.path)
            self.state, self.reason = missing, "there is no file under the name"
        elif self.state is not FollowerState.REPLACED:
            self.state, self.reason = FollowerState.FOLLOWING, ""

    def _fail(self, error: Exception) -> None:
        if str(error) != self.reason:
            log.warning("%s: cannot be read: %s", self.path, error)
        self._error = error
        self.state, self.reason = FollowerState.FAILED, str(error)

    def close(self) -> None:
        """Stop. From the thread itself, returns at once."""
        self._closing = True
        self.woken.set()
        self._watch.stop()
        if threading.current_thread() is not self.thread:
            self.thread.join(5.0)
        self.state = FollowerState.CLOSED
        self.feeds.end(f"the follower of {self.path} was closed")
        self.snapshot = ClosedFold(f"the follower of {self.path} is closed")
        with contextlib.suppress(RuntimeError), self.advanced:
            self.advanced.notify_all()
