"""Being woken when a log file changes: watchdog's events as hints, a slow poll as the truth.

Events get lost: a full inotify queue drops them with a log line, a folder that was removed and made again is silent, and
network file systems have none. So nothing depends on them: whoever waits here waits no longer than its poll interval.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

log = logging.getLogger("foldlog")


class FileWatch(FileSystemEventHandler):
    """Calls `wake` when something of the kinds asked for happens to the file at `path`, or takes its name.

    `wake` runs on a thread of watchdog's, and must only leave a note.
    """

    def __init__(self, path: Path, events: Sequence[type[FileSystemEvent]], wake: Callable[[], object]) -> None:
        self._path = os.fspath(path)
        self._wake = wake
        self._observer = Observer()
        self._observer.daemon = True
        self.active = False
        """Whether events are to be had; if not, there is the poll."""
        try:
            self._observer.schedule(self, os.fspath(path.parent), recursive=False, event_filter=list(events))
            self._observer.start()
            self.active = True
        except (OSError, RuntimeError) as error:  # no watches or instances left, or no such folder
            log.info("%s: no file events (%s): polling only", path, error)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog; an exception here would silence it for good."""
        if self._path in (event.src_path, event.dest_path):
            with contextlib.suppress(Exception):
                self._wake()

    def stop(self) -> None:
        """Stop, and wait for watchdog's threads."""
        if self.active:
            self.active = False
            self._observer.stop()
            self._observer.join(5.0)
