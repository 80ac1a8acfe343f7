"""Answers: the futures that callers wait on. The store's actors set them without ever waiting.

`concurrent.futures.Future` guards its state with a Condition. A caller interrupted at the wrong
moment leaves it held, and the actor that brings the answer waits forever. Here an outcome is
claimed and stored in one step, `dict.setdefault`. Each waiter has a queue of its own. Whatever the
user attached (callbacks, `concurrent.futures.wait`) is called on a separate thread, so that no
actor runs or waits for user code.
"""

from __future__ import annotations

import _thread
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from math import inf
from typing import Any, TypeVar

import pykka

from foldlog.actors.base.memory import pause
from foldlog.protocol.logger import log
from foldlog.storage.forks import Rank, call_after_fork
from foldlog.storage.handover import Bell

T = TypeVar("T")

_STARTED, _CANCELLED = "started", "cancelled"
_STATES = {None: PENDING, _STARTED: RUNNING, _CANCELLED: CANCELLED_AND_NOTIFIED}
"""What `concurrent.futures` calls an answer of this fate that has no outcome."""
_FACTS_OF_AN_END = 2
"""An answer that has ended has a fate and an outcome. With more facts, someone waits for it."""


class Unanswered(TimeoutError):
    """No answer came in time. Unlike a bare TimeoutError, it is neither the answer itself nor what
    a signal handler raised."""


