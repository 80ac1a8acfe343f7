"""Answers: the futures that callers wait on, and that the store's actors set without ever waiting for a caller.

`concurrent.futures.Future` guards its state with a Condition. A caller that is interrupted in the worst moment leaves that
held, and then the actor that comes with the answer waits for ever. Here an outcome is claimed and stored in one step,
`dict.setdefault`; whoever waits has a queue of its own; and what the user attached (callbacks, `concurrent.futures.wait`) is
called on a thread of its own, so that no actor runs, or waits for, what is not its own.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any, TypeVar

import pykka

from foldlog.protocol.forks import Rank, call_after_fork
from foldlog.storage.handover import Bell

T = TypeVar("T")
log = logging.getLogger("foldlog")

_STARTED, _CANCELLED = "started", "cancelled"


class Answer(Future[T]):
    """A future whose setter never waits. To its user it is a `concurrent.futures.Future` like any other.

    Callbacks run on a thread of their own, in the order in which they were added; one that blocks holds up no actor.
    """

    def __init__(self) -> None:  # without the Condition of the base: most answers are never shared
        # Each key is set once, by `setdefault`: "fate" by whoever starts or cancels, "outcome" by whoever answers.
        self._facts: dict[Any, Any] = {}
        self._bell = Bell()
        self._callbacks: deque[Callable[[Future[T]], object]] = deque()

    # For whoever answers.

    def start(self) -> bool:
        """From here on it cannot be withdrawn. False if it was, or has its answer already."""
        return self._facts.setdefault("fate", _STARTED) is _STARTED and "outcome" not in self._facts

    def finish(self, result: Any, error: BaseException | None = None) -> bool:
        """Answer it, once: False if it has ended before."""
        outcome = (result, error)
        facts = self._facts
        if facts.setdefault("fate", _STARTED) is not _STARTED:
            return False
        if facts.setdefault("outcome", outcome) is not outcome:
            return False
        self.tell()
        return True

    def tell(self) -> None:
        """Wake all who wait for it. Again, if the one who answered may have been interrupted before it could."""
        self._bell.ring()
        if self._callbacks or "watchers" in self._facts:
            _run_soon(self._tell_users)

    def set_result(self, result: T) -> None:
        if not self.finish(result):
            raise InvalidStateError(f"{self!r} has ended")

    def set_exception(self, exception: BaseException | None) -> None:
        if not self.finish(None, exception):
            raise InvalidStateError(f"{self!r} has ended")

    def set_running_or_notify_cancel(self) -> bool:
        if "outcome" in self._facts:
            raise InvalidStateError(f"{self!r} has ended")
        return self.start()

    # For whoever waits.

    def cancel(self) -> bool:
        """Withdraw it. False if it was begun."""
        if "outcome" in self._facts:
            return False
        if self._facts.setdefault("fate", _CANCELLED) is not _CANCELLED:
            return False
        self.tell()
        return True

    def cancelled(self) -> bool:
        return self._facts.get("fate") is _CANCELLED

    def running(self) -> bool:
        return self._facts.get("fate") is _STARTED and "outcome" not in self._facts

    def done(self) -> bool:
        return "outcome" in self._facts or self._facts.get("fate") is _CANCELLED

    def result(self, timeout: float | None = None) -> T:
        """The result. TimeoutError if there is none within `timeout` seconds; CancelledError, or what it failed with."""
        result, error = self._outcome(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del error  # the error holds this frame
        return result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it failed with, or None."""
        return self._outcome(timeout)[1]

    def _outcome(self, timeout: float | None) -> tuple[Any, BaseException | None]:
        outcome = self._facts.get("outcome")
        if outcome is None:
            if not self._bell.wait_for(self.done, timeout):
                raise TimeoutError
            if self.cancelled():
                raise CancelledError
            outcome = self._facts["outcome"]
        return outcome  # type: ignore[no-any-return]

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn` with this once it is done, on a thread for callbacks; at once, on this one, if it is done."""
        self._callbacks.append(fn)
        if self.done():
            self._tell_users()

    def _tell_users(self) -> None:
        """Call each callback once, whoever comes first."""
        for watcher in tuple(self._facts.get("watchers", ())):
            self._tell_watcher(watcher)
        while True:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return
            try:
                callback(self)
            except Exception:
                log.exception("a callback of an answer failed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state.lower()}>"

    # What `concurrent.futures.wait` and `as_completed` look at.

    @property
    def _state(self) -> str:  # type: ignore[override]
        if "outcome" in self._facts:
            return FINISHED
        fate = self._facts.get("fate")
        return (
            CANCELLED_AND_NOTIFIED
            if fate is _CANCELLED
            else RUNNING
            if fate is _STARTED
            else PENDING
        )

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        return self._facts.setdefault("condition", threading.Condition())  # type: ignore[no-any-return]

    @property
    def _waiters(self) -> _Watchers:  # type: ignore[override]
        return self._facts.setdefault("watchers", _Watchers(self))  # type: ignore[no-any-return]

    def _tell_watcher(self, watcher: Any) -> None:
        mark = object()
        if self._facts.setdefault(("told", id(watcher)), mark) is not mark:
            return
        if self.cancelled():
            watcher.add_cancelled(self)
        elif self._facts["outcome"][1] is not None:
            watcher.add_exception(self)
        else:
            watcher.add_result(self)


class _Watchers(list[Any]):
    """The list to which `concurrent.futures` adds who waits for an answer among several."""

    def __init__(self, answer: Answer[Any]) -> None:
        super().__init__()
        self._answer = answer

    def append(self, watcher: Any) -> None:
        super().append(watcher)
        if self._answer.done():  # it came just before, and looked here in vain
            self._answer._tell_watcher(watcher)

    def remove(self, watcher: Any) -> None:
        super().remove(watcher)
        self._answer._facts.pop(("told", id(watcher)), None)


class Reply(pykka.Future[T]):
    """What `ask` waits on: pykka's future, set without a lock."""

    def __init__(self) -> None:
        super().__init__()
        self._facts: dict[Any, Any] = {}
        self._bell = Bell()

    def _is_set(self) -> bool:
        return "outcome" in self._facts

    def get(self, *, timeout: float | None = None) -> Any:
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self._bell.wait_for(self._is_set, timeout):
            raise pykka.Timeout(f"{timeout} seconds")
        value, error = self._facts["outcome"]
        if error is not None:
            raise error
        return value

    def set(self, value: Any = None) -> None:
        self._finish((value, None))

    def set_exception(self, exc_info: Any = None) -> None:
        kind, error, trace = exc_info or sys.exc_info()
        error = kind() if error is None else error  # type: ignore[misc]
        self._finish((None, error.with_traceback(trace)))

    def _finish(self, outcome: tuple[Any, BaseException | None]) -> None:
        if self._get_hook is not None or self._facts.setdefault("outcome", outcome) is not outcome:
            raise queue.Full  # as pykka does
        self._bell.ring()


# The thread that calls users back. It ends when there was nothing to do for a while.

IDLE_S = 1.0
STUCK_S = 1.0
"""A callback that takes longer has its thread to itself; another goes on with the rest."""

_calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_runners: deque[list[float]] = deque()
"""Of each thread that runs, when its present call began (time.monotonic()); inf while it waits."""


def _run_soon(call: Callable[[], None]) -> None:
    _calls.put(call)
    now = time.monotonic()
    if any(now - runner[0] < STUCK_S for runner in tuple(_runners)):
        return  # one waits (from inf on, less than any), or has only just begun
    try:
        _thread.start_new_thread(_run_calls, ())
    except RuntimeError:  # no more threads to be had: the next who comes by, or an older runner
        with contextlib.suppress(queue.Empty):
            first = _calls.get_nowait()
            first()


def runs_callbacks() -> bool:
    """True on a thread that calls users back: who waits there holds up the callbacks after it."""
    return threading.get_ident() in _runner_ids


_runner_ids: set[int] = set()


def _run_calls() -> None:
    began = [time.monotonic()]
    _runners.append(began)
    _runner_ids.add(threading.get_ident())
    try:
        while True:
            began[0] = float("inf")
            try:
                call = _calls.get(timeout=IDLE_S)
            except queue.Empty:
                break
            began[0] = time.monotonic()
            try:
                call()
            except BaseException:
                log.exception("a callback of an answer failed")
            del call
    finally:
        _runner_ids.discard(threading.get_ident())
        _runners.remove(began)
    with contextlib.suppress(queue.Empty):  # what came between the last look and leaving
        while True:
            call = _calls.get_nowait()
            call()


def _after_fork_in_child() -> None:
    global _calls
    _runners.clear()
    _runner_ids.clear()
    _calls = queue.SimpleQueue()


call_after_fork(_after_fork_in_child, Rank.ANSWERS)
