"""Thread synchronization that survives an exception at any bytecode.

A signal handler may raise, or call the store again, between any two bytecodes of the main thread.
So nothing here waits for a lock that an interrupted frame could leave held. Each change of state is
one call into C (`deque.append`, `deque.remove`, `SimpleQueue.put`), which happens completely or not
at all. A waiter sleeps on a queue of its own, and rechecks its condition now and then, since the
thread that should notify it may have been interrupted just before.

    Bell      wakes all threads that wait for a condition
    Latch     set once, for good
    Wakeup    wakes one thread that sleeps between polls
    Turns     one owner at a time, first come, first served; an ended frame holds nothing

`enter_alone` is for what one thread uses at a time: it refuses where `Turns` would wait.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from foldlog.protocol.errors import ReentrantCall

RECHECK_S = 0.2
"""Seconds between two checks of a condition, in case the notifying thread was interrupted."""
_getframe = sys._getframe


def is_over(frame: object) -> bool:
    """True if `frame` has returned or was unwound; False if it runs, or a greenlet suspends it."""
    if not isinstance(frame, FrameType):
        return False
    try:
        frame.clear()  # refused while it is executing
    except RuntimeError:
        return False
    return True


def is_below(frame: object) -> bool:
    """True if `frame` is a caller, direct or not, of this call: it waits for this call to end."""
    below: FrameType | None = _getframe(1)
    while below is not None:
        if below is frame:
            return True
        below = below.f_back
    return False


class Bell:
    """Wakes all who wait for a condition to come true."""

    __slots__ = ("_spots",)

    def __init__(self) -> None:
        self._spots: list[SimpleQueue[None]] = []  # a deque takes ten times the memory

    def ring(self) -> None:
        """Wake all waiters to check their conditions. Any thread may call it. Never blocks."""
        for spot in tuple(self._spots):
            spot.put(None)

    def wait_for(self, condition: Callable[[], object], timeout_s: float | None) -> bool:
        """Wait until `condition()` is true, up to `timeout_s` (None: no limit).

        Returns False on a timeout.
        """
        if condition():
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        spot: SimpleQueue[None] = SimpleQueue()
        try:
            self._spots.append(spot)
            while not condition():
                rest = RECHECK_S
                if deadline is not None:
                    rest = min(rest, deadline - time.monotonic())
                    if rest <= 0:
                        return False
                with contextlib.suppress(Empty):
                    spot.get(timeout=rest)
            return True
        finally:
            discard(self._spots, spot)


class Latch:
    """Set once, for good; `threading.Event` without a lock that a caller could leave held."""

    __slots__ = ("_bell", "_is_set")

    def __init__(self) -> None:
        self._bell = Bell()
        self._is_set = False

    def set(self) -> None:
        self._is_set = True
        self._bell.ring()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, up to `timeout_s` (None: no limit). Returns False on a timeout."""
        return self._bell.wait_for(self.is_set, timeout_s)


class Wakeup:
    """Wakes one thread that sleeps between polls. Several calls before it wakes count as one."""

    __slots__ = ("_notes",)

    def __init__(self) -> None:
        self._notes: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake the thread. Any thread may call it. Never blocks."""
        if self._notes.empty():
            self._notes.put(None)

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until `set` is called, up to `timeout_s` (None: no limit). False on a timeout."""
        try:
            self._notes.get(timeout=timeout_s)
        except Empty:
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Forget the calls of `set` so far."""
        with contextlib.suppress(Empty):
            while True:
                self._notes.get_nowait()


class Turns:
    """One owner at a time, first come, first served. An owner is a frame, or an object that
    represents a thread.

    A frame enters and leaves in one function: `turns.enter(_getframe())` within `try`,
    `turns.leave(_getframe())` within its `finally`. Neither keeps the frame in a local variable,
    which would be a reference cycle. If an interrupt prevents even that, the next owner in line
    finds that the frame is over, and skips it.
    """

    __slots__ = ("_bell", "line")

    def __init__(self) -> None:
        # The first has the turn. Appending is atomic; so is removing, which names the owner.
        self.line: deque[object] = deque()
        self._bell = Bell()

    def enter(self, owner: object) -> None:
        """Wait for the turn. ReentrantCall if a caller of this function has it."""
        line = self.line
        line.append(owner)
        while line[0] is not owner:
            first = line[0]
            if is_over(first):
                discard(line, first)
            elif is_below(first):
                discard(line, owner)
                raise ReentrantCall("called within a call of this thread that it would wait for")
            else:
                self._bell.wait_for(lambda: line[0] is not first, RECHECK_S)  # noqa: B023

    def leave(self, owner: object) -> None:
        """Give up the turn, or the place in line. Leaving twice is fine."""
        discard(self.line, owner)
        if self.line:
            self._bell.ring()


def enter_alone(line: deque[object], frame: object) -> None:
    """Add the frame of a call to `line`. ReentrantCall, at once, if another call is in it: one
    below on this thread's stack, or one on another thread.

    Call it within `try`, and `discard(line, frame)` within its `finally`.
    """
    if frame not in line:
        line.append(frame)
    while (first := line[0]) is not frame:
        if not is_over(first):
            raise ReentrantCall(
                "called while the store is being written: it is for one thread at a time"
            )
        discard(line, first)


def discard(line: deque[Any] | list[Any], what: object) -> None:
    """Remove `what` from a line, if it is in it. Atomic."""
    try:  # noqa: SIM105 - `suppress` takes five times as long, and each write calls this
        line.remove(what)
    except ValueError:
        pass
