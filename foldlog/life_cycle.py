"""How stores end without a `with` block: dropped ones, those open at the interpreter's exit, and
those of a forked child."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import warnings
import weakref
from pathlib import Path

from foldlog.actors.base.answers import Answer, runs_callbacks
from foldlog.actors.store.supervisor import CloseNow, Supervisor
from foldlog.protocol.errors import RequestTimeout
from foldlog.storage.forks import Rank, call_after_fork

EXIT_TIMEOUT_S = 10.0
UNOPENED_TIMEOUT_S = 5.0
"""How long an interrupted `open` waits for the log to be closed again."""

live: weakref.WeakKeyDictionary[Supervisor, int] = weakref.WeakKeyDictionary()
"""Of open stores: the pid of the process that opened them."""
_dropped: weakref.WeakSet[Supervisor] = weakref.WeakSet()
"""Of stores that were dropped without `close`, those that may still be closing."""


def would_wait_for_itself(supervisor: Supervisor) -> bool:
    """True if this thread must not wait for the store, which would wait for this thread."""
    return (
        runs_callbacks()
        or supervisor.writer.is_in_turn()
        or supervisor.owns(threading.current_thread())
    )


def close(supervisor: Supervisor, timeout_s: float) -> BaseException | None:
    """Close a store, and wait for it where that is possible: see `Store.close`. Returns the error
    to raise."""
    answer: Answer[BaseException | None] = Answer()
    supervisor.post(CloseNow(answer))
    if would_wait_for_itself(supervisor) or any(
        reader.is_in_turn() for reader in supervisor.readers
    ):
        return None
    deadline = time.monotonic() + timeout_s
    if not answer.wait(timeout_s):
        return RequestTimeout(
            f"the store did not close within {timeout_s} s; the writer still has the log open"
        )
    supervisor.thread.join(max(deadline - time.monotonic(), 0.1))
    return answer.result()


def close_dropped(supervisor: Supervisor, pid: int) -> None:
    """The finalizer of a store: close it if nobody has, with a ResourceWarning."""
    if os.getpid() == pid and supervisor.thread.is_alive():
        _dropped.add(supervisor)
        supervisor.post(CloseNow(Answer()))  # first: warnings may be errors
        warnings.warn("a foldlog store was dropped without close()", ResourceWarning, stacklevel=2)


def await_dropped(path: Path) -> None:
    """Wait for dropped stores on this log to close: an interrupt right after `open` drops one."""
    for supervisor in tuple(_dropped):
        if supervisor.core.config.path == path:
            supervisor.core.ended.wait(UNOPENED_TIMEOUT_S)


@atexit.register
def _close_at_exit() -> None:
    """Close stores that a script forgot, so that it ends promptly with every answered batch on
    disk."""
    for supervisor, pid in list(live.items()):
        if pid == os.getpid():
            with contextlib.suppress(Exception):
                close(supervisor, EXIT_TIMEOUT_S)


def _after_fork_in_child() -> None:
    # The threads are gone, and any lock they held is held forever: replace what calls wait on.
    for supervisor in list(live):
        supervisor.after_fork()
    live.clear()
    _dropped.clear()


call_after_fork(_after_fork_in_child, Rank.STORE)