class Answer(Future[T]):
    """A future whose setter never waits. Users see an ordinary `concurrent.futures.Future`.

    Callbacks run on a thread of their own, in the order they were added; one that blocks delays no
    actor.
    """

    def __init__(self) -> None:  # without the Condition of the base: most answers are never shared
        # Each key is set once, by `setdefault`: "fate" by the one who starts or cancels, "outcome"
        # by the one who answers, the others by the first who waits or attaches something. Those set
        # theirs before they look for an outcome; who answers looks for theirs afterwards.
        self._facts: dict[Any, Any] = {}

    # For the one who answers.

    def start(self) -> bool:
        """From here on it cannot be cancelled. False if it is cancelled or answered already."""
        return self._facts.setdefault("fate", _STARTED) is _STARTED and "outcome" not in self._facts

    def finish(self, result: Any, error: BaseException | None = None) -> bool:
        """Answer it, once. False if it has ended before."""
        outcome = (result, error)
        facts = self._facts
        if facts.setdefault("fate", _STARTED) is not _STARTED:
            return False
        if facts.setdefault("outcome", outcome) is not outcome:
            return False
        if len(facts) > _FACTS_OF_AN_END:
            self.tell()
        return True

    def tell(self) -> None:
        """Wake all waiters. Called again if the first caller may have been interrupted before
        waking them."""
        facts = self._facts
        bell = facts.get("bell")
        if bell is not None:
            bell.ring()
        if facts.get("callbacks") or "watchers" in facts:
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

    # For those who wait.

    def cancel(self) -> bool:
        """Cancel it. False if it was started."""
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
        """The result. Unanswered if there is none within `timeout` seconds; CancelledError if
        cancelled; or the exception it failed with."""
        result, error = self._facts.get("outcome") or self._outcome(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del error  # the error references this frame
        return result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception it failed with, or None."""
        return self._outcome(timeout)[1]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended, up to `timeout_s` (None: no limit). False on a timeout."""
        bell: Bell = self._facts.get("bell") or self._facts.setdefault("bell", Bell())
        return bell.wait_for(self.done, timeout_s)

    def _outcome(self, timeout: float | None) -> tuple[Any, BaseException | None]:
        outcome = self._facts.get("outcome")
        if outcome is None:
            if not self.wait(timeout):
                raise Unanswered
            if self.cancelled():
                raise CancelledError
            outcome = self._facts["outcome"]
        return outcome  # type: ignore[no-any-return]

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn` with this future once it is done, on a callback thread; or at once, on this
        thread, if it is already done."""
        self._facts.setdefault("callbacks", []).append(fn)
        if self.done():
            self._tell_users()

    def _tell_users(self) -> None:
        """Call each callback once, whichever thread gets here first."""
        for watcher in tuple(self._facts.get("watchers", ())):
            self._tell_watcher(watcher)
        callbacks = self._facts.get("callbacks", [])
        while True:
            try:
                callback = callbacks.pop(0)
            except IndexError:
                return
            try:
                callback(self)
            except BaseException as error:
                # An interrupt comes on no callback thread: there, the others are still called.
                if not isinstance(error, Exception) and not runs_callbacks():
                    raise
                log.exception("a callback of an answer failed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state.lower()}>"

    # Read by `concurrent.futures.wait` and `as_completed`.

    @property
    def _state(self) -> str:  # type: ignore[override]
        if "outcome" in self._facts:
            return FINISHED
        return _STATES[self._facts.get("fate")]

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        return self._facts.setdefault(  # type: ignore[no-any-return]
            "condition", threading.Condition()
        )

    @property
    def _waiters(self) -> _Watchers:  # type: ignore[override]
        return self._facts.setdefault("watchers", _Watchers(self))  # type: ignore[no-any-return]

    def _tell_watcher(self, watcher: Any) -> None:
        if self.cancelled():
            tell = watcher.add_cancelled
        elif self._facts["outcome"][1] is not None:
            tell = watcher.add_exception
        else:
            tell = watcher.add_result
        mark = object()
        if self._facts.setdefault(("told", id(watcher)), mark) is mark:
            tell(self)


class _Watchers(list[Any]):
    """The list to which `concurrent.futures` adds those waiting for one of several answers."""

    def __init__(self, answer: Answer[Any]) -> None:
        super().__init__()
        self._answer = answer

    def append(self, watcher: Any) -> None:
        super().append(watcher)
        if self._answer.done():  # it came just before the append and found nobody here
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


# The thread that runs users' callbacks. It ends after being idle for a while.

IDLE_S = 1.0
STUCK_S = 1.0
"""A callback that takes longer keeps its thread to itself; another thread runs the rest."""

_calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
callback_threads: dict[int, float] = {}
"""For each running callback thread, by `threading.get_ident()`, when its current call began
(time.monotonic()); inf while it waits."""


def _run_soon(call: Callable[[], None]) -> None:
    _calls.put(call)
    _find_a_runner()


def look_after_callbacks() -> None:
    """Find a thread for calls that wait in vain: theirs may have died before its first line. A
    store's supervisor calls this now and then."""
    if not _calls.empty():
        _find_a_runner()


def _find_a_runner() -> None:
    now = time.monotonic()
    if any(now - began < STUCK_S for began in tuple(callback_threads.values())):
        return  # one waits (now - inf is below any limit) or has only just begun
    try:
        _thread.start_new_thread(_run_calls, ())
    except RuntimeError:  # no thread can be started: a later call or an older runner takes over
        with contextlib.suppress(queue.Empty):
            first = _calls.get_nowait()
            first()


def runs_callbacks() -> bool:
    """True on a callback thread: waiting there would hold up the callbacks that follow."""
    return threading.get_ident() in callback_threads


def _run_calls() -> None:
    hand: list[Callable[[], None] | None] = [None]
    is_short = False
    while True:
        try:
            if is_short:
                pause()
            _serve_calls(threading.get_ident(), hand)
            return
        except MemoryError:
            is_short = True  # call nothing here: there may be no memory for that


def _serve_calls(this: int, hand: list[Callable[[], None] | None]) -> None:
    """Call what there is, until it was idle for long enough. Called again if a MemoryError ends it,
    with the call that it was at in `hand`."""
    try:
        while True:
            if hand[0] is None:
                callback_threads[this] = inf
                hand[0] = _calls.get(timeout=IDLE_S)
            callback_threads[this] = time.monotonic()
            _call(hand)
    except queue.Empty:
        pass
    finally:
        callback_threads.pop(this, None)
    with contextlib.suppress(queue.Empty):  # jobs added between the last look and leaving
        while True:
            hand[0] = _calls.get_nowait()
            _call(hand)


def _call(hand: list[Callable[[], None] | None]) -> None:
    call = hand[0]
    assert call is not None
    try:
        call()
    except MemoryError:  # not a callback's: those are caught where they are called
        raise
    except BaseException:
        log.exception("a callback of an answer failed")
    hand[0] = None


def _after_fork_in_child() -> None:
    global _calls
    callback_threads.clear()
    _calls = queue.SimpleQueue()


call_after_fork(_after_fork_in_child, Rank.ANSWERS)
