"""Actors that die at a named step."""

from __future__ import annotations

import threading

from foldlog.protocol.options import Count

STEPS: dict[str, str] = {
    "writer.start": "the writer starts or restarts; nothing is open yet",
    "writer.heal": "the fold is about to be written to a new file, after a failed fsync",
    "writer.before_write": "a commit group is complete, and nothing of it is written",
    "writer.after_write": "it is written (and, with sync='always', synced) but not published",
    "writer.after_publish": "it is published, and no caller has an answer",
    "writer.stop": "the store closes: all requests are served, the log is not sealed",
    "compact.begin": "a compaction is due and not started",
    "compact.write": "maintenance is about to write the new file",
    "compact.written": "the new file is written and synced but not renamed",
    "compact.finish": "the writer is about to carry over the rest and rename",
    "compact.finished": "the new file is the log, and no caller has an answer",
    "export.begin": "the writer has taken an export request and not passed it on",
    "export.write": "maintenance is about to write the artifact",
    "export.written": "the artifact is complete, and no caller has an answer",
    "maintenance.start": "maintenance starts or restarts",
    "maintenance.stop": "maintenance ends",
    "syncer.start": "the background syncer starts or restarts",
    "syncer.sync": "the syncer is about to sync",
    "syncer.stop": "the syncer ends",
    "reader.start": "a reader starts or restarts",
    "reader.handle": "a reader has taken a message and not answered it",
    "reader.stop": "a reader ends",
}
"""The steps of a store's actors: name -> the situation at that step. The `step` given to
`foldlog.open` is called with these names."""


class CrashAt:
    """A `step` for `foldlog.open` that raises at a chosen step."""

    def __init__(self, step: str, nth: int, error: type[BaseException], lasting: bool) -> None:
        self.step, self.nth, self.error, self.lasting = step, nth, error, lasting
        self.seen = 0
        """How often the step was reached."""
        self.fired = threading.Event()
        """Set once it has raised."""
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        if name != self.step:
            return
        with self._lock:
            self.seen += 1
            due = self.seen == self.nth or (self.lasting and self.seen > self.nth)
        if due:
            self.fired.set()
            raise self.error(f"crashed at {name}, on purpose")


def crash_at(
    step: str, nth: int = 1, error: type[BaseException] = SystemExit, *, lasting: bool = False
) -> CrashAt:
    """A `step` for `foldlog.open` that kills the actor when it reaches `step` (one of `STEPS`) for
    the `nth` time.

    With `lasting`, also each later time. In plain pykka, the default error would stop every actor
    in the process.
    """
    if step not in STEPS:
        raise ValueError(f"{step!r} is not a step; the steps are {', '.join(STEPS)}")
    return CrashAt(step, Count("nth", 1, 1).check(nth), error, lasting)
