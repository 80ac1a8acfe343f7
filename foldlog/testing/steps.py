"""Actors that die at a named step."""

from __future__ import annotations

import threading

STEPS: dict[str, str] = {
    "writer.start": "the writer starts, or starts again: nothing is open yet",
    "writer.heal": "the fold is about to be written to a new file, after a failed fsync",
    "writer.before_write": "a commit group is decided, nothing of it is written",
    "writer.after_write": "it is written (and synced, with sync='always'), and not published",
    "writer.after_publish": "it is published, and nobody is answered",
    "writer.stop": "the store closes: all is served, the log is not sealed",
    "compact.begin": "a compaction is due, nothing is done for it",
    "compact.write": "maintenance is about to write the new file",
    "compact.written": "the new file is written and synced, and has not its name yet",
    "compact.finish": "the writer is about to carry over the rest and rename",
    "compact.finished": "the new file is the log, and those who asked are not answered",
    "export.begin": "the writer has taken an export, and not passed it on",
    "export.write": "maintenance is about to write the artifact",
    "export.written": "the artifact is at its place, and nobody is answered",
    "maintenance.start": "maintenance starts, or starts again",
    "maintenance.stop": "maintenance ends",
    "syncer.start": "the background syncer starts, or starts again",
    "syncer.sync": "it is about to sync",
    "syncer.stop": "it ends",
    "reader.start": "a reader starts, or starts again",
    "reader.handle": "a reader has taken a message, and not answered it",
    "reader.stop": "it ends",
}
"""The steps of a store's actors, each with what is done by then. `foldlog.open(step=...)` is called with their names."""


class CrashAt:
    """A `step` for `foldlog.open` that raises at one step."""

    def __init__(self, step: str, nth: int, error: type[BaseException], lasting: bool) -> None:
        self.step, self.nth, self.error, self.lasting = step, nth, error, lasting
        self.seen = 0
        """Times that the step was passed or died at."""
        self.fired = threading.Event()
        """Set when it has raised."""
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
    """A `step` for `foldlog.open` that kills the actor at `step` (one of `STEPS`) when it comes there the `nth` time.

    With `lasting`, each later time, too. The default error is one that stops every actor of the process in stock pykka.
    """
    if step not in STEPS:
        raise ValueError(f"{step!r} is no step; there are {', '.join(STEPS)}")
    if nth < 1:
        raise ValueError(f"nth counts from 1, got {nth}")
    return CrashAt(step, nth, error, lasting)
