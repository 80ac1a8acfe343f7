"""How threads hand over to each other when an exception may come at any bytecode of one of them.

A signal handler may raise, or call the store again, between any two steps of the main thread. So nobody here waits for a lock
that a caller's frame could leave held. Whatever changes state is one call into C (`deque.append`, `deque.remove`,
`SimpleQueue.put`), which happens whole or not at all; whoever waits does so on a queue of its own, and looks again now and
then, since the one who was to ring may have been interrupted just before.

    Bell      wakes all who wait for a condition
    Latch     set once, for good
    Wakeup    wakes one thread that sleeps between polls
    Turns     one frame at a time, first come first served; a frame that is gone holds nothing
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Protocol

from foldlog.protocol.errors import ReentrantCall

RECHECK_S = 0.2
"""How long a waiter may sleep through a bell that was not rung, since its ringer was interrupted."""
_getframe = sys._getframe


def is_over(frame: object) -> bool:
    """True if `frame` has returned or was unwound. One that runs, or is suspended in a greenlet, is not."""
    if not isinstance(frame, FrameType):
        return False
    try:
        frame.clear()  # refused while it is executing
    except RuntimeError:
        return False
    return True


def is_below(frame: object) -> bool:
    """True if `frame` is one that called the present one: it cannot go on before this returns."""
    below: FrameType | None = _getframe(1)
    while below is not None:
        if below is frame:
            return True
        below = below.f_back
    return False


class Endable(Protocol):
    """A future, say."""

    def done(self) -> bool: ...


class Bell:
    """Wakes all who wait for a condition to come true."""

    __slots__ = ("_spots",)

    def __init__(self) -> None:
        self._spots: deque[SimpleQueue[None]] = deque()

    def ring(self) -> None:
        """Let those who wait look at their condition. Any thread; never blocks."""
        for spot in tuple(self._spots):
            spot.put(None)

    def wait_for(self, condition: Callable[[], object], timeout_s: float | None) -> bool:
        """Wait until `condition()`, up to `timeout_s` (None: for ever). Returns whether it came true."""
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
        """Returns whether it is set by then."""
        return self._bell.wait_for(self.is_set, timeout_s)

    def wait_with(self, other: Endable, timeout_s: float | None = None) -> bool:
        """`wait`, also for `other` to be done: that is seen within `RECHECK_S`."""
        return self._bell.wait_for(lambda: other.done() or self._is_set, timeout_s)


class Wakeup:
    """Wakes one thread that sleeps between polls. Several calls before it wakes count as one."""

    __slots__ = ("_notes",)

    def __init__(self) -> None:
        self._notes: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Any thread; never blocks."""
        if self._notes.empty():
            self._notes.put(None)

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until `set`, or `timeout_s`. Returns whether it was set."""
        try:
            self._notes.get(timeout=timeout_s)
        except Empty:
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Forget the calls so far."""
        with contextlib.suppress(Empty):
            while True:
                self._notes.get_nowait()


class Turns:
    """One owner at a time, first come first served. An owner is a frame, or what stands for a thread.

    A frame enters and leaves in one function: `turns.enter(_getframe())` within `try`, `turns.leave(_getframe())` within its
    `finally`, both without a local name for the frame, which would be a cycle. If an interrupt comes even there, the next in
    line finds that the frame is over, and passes it.
    """

    __slots__ = ("_bell", "line")

    def __init__(self) -> None:
        # Whoever is first has the turn. Appending and removing are one step each, and removing names whom.
        self.line: deque[object] = deque()
        self._bell = Bell()

    def enter(self, owner: object) -> None:
        """Wait for the turn. ReentrantCall if this very thread has it, further down its stack."""
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
        """Give the turn back, or the place in the line. Leaving twice is fine."""
        discard(self.line, owner)
        if self.line:
            self._bell.ring()


def discard(line: deque[Any], what: object) -> None:
    """Take `what` out of a line; if it has left before, that is as well. One step."""
    with contextlib.suppress(ValueError):
        line.remove(what)
