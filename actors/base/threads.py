"""A thread of the product's own: whoever waits for it never waits in vain.

Where memory is short, a thread may die before its first line, and nobody is told. So who starts one
waits until it runs, and gives it up if that takes too long: then it never will. Once it runs, a
MemoryError does not end it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from math import inf

from foldlog.actors.base.adapter import start_aside
from foldlog.actors.base.answers import Answer
from foldlog.actors.base.memory import pause
from foldlog.storage.handover import RECHECK_S

LOOKS = 50
"""Looks for a thread that was started, `RECHECK_S` apart, before it is given up. They are counted,
not timed, so that a pause of the process counts as one."""


class OwnThread(threading.Thread):
    """See the module. `begin` starts it."""

    def __init__(self, name: str, work: Callable[[], object], at_end: Callable[[], object]) -> None:
        """`work` is called again after a MemoryError, and so must be able to continue. Whatever
        ends it, `at_end` is called after it, until it has the memory that it needs."""
        super().__init__(name=name, daemon=True)
        self._work, self._at_end = work, at_end
        self._begun: Answer[None] = Answer()

    def begin(self, timeout_s: float | None = None) -> None:
        """Start it, and return once it runs.

        RuntimeError if no thread can be started, MemoryError if it died before it ran,
        TimeoutError after `timeout_s`. Then it never runs.
        """
        begun = self._begun
        start_aside(self, lambda error: begun.finish(None, error))
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(LOOKS):
            rest = max(deadline - time.monotonic(), 0.0)
            try:
                begun.result(min(rest, RECHECK_S))
                return
            except TimeoutError:
                if rest == 0.0 and begun.cancel():
                    raise
        if begun.cancel():
            raise MemoryError(f"the thread {self.name} did not begin")
        begun.result()

    @property
    def has_begun(self) -> bool:
        """True if it runs, or has ended."""
        return self._begun.done()

    def withdraw(self) -> bool:
        """Keep it from running. False if it has begun."""
        return self._begun.cancel()

    def run(self) -> None:
        """Called on the thread. No handler calls anything: it may have no memory for that."""
        is_over = is_short = False
        struck: BaseException | None = None
        while True:
            try:
                if is_short:
                    pause()
                if not is_over:
                    self._begun.finish(None)
                    if self._begun.cancelled():
                        return
                    self._work()
                    is_over = True
                self._at_end()
                break
            except MemoryError:
                is_short = True
            except BaseException as error:
                if is_over:
                    raise
                struck, is_over = error, True
        del self._work, self._at_end  # they hold whoever holds this thread
        if struck is not None:
            raise struck
