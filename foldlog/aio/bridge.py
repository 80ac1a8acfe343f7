"""From any thread to a loop: calls that are posted together wake it once."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable

SETTLE_AT_ONCE = 256
"""Answers delivered before the loop gets a turn."""


class Bridge:
    """Lets any thread schedule calls on a loop; calls posted together wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the bridge is a value in `_bridges`, keyed by loop
        self._calls: deque[Callable[[], object]] = deque()
        self._due = False

    def post(self, call: Callable[[], object]) -> None:
        """Schedule `call` on the loop. Never blocks. Does nothing if the loop is closed: nobody
        waits there."""
        self._calls.append(call)  # first: whoever clears `_due` then empties the queue
        if not self._due:
            self._schedule()

    def _schedule(self) -> None:
        loop = self._loop()
        self._due = True
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            self._calls.clear()  # the loop is closed
        except BaseException:  # a signal handler's, on the loop's thread: the next call tries again
            self._due = False
            raise

    def _run(self) -> None:
        self._due = False
        try:
            for _ in range(min(len(self._calls), SETTLE_AT_ONCE)):
                self._calls.popleft()()
        finally:  # also after an exception of a signal handler
            if self._calls and not self._due:
                self._schedule()


_bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bridge] = weakref.WeakKeyDictionary()


def bridge_here() -> Bridge:
    """The bridge to the running loop."""
    loop = asyncio.get_running_loop()
    bridge = _bridges.get(loop)
    return _bridges.setdefault(loop, Bridge(loop)) if bridge is None else bridge


class Wake:
    """Wakes one task. Once armed, it does so once."""

    def __init__(self) -> None:
        """Belongs to the running loop."""
        self._bridge = bridge_here()
        self.woken = asyncio.Event()
        self._armed = False

    def arm(self) -> None:
        """Wake the task at the next call. Runs on the loop."""
        self.woken.clear()
        self._armed = True

    def __call__(self) -> None:
        """Any thread may call it. Never blocks."""
        if self._armed:
            self._armed = False
            self._bridge.post(self.woken.set)
