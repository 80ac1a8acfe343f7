"""Wake-ups on file events, with a poll as the truth.

Events get lost. A full inotify queue drops them with only a log line, a directory that was removed
and recreated sends none, and network file systems have none. So nothing depends on them: every
waiter also wakes at its poll interval.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from foldlog.actors.base.memory import insist
from foldlog.protocol.logger import log


def _is_news(record: logging.LogRecord) -> bool:
    """True unless it is the error that watchdog 7 logs when its emitter is stopped while it looks
    for an event."""
    return "when the thread is inactive" not in str(record.msg)


logging.getLogger("watchdog.observers.inotify").addFilter(_is_news)


def patched_by() -> str:
    """The library whose green threads replace this process's threads ("gevent", "eventlet"), or "".

    watchdog does not run on green threads: its blocking reads stop them all, or its thread dies
    unnoticed.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    return "eventlet" if eventlet is not None and eventlet.is_monkey_patched("thread") else ""


RETRY_S = 10.0
"""Delay before events that were unavailable are requested again: each try costs a thread."""


class FileWatch(FileSystemEventHandler):
    """Calls `wake` when an event of the requested kinds happens to the file at `path`, or another
    file takes its name.

    `wake` runs on one of watchdog's threads, and must only set a flag.
    """

    def __init__(
        self,
        path: Path,
        events: Sequence[type[FileSystemEvent]],
        wake: Callable[[], object],
        *,
        observer: Callable[[], Any] = Observer,
    ) -> None:
        self._path, self._directory = os.fspath(path), os.fspath(path.parent)
        self._events = list(events)
        self._wake = wake
        self._make_observer = observer
        self._observer: Any = None
        self._folder: tuple[int, int] | None = None
        self._told = False
        self._retry_at = 0.0
        self.start()

    @property
    def active(self) -> bool:
        """True if events are available; otherwise there is only the poll."""
        return self._observer is not None

    def start(self) -> None:
        """Request events, if they are available."""
        self._retry_at = time.monotonic() + RETRY_S
        try:
            if green := patched_by():
                raise RuntimeError(f"the threads are those of {green}")
            _check_descriptors()
            self._observer = observer = self._make_observer()
            self._folder = self._folder_now()
            observer.schedule(self, self._directory, recursive=False, event_filter=self._events)
            observer.start()
        # No watches or instances left, no such directory, or no more threads or memory.
        except (OSError, RuntimeError, MemoryError) as error:
            self.stop()
            if not self._told:
                log.info("%s: no file events (%s): polling only", self._path, error)
            self._told = True

    def refresh(self) -> None:
        """Request events again if they were unavailable, or if the directory has been replaced.
        Cost: a `stat` if all is well."""
        if self._observer is None and time.monotonic() < self._retry_at:
            return
        with contextlib.suppress(OSError):
            if (
                self._observer is not None
                and self._folder_now() == self._folder
                and _is_alive(self._observer)
            ):
                return
            self.stop()
            self.start()

    def _folder_now(self) -> tuple[int, int]:
        stat = os.stat(self._directory)
        return stat.st_dev, stat.st_ino

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog; an exception here would silence it for good."""
        if self._path in (event.src_path, event.dest_path):
            with contextlib.suppress(Exception):
                self._wake()

    def stop(self) -> None:
        """Stop, and wait for watchdog's threads."""
        observer = self._observer
        if observer is not None:
            with contextlib.suppress(Exception):
                insist(observer.stop)
            if observer.is_alive() and observer is not threading.current_thread():
                observer.join(5.0)
        self._observer = None


def _check_descriptors() -> None:
    """OSError unless 4 descriptors are free. watchdog takes 3, and leaves open for good what it
    got if it gets no more."""
    with contextlib.ExitStack() as taken:
        for _ in range(2):
            for fd in os.pipe():
                taken.callback(os.close, fd)


def _is_alive(observer: Any) -> bool:
    """True if its threads run: its own, and those that read the events."""
    emitters = getattr(observer, "emitters", ())
    return bool(observer.is_alive()) and all(emitter.is_alive() for emitter in emitters)
