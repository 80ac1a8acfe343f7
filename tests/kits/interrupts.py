"""An exception or a user's call at each point where CPython may run a signal handler; a call that
has no memory.

CPython runs handlers between bytecodes: when a function is entered, and after calls. A profile
function is called at all of these points, and may raise, as a handler may.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Struck(Exception):
    """What the handler raises: the soft time limit of a task queue, say."""


class At:
    """Calls `act` once, at the thread's `number`-th event. `fired` is True if it was reached."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.number, self.act = number, act
        self.seen = 0
        self.fired = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        del argument  # what a function returns: the traceback would keep it alive
        self.seen += 1
        if self.seen == self.number:
            sys.setprofile(None)
            self.fired = True
            self.act()

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()`, with this in force."""
        try:
            sys.setprofile(self)
            return call()
        finally:
            sys.setprofile(None)


class RunsOut:
    """A profile function that lets one call in its thread fail: the `number`-th of foldlog's."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fired = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_call") or not frame.f_globals["__name__"].startswith(
            "foldlog."
        ):
            return
        called = argument.__name__ if event == "c_call" else frame.f_code.co_name
        if called != "close":  # it takes no memory to close a descriptor
            self.number -= 1
            if self.number == 0:
                self.fired = True
                sys.setprofile(None)
                raise MemoryError("injected")


def strike() -> None:
    """What to do at a point: raise."""
    raise Struck


def points(stride: int = 1, first: int = 1, most: int = 25) -> Iterator[int]:
    """The numbers of points to try, at most so many, until the caller finds one not reached."""
    return iter(range(first, first + stride * most if stride > 1 else 5_000, stride))


def strikes(stride: int = 1, act: Callable[[], object] = strike, *, first: int = 1) -> Iterator[At]:
    """What acts at one of the `points` after the other, until one was not reached."""
    for number in points(max(stride, 1), first):
        at = At(number, act)
        yield at
        if not at.fired:
            return
